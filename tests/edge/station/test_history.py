"""Results do not depend on history: whatever happened on the way, the tables are those of a clean run.

The scale is the real estimate, of drawn fields with cells of several sizes. `RBC_EDGE_TEST_HISTORIES` is how
many histories are tried: a thousand take a while.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_in import TOY_BUNDLE, encoded, tables

from rbc_edge.errors import UnavailableError
from rbc_edge.ops.synthetic import CREAM, draw_slide
from rbc_edge.station.inbox import UNFINISHED, scan
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, Session, count_once
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.schema import Database
from rbc_edge.values import FieldOfView, FovResult, InboxFile, Measure, Scale, ScaleSource, UInt8
from rbc_edge.views.refresh import ViewOptions
from rbc_edge.views.tables import Tables
from rbc_edge.vision import scale
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle

N_HISTORIES = int(os.environ.get("RBC_EDGE_TEST_HISTORIES", "40"))
SIZES_PX = (28, 31, 34, 36, 38, 40, 42, 45, 50, 56)
SLIDES = ("s1", "s2")
FOVS = "abcdefgh"


class Remembering:
    """The real analyzer of the toy bundle, asked once for each content: its answer is always the same."""

    def __init__(self) -> None:
        self.analyzer = Analyzer(Bundle.open(TOY_BUNDLE), threads=1)
        self.measures: dict[tuple[bytes, int], Measure] = {}
        self.results: dict[tuple[bytes, float, ScaleSource], FovResult] = {}
        self.no_memory_for: Collection[bytes] = ()
        self.n_asked = 0

    def measure(self, images: Sequence[UInt8], start: int, /) -> list[Measure]:
        return [self._measured(image, start) for image in images]

    def _measured(self, image: UInt8, start: int) -> Measure:
        key = self._key(image), start
        if key not in self.measures:
            self.measures[key] = self.analyzer.measure([image], start)[0]
        return self.measures[key]

    def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
        px = scale.cell_diameter_px
        key = self._key(field.image), px if px > 0 else 0.0, scale.source
        if key not in self.results:
            self.results[key] = self.analyzer.analyze(field, scale)
        return self.results[key]

    def _key(self, image: UInt8) -> bytes:
        self.n_asked += 1
        key = sha256(image.tobytes()).digest()
        if key in self.no_memory_for:
            raise MemoryError
        return key


@cache
def analyzer() -> Remembering:
    return Remembering()


@cache
def contents() -> list[tuple[bytes, bytes]]:
    """Image files of fields with cells of several sizes, and of one without; each with its pixels' digest."""
    images = [np.full((96, 128, 3), 225, np.uint8)]
    for px in SIZES_PX:
        rng, size = np.random.default_rng(px), {"width_px": 260, "height_px": 200}
        images += [
            f.image for f in draw_slide(rng, 1, **size, cell_diameter_px=px, crowding=0.3, stain=CREAM)
        ]
    return [(encoded(image), sha256(image.tobytes()).digest()) for image in images]


class Killed(BaseException):
    """What SIGKILL is to a process: nothing is cleaned up that matters."""


@contextmanager
def killed_at(n: int | None) -> Iterator[None]:
    """Ends what runs inside before the n-th change, commit or table."""
    if n is None:
        yield
        return
    left = [n]

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for owner, name in (
            (Database, "change"),
            (Database, "commit"),
            (Database, "commit_lightly"),
            (Tables, "write_slide"),
            (Tables, "write"),
        ):
            patches.enter_context(patch.object(owner, name, dying(getattr(owner, name))))
        with suppress(Killed):
            yield


@contextmanager
def unreadable(paths: Collection[Path]) -> Iterator[None]:
    real = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path in paths:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    with patch.object(Path, "open", refuse):
        yield


@dataclass
class World:
    """A camera's folder, results, and what lies where."""

    base: Path
    files: dict[Path, bytes] = field(default_factory=dict)
    # Files of which the ledger may know the content in another place: to lose them would be to lose a count.
    only_here: set[Path] = field(default_factory=set)
    replaced: set[Path] = field(default_factory=set)  # what the ledger may know there is another content
    n_processes: int = 0

    @property
    def camera(self) -> Path:
        return self.base / "camera"

    @property
    def out(self) -> Path:
        return self.base / "out"

    def path(self, place: tuple[str, str]) -> Path:
        return self.camera / place[0] / f"{place[1]}.png"

    def pick(self, which: int) -> Path | None:
        files = sorted(self.files)
        return files[which % len(files)] if files else None

    def write(self, path: Path, data: bytes) -> None:
        if path not in self.only_here:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            if self.files.get(path, data) != data:
                self.replaced.add(path)
            self.files[path] = data

    def copy(self, which: int, place: tuple[str, str]) -> None:
        if (path := self.pick(which)) is not None:
            self.write(self.path(place), self.files[path])

    def move(self, which: int, place: tuple[str, str]) -> None:
        """Renames a file, maybe into another slide, where it is not yet."""
        old, new = self.pick(which), self.path(place)
        if old is None or old in self.replaced or new in self.files:
            return
        is_known = any(p.parent == new.parent and data == self.files[old] for p, data in self.files.items())
        if old.parent != new.parent and is_known:
            return
        new.parent.mkdir(parents=True, exist_ok=True)
        old.rename(new)
        self.files[new] = self.files.pop(old)
        self.only_here.discard(old)
        self.only_here.add(new)

    def delete_copy(self, which: int) -> None:
        """Removes one of several files of one content in a slide."""
        places = [(path.parent, data) for path, data in self.files.items()]
        copies = [p for p in sorted(self.files) if places.count((p.parent, self.files[p])) > 1]
        copies = [p for p in copies if p not in self.replaced]
        if copies:
            path = copies[which % len(copies)]
            alike = {p for p in self.files if (p.parent, self.files[p]) == (path.parent, self.files[path])}
            path.unlink()
            del self.files[path]
            self.only_here = (self.only_here | alike) - {path}

    # -- who counts -----------------------------------------------------------------------------------

    def options(self, out: Path | None = None) -> CountOptions:
        return CountOptions(
            out or self.out,
            AnalyzerRecipe("toy", analyzer),
            views=ViewOptions(cells=True),
            sandbox=lambda *_: True,
        )

    @contextmanager
    def process(self, kill: int | None, hidden: int, no_memory: int) -> Iterator[None]:
        """A process that may be killed, not be allowed to read some files, and be short of memory for one."""
        self.n_processes += 1
        hidden_files = {p for i, p in enumerate(sorted(self.files)) if hidden >> i & 1}
        analyzer().no_memory_for = {contents()[no_memory][1]} if no_memory < len(contents()) else ()
        with (
            patch("rbc_edge.store.ledger._PROCESS", f"process {self.n_processes}"),
            unreadable(hidden_files),
            killed_at(kill),
        ):
            yield
        analyzer().no_memory_for = ()

    def run(
        self, slide: str | None = None, *, kill: int | None = None, hidden: int = 0, no_memory: int = 99
    ) -> None:
        folder = self.camera / slide if slide else self.camera
        if any(p.is_relative_to(folder) for p in self.files):
            with self.process(kill, hidden, no_memory):
                count_once([folder], self.options())
        if slide is None and kill is None and not hidden and no_memory == 99:
            self.only_here.clear()
            self.replaced.clear()

    def watch(
        self, ready: int, *, is_short: bool, kill: int | None = None, hidden: int = 0, no_memory: int = 99
    ) -> None:
        """A round of the service: some files are complete, and time may be short."""
        if not self.files:
            return
        self.out.mkdir(exist_ok=True)
        files = scan([self.camera]).files
        of_slide: dict[str, list[InboxFile]] = {}
        for file in files:
            of_slide.setdefault(file.slide_id, []).append(file)
        with (
            self.process(kill, hidden, no_memory),
            Session(
                self.options(), Ledger(self.out), may_wait=lambda _, failure: failure in UNFINISHED
            ) as session,
        ):
            some = session.plan([f for i, f in enumerate(files) if ready >> i & 1]).to_do
            session.count(some, of_slide=of_slide, time_s=0 if is_short else inf)

    def retry(self) -> None:
        if self.out.is_dir():
            with Ledger(self.out) as ledger:
                ledger.retry()
                ledger.commit()


PLACES = st.tuples(st.sampled_from(SLIDES), st.sampled_from(FOVS))
CONTENTS = st.integers(0, len(SIZES_PX))
WHICH = st.integers(0, 15)
MASK = st.integers(0, 2**16 - 1)  # of the files, by their order
TROUBLE: st.SearchStrategy[dict[str, int]] = st.one_of(
    st.just({}),
    st.just({}),
    st.fixed_dictionaries({"kill": st.integers(0, 60)}),
    st.fixed_dictionaries({"hidden": MASK}),
    st.fixed_dictionaries({"no_memory": CONTENTS}),
)
Step = tuple[str, dict[str, Any]]


def step(name: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.tuples(st.just(name), st.fixed_dictionaries(arguments))


ARRIVALS = step("arrive", some=st.lists(st.tuples(PLACES, CONTENTS), min_size=3, max_size=8))
EVENTS = st.one_of(
    ARRIVALS,
    step("part", place=PLACES, content=CONTENTS, share=st.sampled_from((0.0, 0.5, 0.95))),
    step("copy", which=WHICH, place=PLACES),
    step("move", which=WHICH, place=PLACES),
    step("delete_copy", which=WHICH),
    step("retry"),
)
COUNTS = st.one_of(
    step("run", slide=st.just(None) | st.sampled_from(SLIDES), trouble=TROUBLE),
    step("watch", ready=MASK | st.just(-1), is_short=st.booleans(), trouble=TROUBLE),
)
# Files come, and something happens to them, and they are counted, more or less: some times over.
ROUNDS = st.tuples(ARRIVALS | EVENTS, st.lists(EVENTS, max_size=3), COUNTS)
WHOLE_RUN: Step = ("run", {"slide": None})
# In the end all is counted, and then maybe only names change.
QUIET = st.lists(EVENTS.filter(lambda event: event[0] in ("move", "copy", "delete_copy")), max_size=3)
HISTORIES = st.tuples(st.lists(ROUNDS, min_size=1, max_size=4), QUIET).map(
    lambda parts: [
        *(step for first, others, last in parts[0] for step in (first, *others, last)),
        *((WHOLE_RUN, *parts[1]) if parts[1] else ()),
    ]
)


def live_through(world: World, history: Sequence[Step]) -> None:
    for name, how in history:
        if name == "arrive":
            for place, content in how["some"]:
                world.write(world.path(place), contents()[content][0])
        elif name == "part":
            data = contents()[how["content"]][0]
            world.write(world.path(how["place"]), data[: int(len(data) * how["share"])])
        else:
            trouble = how.get("trouble", {})
            try:
                getattr(world, name)(**{k: v for k, v in how.items() if k != "trouble"}, **trouble)
            except UnavailableError:
                assert "no_memory" in trouble


@contextmanager
def a_world() -> Iterator[World]:
    memory = Path("/dev/shm")  # a disk would be asked for certainty a thousand times
    base = tempfile.mkdtemp(dir=memory if memory.is_dir() else None)
    try:
        yield World(Path(base))
    finally:
        shutil.rmtree(base)


def ends_like_a_clean_run(world: World) -> None:
    world.run()
    expected = clean(world)
    assert tables(world.out) == expected
    n_asked = analyzer().n_asked
    assert count_once([world.camera], world.options()).n_counted == 0
    assert (analyzer().n_asked, tables(world.out)) == (n_asked, expected)


def clean(world: World) -> dict[str, list[dict[str, str]]]:
    out = world.base / "clean"
    shutil.rmtree(out, ignore_errors=True)
    count_once([world.camera], world.options(out))
    return tables(out)


@settings(
    max_examples=N_HISTORIES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(history=HISTORIES)
def test_tables_are_those_of_a_clean_run_whatever_happened(history: list[Step]) -> None:
    # Half of the usual number: then a slide of a few fields has more than are asked.
    with patch.object(scale, "MAX_FIELDS", 4), a_world() as world:
        live_through(world, history)
        if world.files:
            ends_like_a_clean_run(world)
