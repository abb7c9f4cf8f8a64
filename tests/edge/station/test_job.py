"""Looks: pure work that any executor does, in the order asked for."""

import errno
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from math import inf
from pathlib import Path
from threading import Event

import cv2
import numpy as np
import pytest
from stand_in import BUNDLE_ID, TOY_BUNDLE, StandIn, disks, encoded, tables, write_disks

from rbc_edge.errors import BundleError, ImageError, UnavailableError
from rbc_edge.ops.synthetic import DrawnField
from rbc_edge.station import job
from rbc_edge.station.inbox import scan
from rbc_edge.station.job import (
    MACHINE,
    AnalyzerRecipe,
    Task,
    digest,
    drop_analyzer,
    look_at,
    looks,
    measure,
)
from rbc_edge.station.session import CountOptions, count_once
from rbc_edge.values import FieldOfView, FovResult, InboxFile, Measure, Scale, ScaleSource, UInt8
from rbc_edge.views.refresh import ViewOptions
from rbc_edge.vision import image_file
from rbc_edge.vision.bundle import Bundle

GIVEN = Scale(40.0, ScaleSource.CELL_DIAMETER)


@pytest.fixture
def files(tmp_path: Path) -> tuple[InboxFile, ...]:
    for i in range(6):
        write_disks(tmp_path / "camera" / f"{i}.png", i + 1, seed=i)
    return scan([tmp_path / "camera"]).files


@pytest.fixture
def recipe() -> Iterator[AnalyzerRecipe]:
    made = AnalyzerRecipe(BUNDLE_ID, StandIn)
    yield made
    drop_analyzer(made)


def test_a_look_gives_cells_digest_and_time(files: tuple[InboxFile, ...], recipe: AnalyzerRecipe) -> None:
    look = look_at(Task(files[2], GIVEN, recipe))
    assert look.result is not None
    assert (look.file, look.failure, len(look.result.cells)) == (files[2], "", 3)
    assert len(look.sha256) == 64
    assert look.elapsed_ms > 0
    known = look_at(Task(files[2], GIVEN, recipe, frozenset({look.sha256})))
    assert (known.result, known.failure, known.sha256) == (None, "", look.sha256)


def test_a_failure_is_data(files: tuple[InboxFile, ...], recipe: AnalyzerRecipe) -> None:
    files[0].path.write_bytes(b"no image")
    look = look_at(Task(files[0], GIVEN, recipe))
    assert (look.result, look.failure) == (None, "not-an-image")
    assert len(look.sha256) == 64  # so that the broken file is known under another name
    files[1].path.unlink()
    assert look_at(Task(files[1], GIVEN, recipe)).failure == "vanished"


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no libGL"),
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError("can't start new thread"),
    ],
)
def test_what_the_computer_lacks_is_no_failure_of_an_image(
    files: tuple[InboxFile, ...], error: Exception
) -> None:
    def make() -> StandIn:
        raise error

    recipe = AnalyzerRecipe(BUNDLE_ID, make)
    with pytest.raises(UnavailableError, match="now"):
        look_at(Task(files[0], GIVEN, recipe))
    with pytest.raises(UnavailableError, match="now"):
        measure(with_digests(files), 0, inf, recipe)


def test_too_many_open_files_is_no_failure_of_the_image_that_met_it(
    files: tuple[InboxFile, ...], recipe: AnalyzerRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UnavailableError, match="Too many open files"):
        look_at(Task(files[0], GIVEN, recipe))
    with pytest.raises(UnavailableError, match="Too many open files"):
        measure([(file, "") for file in files], 0, inf, recipe)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        cv2.error("(-4:Insufficient memory) Failed to allocate 9 bytes"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_short_memory_leaves_an_image_for_later(
    files: tuple[InboxFile, ...], recipe: AnalyzerRecipe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(StandIn, "analyze", refuse)
    look = look_at(Task(files[0], GIVEN, recipe))
    assert (look.failure, look.result) == (MACHINE, None)
    assert "0.png: not enough memory" in look.message
    monkeypatch.setattr(image_file, "_eight_bit", refuse)
    found = measure(with_digests(files), 0, inf, recipe)
    assert all(look.measure is None and "not enough memory" in look.message for look in found)
    monkeypatch.undo()
    monkeypatch.setattr(StandIn, "measure", refuse)
    with pytest.raises(UnavailableError, match="scale of a slide cannot be estimated now: not enough memory"):
        measure(with_digests(files), 0, inf, recipe)


def test_looks_come_in_order_and_only_a_few_are_begun_ahead(
    files: tuple[InboxFile, ...], recipe: AnalyzerRecipe
) -> None:
    begun: list[str] = []

    def tasks() -> Iterator[Task]:
        for file in files:
            begun.append(file.fov)
            yield Task(file, GIVEN, recipe)

    with ThreadPoolExecutor(2) as executor:
        seen = []
        for look in looks(tasks(), executor, n_ahead=2):
            seen.append(look.file.fov)
            assert len(begun) <= len(seen) + 2
    assert seen == [file.fov for file in files]


def test_nothing_behind_a_barrier_is_begun_before_what_is_in_front_of_it(
    files: tuple[InboxFile, ...], recipe: AnalyzerRecipe
) -> None:
    order: list[str] = []

    def tasks() -> Iterator[Task | None]:
        for i, file in enumerate(files):
            if i == 3:
                yield None
            order.append(f"begin {file.fov}")
            yield Task(file, GIVEN, recipe)
            if i == 3:
                yield None

    with ThreadPoolExecutor(2) as executor:
        coming = looks(tasks(), executor, n_ahead=4)
        order.extend(f"end {look.file.fov}" for look in coming)
    assert order.index("begin 3") > order.index("end 2")
    assert order.index("begin 4") > order.index("end 3")


def test_work_that_is_no_longer_wanted_is_cancelled(files: tuple[InboxFile, ...]) -> None:
    may_end = Event()
    analyzed: list[str] = []

    class Gated(StandIn):
        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            analyzed.append(field.fov)
            if field.fov != "0":
                may_end.wait(30)
            return super().analyze(field, scale)

    recipe = AnalyzerRecipe(BUNDLE_ID, Gated)
    with ThreadPoolExecutor(1) as executor:
        coming = looks([Task(f, GIVEN, recipe) for f in files], executor, n_ahead=3)
        assert next(coming).file.fov == "0"
        coming.close()
        may_end.set()
    assert set(analyzed) <= {"0", "1"}
    drop_analyzer(recipe)


def test_tasks_and_recipes_travel_between_processes(files: tuple[InboxFile, ...]) -> None:
    recipe = AnalyzerRecipe.of(Bundle.open(TOY_BUNDLE), threads=1)
    task = Task(files[0], GIVEN, recipe)
    assert pickle.loads(pickle.dumps(task)) == task


def test_a_bundle_that_changed_on_disk_is_refused(tmp_path: Path) -> None:
    bundle = Bundle.open(TOY_BUNDLE)
    recipe = AnalyzerRecipe.of(bundle, threads=1)
    make = recipe.make
    object.__setattr__(make, "bundle_id", "0" * 16)
    with pytest.raises(BundleError, match="it is bundle"):
        make()
    with pytest.raises(BundleError, match="fp32"):
        AnalyzerRecipe.of(bundle, precision="fp32")


def test_an_estimate_passes_over_what_cannot_be_read(
    files: tuple[InboxFile, ...], recipe: AnalyzerRecipe
) -> None:
    files[1].path.write_bytes(b"broken")
    files[2].path.write_bytes(encoded(disks(1, seed=7)))
    asked = [(files[0], digest(files[0])), (files[1], digest(files[1])), (files[2], "another one")]
    found = measure(asked, 0, inf, recipe)
    assert [(look.file, look.measure) for look in found] == [
        (files[0], Measure(40.0, 9, 240 * 360)),
        (files[1], None),
        (files[2], None),
    ]
    assert not any(look.message for look in found)


def test_no_more_is_measured_than_is_asked(files: tuple[InboxFile, ...], recipe: AnalyzerRecipe) -> None:
    assert len(measure(with_digests(files), 0, 1.5 * 240 * 360, recipe)) == 2


def test_an_image_that_cannot_be_measured_says_nothing_and_spoils_no_other(
    files: tuple[InboxFile, ...],
) -> None:
    class Fragile(StandIn):
        def measured(self, image: UInt8, start: int) -> Measure:
            if np.array_equal(image, bad):
                raise ArithmeticError("too many cells")
            return super().measured(image, start)

    bad = image_file.load_field(files[1].path, "", "").image
    found = measure(with_digests(files[:3]), 0, inf, AnalyzerRecipe(BUNDLE_ID, Fragile))
    assert [look.measure.n_cells for look in found if look.measure] == [9, 0, 9]


def with_digests(files: tuple[InboxFile, ...]) -> list[tuple[InboxFile, str]]:
    return [(file, digest(file)) for file in files]


@pytest.mark.slow
def test_threads_and_processes_give_the_same_tables(
    tmp_path: Path, drawn_fields: tuple[DrawnField, ...]
) -> None:
    """The toy bundle, scale estimated, a broken image and a copy: by one thread, by threads, by processes."""
    camera = tmp_path / "camera"
    for slide in ("a", "b"):
        (camera / slide).mkdir(parents=True)
        for i, field in enumerate(drawn_fields):
            done, data = cv2.imencode(".png", field.image[:, :, ::-1])
            assert done
            (camera / slide / f"{i}.png").write_bytes(data.tobytes())
    (camera / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (camera / "b" / "copy.png").write_bytes((camera / "b" / "2.png").read_bytes())
    recipe = AnalyzerRecipe.of(Bundle.open(TOY_BUNDLE), threads=1)

    def count(name: str, executor: Executor | None, workers: int) -> dict[str, list[dict[str, str]]]:
        options = CountOptions(
            tmp_path / name, recipe, workers=workers, views=ViewOptions(cells=True, overlays=False)
        )
        summary = count_once([camera], options, executor=executor)
        assert (summary.n_counted, summary.n_failed, summary.n_duplicates) == (12, 1, 1)
        return tables(tmp_path / name)

    alone = count("alone", None, 1)
    with ThreadPoolExecutor(3) as threads:
        assert count("threads", threads, 3) == alone
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        assert count("processes", processes, 2) == alone
    assert sum(len(rows) for name, rows in alone.items() if name.startswith("cells/")) > 50


def test_few_bytes_of_many_pixels_are_one_large_image(
    tmp_path: Path, recipe: AnalyzerRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in (40, 3000):
        cv2.imwrite(str(tmp_path / f"{side}.png"), np.zeros((side, side), np.uint8))
    assert (tmp_path / "3000.png").stat().st_size < 100_000
    alone = {}

    def load_field(path: Path, *_: object, **__: object) -> None:
        alone[path.stem] = job._ONE_LARGE.locked()
        raise ImageError("empty", "")

    monkeypatch.setattr(image_file, "load_field", load_field)
    for file in scan([tmp_path]).files:
        look_at(Task(file, GIVEN, recipe))
    assert alone == {"40": False, "3000": True}
