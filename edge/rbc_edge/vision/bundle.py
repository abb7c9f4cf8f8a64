"""The bundle: the models, as training hands them to the station. Only this module opens ONNX sessions.

A bundle is a folder with ``manifest.json``, the two networks and a test field with its expected cells.
`Bundle.open` checks every byte before anything runs. The export calls `write`.

The networks' contract:

- ``detector.onnx``: ``image`` uint8 (1, H, W, 3) RGB, H and W multiples of 32, and ``least_score`` float32
  (3,), by `CellClass` → ``boxes`` float32 (N, 4) xyxy in pixels of the input, ``scores`` float32 (N, 3)
  probability of each class: the places where a class reaches its least score, before suppression.
- ``classifier.onnx``: ``crops`` uint8 (N, 64, 64, 3) RGB, and ``sides`` float32 (N, 2), width and height of
  each box in diameters of a red cell, because a crop does not show its size → ``overlap_score`` float32
  (N,), probability that the cell in the middle is overlapping, and ``refuse_score`` float32 (N,),
  probability that the box holds no single red cell: nothing, another cell, several cells, or a part of
  one. Where the manifest names `shapes`, also ``shape_score`` float32 (N, S), probability of each. Without
  them, ``sides`` may be missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rbc_edge.errors import BundleError, UnavailableError, machine_trouble
from rbc_edge.text import path_text

if TYPE_CHECKING:
    import onnxruntime as ort

FORMAT: Final = 4  # version of the manifest this program reads and writes
MANIFEST: Final = "manifest.json"
DETECTOR: Final = "detector.onnx"
DETECTOR_FP32: Final = "detector-fp32.onnx"
CLASSIFIER: Final = "classifier.onnx"
CLASSIFIER_FP32: Final = "classifier-fp32.onnx"
TEST_INPUT: Final = "test-input.png"
TEST_EXPECTED: Final = "test-expected.json"
_SURE: Final = 0.35  # of the way from the score threshold to 1
_REQUIRED: Final = (DETECTOR, CLASSIFIER, TEST_INPUT, TEST_EXPECTED)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A bundle's description of itself."""

    format: int  # version of the manifest's layout
    class_names: tuple[str, ...]  # names by `CellClass` number
    cell_diameter_px: float  # diameter at which the detector knows a red cell, pixels
    tile_px: int  # largest side of one detector input, pixels at model scale
    tile_overlap_px: int  # smallest overlap of neighbouring tiles, pixels at model scale
    score_threshold: tuple[float, ...]  # smallest detector score that counts, by `CellClass`, 0..1
    iou_threshold: tuple[float, ...]  # by `CellClass`: boxes that overlap by more are one cell, 0..1
    iou_threshold_across: float  # the same for boxes of different classes
    crop_margin: float  # share of the box's side on each of its four sides
    overlap_threshold: float  # smallest classifier score of an overlapping cell, 0..1
    # Smallest classifier score of a box that is not one red cell, 0..1. 1: no box is refused, whatever its
    # score.
    refuse_threshold: float
    shapes: tuple[str, ...]  # names of shapes, in the order of the classifier's. None: it knows no shapes
    # (S + signs + 1, S): for each shape the weights of the log probabilities of the S shapes, of the
    # `morphology.signs` of a cell, and a constant. None: what is measured does not change its shape.
    shape_weights: tuple[tuple[float, ...], ...]
    shape_threshold: float  # smallest probability of a shape that is not called unsure, 0..1
    normalisation: str  # what the networks do with pixel values, in words
    calibration: Mapping[str, Any]  # the images on which the int8 ranges were measured
    training: Mapping[str, Any]  # data, commit, seeds and options that made the networks
    metrics: Mapping[str, Any]  # parity and task metrics, fp32 against int8, on validation photographs
    licence: str  # SPDX expression
    files: Mapping[str, str]  # SHA-256 of every other file of the folder
    bundle_id: str = ""  # first 16 hex digits of the hash over all other values

    @property
    def sure_score(self) -> float:
        """The detector score, 0..1, from which a red cell is not refused.

        The second stage refuses cells of laboratories that it does not know, the detector knows them better:
        of a laboratory left out of the training, the second stage alone refused 4 in 100 cells.
        """
        least = self.score_threshold[0]  # of red cells. `CellClass` would load numpy
        return least + _SURE * (1 - least)

    def content_id(self) -> str:
        """Computes the bundle_id: hash over the manifest, which holds the hash of every file."""
        content = asdict(self)
        del content["bundle_id"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Returns the text of ``manifest.json``."""
        return json.dumps(asdict(self), indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class Bundle:
    """An intact bundle on disk.

    Attributes:
        path: Its folder.
        manifest: Its description of itself.
    """

    path: Path
    manifest: Manifest

    @property
    def bundle_id(self) -> str:
        """The hash of the content, 16 hex digits."""
        return self.manifest.bundle_id

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None) -> Bundle:
        """Opens a bundle and checks every byte against its hash.

        Args:
            path: Its folder. None: the one that ships in this package.

        Raises:
            BundleError: It is missing, of another format, or not intact.
        """
        folder = default_path() if path is None else Path(path)
        manifest = _read_manifest(folder / MANIFEST)
        for name, expected in manifest.files.items():
            try:
                actual = _sha256(folder / name)
            except OSError as error:
                raise _broken(folder / name, error.strerror or error) from error
            if actual != expected:
                raise _broken(folder / name, "does not match its SHA-256 in the manifest")
        return cls(folder, manifest)

    def networks(self, precision: str) -> tuple[str, str]:
        """Returns the names of the detector and the classifier of a precision, ``int8`` or ``fp32``.

        Raises `BundleError` where this bundle has none.
        """
        names = (DETECTOR_FP32, CLASSIFIER_FP32) if precision == "fp32" else (DETECTOR, CLASSIFIER)
        if missing := [file for file in names if file not in self.manifest.files]:
            advice = "set precision to int8, or export with the fp32 networks"
            raise BundleError(f"{self.path}: holds no {missing[0]}", advice)
        return names

    def counts_as(self, precision: str) -> str:
        """Returns the bundle_id for the tables: another precision is named, because its counts differ."""
        return self.bundle_id if precision == "int8" else f"{self.bundle_id}+{precision}"

    def session(self, file: str, *, threads: int) -> ort.InferenceSession:
        """Opens one of the bundle's networks on the CPU. `threads` work inside one operator.

        Raises `BundleError` where ONNX Runtime cannot load it, and `UnavailableError` where it cannot be
        loaded itself, or memory is short.
        """
        try:
            import onnxruntime as ort  # noqa: PLC0415  takes a third of a second
        except Exception as error:  # a library of another processor may raise anything
            what = f"a library cannot be loaded: {type(error).__name__}: {error}"
            raise UnavailableError(what, "install rbc-edge again, into its own environment") from error

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_mem_pattern = False  # a plan for each shape of input takes 20 MB and saves no time
        options.log_severity_level = 3
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Threads that wait in a loop would take the processor from decoding and from the camera.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return ort.InferenceSession(str(self.path / file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if trouble := machine_trouble(error):
                what = f"{self.path / file}: cannot be loaded now: {trouble}"
                raise UnavailableError(what, "set threads to 1, or end other programs") from error
            raise _broken(self.path / file, f"ONNX Runtime cannot load it: {error}") from error

    def describe(self) -> dict[str, object]:
        """Returns a JSON-able summary, for ``bundle show``."""
        return {"path": path_text(self.path), **asdict(self.manifest)}


@functools.cache
def _share_arena() -> None:
    """Makes all networks of the process share one memory arena: 640x480 takes 140 MB instead of 149."""
    import onnxruntime as ort  # noqa: PLC0415  see `Bundle.session`

    of_cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(of_cpu, None)


def default_path() -> Path:
    """Returns the folder of the bundle that ships in this package."""
    return Path(str(files("rbc_edge") / "bundles" / "default"))


def claimed_id(path: Path | None = None) -> str | None:
    """Returns the bundle_id in the manifest of a folder (see `Bundle.open`), unchecked. None without one."""
    try:
        claimed = json.loads(((path or default_path()) / MANIFEST).read_text(encoding="utf-8"))["bundle_id"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    return claimed if isinstance(claimed, str) and claimed.isalnum() else None


def write(folder: Path, source: Mapping[str, Path], manifest: Manifest) -> Bundle:
    """Writes a bundle: copies the files, hashes them, writes the manifest last.

    An earlier bundle in the folder is replaced. `source` gives for each name in the bundle the file to copy.
    The manifest's ``files`` and ``bundle_id`` are filled in here. Raises `BundleError` where a required file
    is missing.
    """
    if missing := [name for name in _REQUIRED if name not in source]:
        raise BundleError(f"{folder}: a bundle needs {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name, file in source.items():
        if file.resolve() != (folder / name).resolve():
            shutil.copyfile(file, folder / name)
    hashes = {name: _sha256(folder / name) for name in sorted(source)}
    for stray in folder.iterdir():
        if stray.name not in hashes and stray.suffix in (".onnx", ".png", ".json"):
            stray.unlink()
    # Through JSON and back, so that the id is of what a reader will get.
    text = replace(manifest, files=hashes, bundle_id="").to_json()
    plain = _parse(json.loads(text), folder / MANIFEST)
    named = replace(plain, bundle_id=plain.content_id())
    (folder / MANIFEST).write_text(named.to_json(), encoding="utf-8")
    return Bundle.open(folder)


def _broken(file: Path, what: object) -> BundleError:
    return BundleError(f"{file}: {what}", "install rbc-edge again, or name another bundle with --bundle")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_manifest(file: Path) -> Manifest:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _broken(file, error.strerror or error) from error
    except (ValueError, RecursionError) as error:
        kind = "text" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise _broken(file, f"is not {kind}: {error}") from error
    manifest = _parse(content, file)
    try:
        is_intact = manifest.content_id() == manifest.bundle_id
    except RecursionError as error:  # the JSON reader takes more levels than Python does
        raise _broken(file, "its values are nested too deeply") from error
    if not is_intact:
        raise _broken(file, "does not match its bundle_id: it was changed after the export")
    return manifest


def _parse(content: object, file: Path) -> Manifest:
    """Checks the manifest's layout and the numbers that the pipeline relies on."""
    if not isinstance(content, dict):
        raise _broken(file, "is not a manifest")
    if content.get("format") != FORMAT:
        message = f"{file}: format {content.get('format')!r}, this version reads {FORMAT}"
        raise BundleError(message, "use the rbc-edge version that the bundle was made for")
    if odd := sorted(set(content) ^ {f.name for f in fields(Manifest)}):
        raise _broken(file, f"missing or unknown: {', '.join(odd)}")
    try:
        kinds = {"class_names": str, "score_threshold": float, "iou_threshold": float, "shapes": str}
        lists = {name: tuple(map(kind, content[name])) for name, kind in kinds.items()}
        weights = tuple(tuple(map(float, row)) for row in content["shape_weights"])
        manifest = Manifest(**content | lists | {"files": dict(content["files"]), "shape_weights": weights})
        shares = (*manifest.score_threshold, *manifest.iou_threshold, manifest.iou_threshold_across)
        sound = (
            len(manifest.class_names) == len(manifest.score_threshold) == len(manifest.iou_threshold) == 3
            and all(0 <= s <= 1 for s in (*shares, manifest.overlap_threshold, manifest.refuse_threshold))
            and 0 <= manifest.shape_threshold <= 1
            and 0 < manifest.cell_diameter_px < math.inf
            and 0 <= manifest.crop_margin <= 2
            and all(isinstance(px, int) for px in (manifest.tile_px, manifest.tile_overlap_px))
            and 0 < 2 * manifest.tile_overlap_px < manifest.tile_px
            and not any(name in ("", "..") or set(name) & {"/", "\0"} for name in manifest.files)
            and all(name in manifest.files for name in _REQUIRED)
        )
    except (TypeError, ValueError) as error:
        raise _broken(file, error) from error
    if not sound:
        raise _broken(file, "a value is out of its range, or a required file is not named")
    return manifest
