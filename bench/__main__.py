"""How fast and how small the station is, compared with other ways to count: ``make bench``.

The ways that are compared are called sides. They are `rbc-edge run`, `yolo predict` with our detector (the
rival), and the floor, which is decoding and both networks and nothing else. All sides work on the same
images and take turns. Each measurement is a process of its own, on as many cores as it has threads. Without
torch and ultralytics the sides that need them are left out, and the output says why.

This is a program and not a test. Only figures of the same run can be compared.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from bench import children
from bench.children import ROOT, ChildError, module, station
from bench.figures import Sample, Spread, plain, rates, ratio, table, targets

BCCD: Final = ROOT.parent / "shared" / "data" / "bccd" / "JPEGImages"
BUNDLE: Final = ROOT / "edge" / "rbc_edge" / "bundles" / "default"
OURS: Final = "rbc-edge run"
FLOOR: Final = "floor"
YOLO: Final = {
    "yolo PyTorch 640": ("detector.pt", 640),
    "yolo ONNX 640": ("detector.onnx", 640),
    "yolo ONNX 640, free sides": ("free.onnx", 640),
    "yolo PyTorch 256": ("detector.pt", 256),
}
"""Weights and imgsz for `yolo predict`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        fields: Fields of view of our side.
        fewer: Fields of view of the other sides. They are slower, and rates are compared, not times.
        mosaics: Side length in fields, and how many mosaics of it.
        threads: Numbers of threads, each on as many cores. The targets are for the last one.
        rounds: Turns of every side on the fields.
        mosaic_rounds: The same on the mosaics.
        inside_rounds: Turns of the stages, of the start and of ``--help``.
        growth: Numbers of tiny images.
        latency_files: Files that the service is given.
    """

    fields: int = 364
    fewer: tuple[tuple[str, int], ...] = (
        ("yolo PyTorch 640", 40),
        ("yolo ONNX 640", 60),
        ("yolo ONNX 640, free sides", 60),
        ("yolo PyTorch 256", 120),
        (FLOOR, 120),
    )
    mosaics: tuple[tuple[int, int], ...] = ((2, 16), (4, 8), (8, 4))
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 4
    mosaic_rounds: int = 3
    inside_rounds: int = 3
    growth: tuple[int, ...] = (100, 1000, 10_000, 100_000)
    latency_files: int = 10


QUICK: Final = Plan(
    fields=120,
    fewer=(("yolo PyTorch 640", 12), ("yolo ONNX 640", 24), ("yolo PyTorch 256", 60), (FLOOR, 60)),
    mosaics=((2, 3), (8, 2)),
    threads=(2,),
    rounds=2,
    mosaic_rounds=1,
    inside_rounds=2,
    growth=(30, 100, 1000),
    latency_files=3,
)

ALL_STAGES, ELAPSED = "all of these", "elapsed"

Key = tuple[str, str, int]  # side, images, threads


class Bench:
    """One run of the benchmark. Its results are in `found`.

    Args:
        plan: How much is measured.
        source: Folder of photographs. None: fields are drawn.
        base: An empty folder for everything that is made.
    """

    def __init__(self, plan: Plan, source: Path | None, base: Path) -> None:
        self.plan = plan
        self.found: dict[str, Any] = {"machine": machine()}
        self.samples: dict[Key, list[Sample]] = defaultdict(list)
        self._base = base
        self._n_out = 0
        self._cells: dict[str, float] = {}  # by folder, from the preparation of the floor
        (base / "config.toml").write_text("", encoding="utf-8")
        say("preparing the images")
        command = module("images", base / "images", *([source] if source else []), "--fields", plan.fields)
        command += ["--mosaics", *(f"{side}x{n}" for side, n in plan.mosaics)]
        command += ["--some", *sorted({str(n) for _, n in plan.fewer})]
        self.found["images"] = children.run(command, threads=2).json()
        self.found["images"]["source"] = source.name if source else "drawn"
        self.sides = [OURS, FLOOR]
        self._make_rival()

    # -- the sides ------------------------------------------------------------------------------------

    def _make_rival(self) -> None:
        """Rebuilds the weights for `yolo predict`, or notes why this side is left out."""
        missing = [m for m in ("torch", "ultralytics", "onnx") if importlib.util.find_spec(m) is None]
        if missing:
            self.found["left_out"] = (
                f"yolo predict: {', '.join(missing)} not installed; `make bench` installs it"
            )
            return
        say("rebuilding the detector for yolo predict")
        (self._base / "rival").mkdir()
        command = module("rival", BUNDLE, self._base / "rival", self._folder("yolo PyTorch 640"))
        self.found["rival"] = children.run(command, threads=2, env=self._yolo_env).json()
        self.sides[1:1] = [name for name in YOLO if name in dict(self.plan.fewer)]

    @property
    def _yolo_env(self) -> dict[str, str]:
        return {"YOLO_CONFIG_DIR": str(self._base)}  # nothing of it stays in the user's folders

    def _folder(self, side: str, images: str = "fields") -> Path:
        n = dict(self.plan.fewer).get(side) if images == "fields" else None
        return self._base / "images" / (images if n is None else f"{images}-{n}")

    def measure(self, side: str, images: str, threads: int) -> None:
        """Measures one side once: over a folder, and over one image of it. The second time is the start."""
        folder = self._folder(side, images)
        n = len(list(folder.iterdir()))
        if side == FLOOR:
            file = self._prepared(folder)
            ran = children.run(module("inside", "floor", file, "--threads", threads), threads=threads)
            told = ran.json()
            self.found.setdefault("floor", {}).setdefault(f"{images}, {threads} threads", []).append(told)
            sample = Sample(n, told["ms"] * n / 1e3, 0.0, self._cells[folder.name], ran.peak_rss_mb)
        else:
            alone = self._once(side, self._base / "images" / f"{images}-one", threads)
            ran = self._once(side, folder, threads)
            sample = Sample(n, ran.wall_s, alone.wall_s, self._n_cells(side, images, n, ran), ran.peak_rss_mb)
        self.samples[side, images, threads].append(sample)

    def _once(self, side: str, folder: Path, threads: int) -> children.Ran:
        if side == OURS:
            return children.run(self.ours(folder, threads, "--json", "--quiet"), threads=threads)
        weights, size = YOLO[side]
        here = str(Path(sys.executable).parent)
        yolo = shutil.which("yolo", path=os.pathsep.join([here, os.environ.get("PATH", "")]))
        command = [yolo or "yolo", "predict", f"model={self._base / 'rival' / weights}", f"imgsz={size}"]
        command += [f"source={folder}", "save=False", "verbose=False", "device=cpu"]
        return children.run(command, threads=threads, env=self._yolo_env)

    def ours(self, folder: Path, threads: int, *more: str) -> list[str]:
        """The command of our side, with an output folder of its own."""
        self._n_out += 1
        command = [*station(), "run", str(folder), "--out", str(self._base / f"out-{self._n_out}"), *more]
        return [*command, "--threads", str(threads), "--config", str(self._base / "config.toml")]

    def _n_cells(self, side: str, images: str, n: int, ran: children.Ran) -> float:
        if side == OURS:
            kinds = ("n_rbc", "n_wbc", "n_platelets")
            return float(sum(slide[kind] or 0 for slide in ran.json()["slides"] for kind in kinds))
        if images != "fields":
            return 0.0  # it shrinks a mosaic to one input and finds almost nothing; only its time is compared
        return float(self.found["rival"]["boxes_per_field"][str(YOLO[side][1])]) * n

    def _prepared(self, folder: Path) -> Path:
        file = self._base / f"{folder.name}.npz"
        if not file.exists():
            told = children.run(module("inside", "prepare", folder, file), threads=2).json()
            self._cells[folder.name] = told["cells"]
        return file

    # -- what is measured -----------------------------------------------------------------------------

    def fields(self) -> None:
        """Times all sides on the fields, on one and on two threads."""
        self._prepared(self._folder(FLOOR))
        for side in self.sides[:-1]:  # once untimed: files and programs are in memory after that
            self._once(side, self._base / "images" / "fields-one", 2)
        for i in range(self.plan.rounds):
            for threads in self.plan.threads:
                say(f"fields, round {i + 1} of {self.plan.rounds}, threads: {threads}")
                for side in self.sides:
                    self.measure(side, "fields", threads)

    def mosaics(self) -> None:
        """Times our side, the usual rival and the floor on large images, on two threads."""
        usual = [side for side in self.sides if side in (OURS, "yolo PyTorch 640", FLOOR)]
        for i in range(self.plan.mosaic_rounds):
            for k, _ in self.plan.mosaics:
                say(f"mosaics of {k}x{k} fields, round {i + 1} of {self.plan.mosaic_rounds}")
                for side in usual:
                    self.measure(side, f"mosaic-{k}", 2)

    def stages(self) -> None:
        """Measures which stage of our side takes how long."""
        told: dict[str, dict[str, list[float]]] = {}
        for i in range(self.plan.inside_rounds):
            for threads in self.plan.threads:
                say(f"stages, round {i + 1} of {self.plan.inside_rounds}, threads: {threads}")
                command = module("inside", "stages", self._folder(FLOOR), "--threads", threads)
                one = children.run(command, threads=threads).json()
                into = told.setdefault(str(threads), defaultdict(list))
                for stage, ms in one["ms"].items():
                    into[stage].append(ms)
                into[ALL_STAGES].append(sum(one["ms"].values()))
                into[ELAPSED].append(one["elapsed_ms"])
        self.found["stages_ms"] = {
            threads: {stage: Spread.of(ms) for stage, ms in by_stage.items()}
            for threads, by_stage in told.items()
        }

    def start(self) -> None:
        """Times the start of the process to the first count, and to the end of ``--help``."""
        say("start-up")
        took: dict[str, list[float]] = defaultdict(list)
        for _ in range(2 * self.plan.inside_rounds + 1):
            took["first_count"].append(self._first_count_s(self._folder(OURS)))
            took["first_count_of_one"].append(self._first_count_s(self._base / "images" / "fields-one"))
            took["help"].append(children.run([*station(), "--help"], threads=2).wall_s)
            took["python"].append(children.run([sys.executable, "-c", "pass"], threads=2).wall_s)
        self.found["start_s"] = {name: Spread.of(values) for name, values in took.items()}

    def _first_count_s(self, folder: Path) -> float:
        started_s = time.perf_counter()
        child = children.start(self.ours(folder, 2, "--verbose"), threads=2, stderr=subprocess.PIPE)
        assert child.stderr is not None
        lines = []
        for line in child.stderr:
            lines.append(line)
            if line.startswith(b"ok "):
                took_s = time.perf_counter() - started_s
                child.send_signal(signal.SIGTERM)
                child.stderr.read()
                child.wait()
                return took_s
        child.wait()
        raise ChildError(f"rbc-edge run counted nothing of {folder}: {b''.join(lines)[-500:]!r}")

    def growth(self) -> None:
        """Measures what an image costs with more images, and with more cells in it."""
        say(f"up to {self.plan.growth[-1]:,} tiny images")
        numbers = [str(n) for n in self.plan.growth]
        self.found["growth_images"] = children.run(
            module("growth", "images", "--n", *numbers), threads=2
        ).json()
        say("more and more cells")
        command = module("growth", "cells", "--rounds", 2 * self.plan.inside_rounds + 1)
        self.found["growth_cells"] = children.run(command, threads=2).json()

    def latency(self) -> None:
        """Times a file from its closing in the watched folder to its row in the table."""
        say("watch")
        file = self._base / "latency.json"
        children.run(module("latency", "--files", self.plan.latency_files, "--json", file), threads=2)
        self.found["watch_latency"] = json.loads(file.read_text(encoding="utf-8"))

    def size(self) -> None:
        """Measures the station's size on the disk, by installed package."""
        self.found["installed_mb"] = installed_mb()

    def conclude(self) -> dict[str, Any]:
        """Compares everything with the targets. Returns all figures."""
        ours = self.samples.get((OURS, "fields", 2), [])
        floor = self.samples.get((FLOOR, "fields", 2), [])
        of_mosaics = {
            images: samples
            for (side, images, _), samples in self.samples.items()
            if side == OURS and images != "fields"
        }
        start, sizes = self.found.get("start_s", {}), self.found.get("installed_mb", {})
        measured = {
            "over": {
                side: ratio(ours, self.samples[side, "fields", 2])
                for side in self.sides
                if side in YOLO and (side, "fields", 2) in self.samples
            },
            "floor": ratio(floor, ours) if ours else None,
            "first_count_s": start.get("first_count"),
            "help_s": start.get("help"),
            "rss_mb": max((s.peak_rss_mb for s in ours), default=None),
            "rss_20_mb": max((s.peak_rss_mb for s in of_mosaics.get("mosaic-8", [])), default=None),
            "installed_mb": sum(sizes.values()) or None,
            "images": self.found.get("growth_images"),
        }
        self.found["targets"] = targets(measured)
        self.found["samples"] = {", ".join(map(str, key)): value for key, value in self.samples.items()}
        return self.found

    # -- printing -------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """The tables."""
        images = self.found["images"]
        width, height = images["fields"]["px"]
        told = [
            f"{self.found['machine']}",
            f"{images['fields']['n']} fields of {width}x{height} ({images['source']}); median (least-most) of"
            f" {self.plan.rounds} rounds in turns; one thread on one core, two on two; start-up taken off",
        ]
        if "left_out" in self.found:
            told.append(f"left out: {self.found['left_out']}")
        told += ["", *self._side_lines(), "", *self._stage_lines(), "", *self._other_lines(), ""]
        rows = [
            (t.name, t.target, t.measured, "-" if t.reached is None else "yes" if t.reached else "NO")
            for t in self.found["targets"]
        ]
        return [*told, table(("target", "asked", "measured", "reached"), rows, left=3)]

    def _side_lines(self) -> list[str]:
        rows = []
        for (side, images, threads), samples in sorted(
            self.samples.items(), key=lambda item: (item[0][1], item[0][2], self.sides.index(item[0][0]))
        ):
            seconds = Spread.of([s.one_s for s in samples])
            rate, cells = Spread.of(rates(samples)), samples[0].cells / samples[0].n
            whole = Spread.of([s.per_s_with_start for s in samples])
            megapixels = self.found["images"][images]["megapixels"]
            rows.append(
                (
                    f"{megapixels:.1f} MP" if images != "fields" else "fields",
                    side,
                    str(threads),
                    str(samples[0].n),
                    rate.show(),
                    f"{rate.median * cells:.0f}" if cells else "-",
                    f"{1e3 / rate.median / megapixels:.1f}",
                    f"{whole.median:.1f}" if side != FLOOR else "-",
                    f"{seconds.median:.1f}" if side != FLOOR else "-",
                    f"{max(s.peak_rss_mb for s in samples):.0f}" if side != FLOOR else "-",
                )
            )
        head = ("images", "side", "threads", "n", "images/s", "cells/s", "ms a MP")
        return [table((*head, "images/s with start", "one image, s", "peak RSS, MB"), rows, left=2)]

    def _stage_lines(self) -> list[str]:
        stages = self.found.get("stages_ms")
        if not stages:
            return []
        first = next(iter(stages.values()))
        names = sorted((n for n in first if n not in (ALL_STAGES, ELAPSED)), key=lambda n: -first[n].median)
        rows = [
            (name, *(by_name[name].show(2) if name in by_name else "-" for by_name in stages.values()))
            for name in [*names, ALL_STAGES, ELAPSED]
        ]
        floors = [
            f"floor, {name}: {told[0]['best']}; alone: "
            + ", ".join(f"{part} {ms:.1f}" for part, ms in told[0]["parts"].items())
            + f" ms; decoded at 1/{told[0]['reductions'][-1]}"
            for name, told in self.found.get("floor", {}).items()
            if told[0]["parts"]
        ]
        return [table(("inside, ms a field", *(f"threads: {t}" for t in stages)), rows), "", *floors]

    def _other_lines(self) -> list[str]:
        told = []
        if "start_s" in self.found:
            words = {
                "first_count": "process start to the first count of the folder",
                "first_count_of_one": "the same, of a folder with one image",
                "help": "rbc-edge --help",
                "python": "python that does nothing",
            }
            told += [f"{words[k]}: {v.show(2)} s" for k, v in self.found["start_s"].items()]
        if "watch_latency" in self.found:
            late = self.found["watch_latency"]
            told.append(
                f"watch, file closed to row in the table: {late['median_s']:.2f} s,"
                f" worst {late['worst_s']:.2f} of {late['files']}"
            )
        if "installed_mb" in self.found:
            sizes = sorted(self.found["installed_mb"].items(), key=lambda item: -item[1])
            told.append(f"installed, MB: {', '.join(f'{k} {v:.1f}' for k, v in sizes if v >= 0.1)}")
        if "growth_images" in self.found:
            rows = [
                (f"{row['n']:,.0f}", *(f"{row[k]:.2f}" for k in list(row)[1:]))
                for row in self.found["growth_images"]
            ]
            head = ("images", "a run", "run again", "one more: ledger", "one more: CSV")
            told += ["", "ms an image, no networks, a hundred to a slide", table(head, rows, left=0)]
        if "growth_cells" in self.found:
            cells = self.found["growth_cells"]
            rows = [(f"{c['cells']:.0f}", f"{c['ms']:.1f}", f"{c['ms'] / c['cells']:.2f}") for c in cells]
            told += [
                "",
                "drawn fields of 1280x960",
                table(("cells a field", "ms a field", "ms a cell"), rows, left=0),
            ]
        return told


def machine() -> str:
    """The machine and the versions, in one line."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("model name", "Model")):
            name = line.partition(":")[2].strip()
            break
    parts = [f"{name}, {len(os.sched_getaffinity(0))} cores, {platform.machine()}"]
    parts.append(f"Python {platform.python_version()}")
    for package in ("onnxruntime", "opencv-python-headless", "pillow", "torch", "ultralytics"):
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def installed_mb() -> dict[str, float]:
    """Size of the station on the disk, in MB of 1e6 bytes: the package and what it needs, without Python."""
    from packaging.requirements import Requirement  # noqa: PLC0415  ONNX Runtime brings it

    sizes = {"rbc-edge": sum(_file_size(p) for p in (ROOT / "edge" / "rbc_edge").rglob("*"))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = list(project["dependencies"])
    while waiting:
        requirement = Requirement(waiting.pop())
        name = requirement.name.lower().replace("_", "-")
        if name in sizes or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError as error:
            raise ChildError(f"the station needs {name}, which is not installed") from error
        # Compiled modules are added, because not every installer lists them.
        files = {Path(str(file.locate())) for file in found.files or []}
        files |= {Path(importlib.util.cache_from_source(str(f))) for f in files if f.suffix == ".py"}
        sizes[name] = sum(map(_file_size, files))
        waiting += found.requires or []
    return {name: size / 1e6 for name, size in sizes.items()}


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


PARTS: Final = ("fields", "mosaics", "stages", "start", "growth", "latency", "size")


_STARTED_S: Final = time.perf_counter()


def say(words: str) -> None:
    """Says on standard error what is done now, with the seconds since the start."""
    print(f"{time.perf_counter() - _STARTED_S:4.0f} s  {words}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--images", type=Path, help="Folder of fields.  [default: BCCD's from ../shared, else drawn]"
    )
    parser.add_argument("--quick", action="store_true", help="A rough measurement in under three minutes.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="Only these parts.")
    parser.add_argument("--json", type=Path, help="Also write all figures to this file.")
    asked = parser.parse_args(arguments)
    source = asked.images or (BCCD if BCCD.is_dir() else None)
    if source is not None and not source.is_dir():
        parser.error(f"{source}: no such folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    try:
        with tempfile.TemporaryDirectory(prefix="rbc-edge-bench-") as name:
            bench = Bench(QUICK if asked.quick else Plan(), source, Path(name))
            for part in PARTS:
                if part in asked.only:
                    getattr(bench, part)()
            figures = bench.conclude()
            print("\n".join(bench.lines()))
    except ChildError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if asked.json:
        asked.json.write_text(json.dumps(plain(figures), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
