"""Compares the tables with what is expected: images lost, doubled or wrong. It reads and never writes."""

import csv
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.pictures import COUNTS, Counts, counts_of

TIMES = frozenset({"analyzed_at", "elapsed_ms"})
Row = dict[str, str]


@dataclass(slots=True)
class Expected:
    """What the tables must hold in the end.

    Attributes:
        images: For each slide, the contents (SHA-256) that must be counted once, with their counts. Empty
            counts: any counts are right.
        maybe: The same for contents that may be counted once (files that were removed meanwhile).
        failed: For each slide and field that must have failed, the reasons that are right.
        maybe_failed: Slides and fields that may have failed, with the reasons that are right.
        duplicates: For each slide, how many rows must be duplicates. Not checked for others.
    """

    images: dict[str, dict[str, Counts]] = field(default_factory=lambda: defaultdict(dict))
    maybe: dict[str, dict[str, Counts]] = field(default_factory=lambda: defaultdict(dict))
    failed: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    maybe_failed: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)

    @property
    def n_images(self) -> int:
        """Number of images that must be counted."""
        return sum(map(len, self.images.values()))


@dataclass(slots=True)
class Verdict:
    """What is not right.

    Attributes:
        lost: Images without a count, broken files without a row, fields missing in ``slides.csv``.
        doubled: Contents that are counted more than once, too many fields in ``slides.csv``.
        wrong: Counts, reasons, sums or rows that are not right, and tables that differ from the ledger.
        what: The first few of them, in words.
    """

    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    what: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Everything is as it has to be."""
        return not (self.lost or self.doubled or self.wrong)

    def note(self, kind: str, message: str, n: int = 1) -> None:
        """Counts `n` faults of a kind: lost, doubled or wrong."""
        if n > 0:
            setattr(self, kind, getattr(self, kind) + n)
            if len(self.what) < 12:
                self.what.append(f"{kind} {n}: {message}")

    def add(self, other: "Verdict", where: str = "") -> None:
        """Takes another verdict's faults over."""
        self.lost, self.doubled = self.lost + other.lost, self.doubled + other.doubled
        self.wrong += other.wrong
        self.what += [f"{where}{w}" for w in other.what][: max(0, 12 - len(self.what))]


def read_table(path: Path) -> list[Row]:
    """Reads a CSV file. Returns an empty list if there is none yet."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def slide_tables(out: Path) -> dict[str, list[Row]]:
    """The rows of each slide's table, by slide."""
    found: dict[str, list[Row]] = {}
    for path in sorted(out.glob("*.csv")):
        rows = read_table(path)
        if path.name != "slides.csv" and rows:
            found[rows[0]["slide_id"]] = rows
    return found


def n_counted(out: Path) -> int:
    """Fields counted so far, by ``slides.csv``."""
    return sum(int(row["n_fov_ok"]) for row in read_table(out / "slides.csv"))


def n_failed(out: Path) -> int:
    """Fields failed so far, by ``slides.csv``."""
    return sum(int(row["n_fov_failed"]) for row in read_table(out / "slides.csv"))


def judge(out: Path, expected: Expected) -> Verdict:
    """Compares an output folder with what is expected in it."""
    verdict = Verdict()
    tables = slide_tables(out)
    for slide_id in sorted(tables.keys() | expected.images.keys()):
        _judge_slide(verdict, slide_id, tables.get(slide_id, []), expected)
    told = {(slide, row["fov"]): row for slide, rows in tables.items() for row in rows}
    for (slide, fov), reasons in expected.failed.items():
        row = told.get((slide, fov))
        if row is None:
            verdict.note("lost", f"{slide}/{fov} is broken, and has no row")
        elif row["status"] != "failed" or row["failure"] not in reasons:
            said = f"{row['status']} {row['failure']}".strip()
            verdict.note("wrong", f"{slide}/{fov} is {said}, not {'/'.join(reasons)}")
    _judge_sums(verdict, tables, read_table(out / "slides.csv"))
    _judge_ledger(verdict, tables, out / "ledger.sqlite3")
    for left in (*out.glob(".*.tmp"), *out.glob("cells/.*.tmp"), *out.glob("shapes/.*.tmp")):
        verdict.note("wrong", f"{left.name} was left behind")
    return verdict


def _judge_slide(verdict: Verdict, slide: str, rows: Iterable[Row], expected: Expected) -> None:
    must, may = expected.images.get(slide, {}), expected.maybe.get(slide, {})
    times: Counter[str] = Counter()
    names: Counter[str] = Counter()
    n_duplicates = 0
    for row in rows:
        where = f"{slide}/{row['fov']}"
        names[row["fov"]] += 1
        if row["status"] == "ok":
            times[row["sha256"]] += 1
            right = must.get(row["sha256"], may.get(row["sha256"]))
            if right is None:
                verdict.note("wrong", f"{where} counts a content that no finished file has")
            elif right and counts_of(row) != right:
                verdict.note("wrong", f"{where} counts {counts_of(row)}, not {right}")
        elif any(row[name] for name in COUNTS):
            verdict.note("wrong", f"{where} is {row['status']} and has counts")
        elif row["status"] == "duplicate":
            n_duplicates += 1
        elif row["status"] == "failed":
            key = (slide, row["fov"])
            reasons = expected.failed.get(key, expected.maybe_failed.get(key))
            if reasons is None or row["failure"] not in reasons:
                verdict.note("wrong", f"{where} failed: {row['failure']}")
        else:
            verdict.note("wrong", f"{where} has the status {row['status']!r}")
    for sha256, n in times.items():
        verdict.note("doubled", f"{slide}: {sha256[:12]} is counted {n} times", n - 1)
    verdict.note("doubled", f"{slide}: names twice in the table", sum(n - 1 for n in names.values()))
    lost = [sha256 for sha256 in must if not times[sha256]]
    verdict.note("lost", f"{slide}: of {len(must)}, first {(lost or [''])[0][:12]}", len(lost))
    asked = expected.duplicates.get(slide)
    if asked is not None and asked != n_duplicates:
        verdict.note("wrong", f"{slide}: {n_duplicates} duplicates, not {asked}")


def _judge_sums(verdict: Verdict, tables: Mapping[str, list[Row]], slides: list[Row]) -> None:
    by_slide = {row["slide_id"]: row for row in slides}
    verdict.note("doubled", "slides.csv has a slide twice", len(slides) - len(by_slide))
    for slide, rows in tables.items():
        ok = [row for row in rows if row["status"] == "ok"]
        n_bad = sum(row["status"] == "failed" for row in rows)
        told = by_slide.pop(slide, None)
        if told is None:
            if ok or n_bad:
                verdict.note("lost", f"slides.csv does not know {slide}", max(len(ok), 1))
            continue
        n = int(told["n_fov_ok"])
        verdict.note("doubled", f"slides.csv: {slide} has {n} fields, its table {len(ok)}", n - len(ok))
        verdict.note("lost", f"slides.csv: {slide} has {n} fields, its table {len(ok)}", len(ok) - n)
        sums = tuple(sum(counts_of(row)[i] for row in ok) for i in range(len(COUNTS)))
        if ok and counts_of(told) != sums:
            verdict.note("wrong", f"slides.csv: {slide} sums to {counts_of(told)}, its table to {sums}")
        if int(told["n_fov_failed"]) != n_bad:
            verdict.note("wrong", f"slides.csv: {slide} has {told['n_fov_failed']} failed, not {n_bad}")
    for slide in by_slide:
        verdict.note("wrong", f"slides.csv has {slide}, and no table is there")


def _judge_ledger(verdict: Verdict, tables: Mapping[str, list[Row]], path: Path) -> None:
    """The tables show the ledger: both must have the same rows."""
    in_tables = Counter((r["sha256"], r["status"], r["failure"]) for rows in tables.values() for r in rows)
    try:
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)
        try:
            said = db.execute("PRAGMA integrity_check").fetchall()
            rows = db.execute("SELECT sha256, status, failure FROM field").fetchall()
            doubled = db.execute(
                "SELECT count(*) FROM (SELECT 1 FROM field WHERE status = 'ok'"
                " GROUP BY slide_key, sha256 HAVING count(*) > 1)"
            ).fetchone()[0]
        finally:
            db.close()
    except sqlite3.Error as error:
        verdict.note("wrong", f"the ledger cannot be read: {error}")
        return
    if said != [("ok",)]:
        verdict.note("wrong", f"the ledger is damaged: {said[:2]}")
    verdict.note("doubled", "contents counted twice in the ledger", doubled)
    in_ledger = Counter(tuple(row) for row in rows)
    differing = (in_ledger - in_tables) + (in_tables - in_ledger)
    verdict.note("wrong", "rows of the tables and of the ledger differ", differing.total())


# -- byte for byte --------------------------------------------------------------------------------------


def all_tables(out: Path) -> dict[str, list[list[str]]]:
    """Every table of an output folder, header included, without its times."""
    found: dict[str, list[list[str]]] = {}
    for path in sorted([*out.glob("*.csv"), *out.glob("cells/*.csv"), *out.glob("shapes/*.csv")]):
        data = path.read_bytes()
        lines = list(csv.reader(data.decode().splitlines(keepends=True)))
        keep = [i for i, name in enumerate(lines[0]) if name not in TIMES] if lines else []
        # With the last byte: a table that ends in the middle of a line is not the same table.
        found[path.relative_to(out).as_posix()] = [
            *([line[i] for i in keep] for line in lines),
            [repr(data[-1:]), str(b"\r" in data)],
        ]
    return found


def compare(whole: Path, pieces: Path) -> Verdict:
    """Compares all tables with those of an uninterrupted run, byte for byte, times aside."""
    verdict = Verdict()
    right, here = all_tables(whole), all_tables(pieces)
    for name in sorted(right.keys() | here.keys()):
        if name not in here or name not in right:
            verdict.note("wrong", f"{name} is only in one of both")
        elif here[name] != right[name]:
            n = sum((Counter(map(tuple, here[name])) - Counter(map(tuple, right[name]))).values())
            verdict.note("wrong", f"{name}: lines differ from the uninterrupted run's", max(n, 1))
    return verdict


# -- the judge itself -----------------------------------------------------------------------------------


def check_the_judge(out: Path, expected: Expected) -> list[str]:
    """Damages a good result in each way, and returns what the judge did not see.

    Args:
        out: A good output folder. Its tables are changed and restored.
        expected: What it holds.

    Returns:
        The kinds of damage that were not seen. Empty when the judge can be trusted.
    """
    unseen = [] if judge(out, expected).is_clean else ["a good result is called bad"]
    slide = next(iter(expected.images))
    path = next(
        p for p in out.glob("*.csv") if p.name != "slides.csv" and read_table(p)[0]["slide_id"] == slide
    )
    good = path.read_bytes()
    header, first, *rest = good.decode().splitlines(keepends=True)
    values = first.split(",")
    place = {name: i for i, name in enumerate(header.strip().split(","))}
    more = [*values]
    more[place["n_rbc"]] = str(int(more[place["n_rbc"]]) + 1)
    other_name = [*values]
    other_name[place["fov"]] = "another-name"
    broken = {
        "lost": [header, *rest],
        "doubled": [header, first, ",".join(other_name), *rest],
        "wrong": [header, ",".join(more), *rest],
    }
    for kind, lines in broken.items():
        path.write_bytes("".join(lines).encode())
        if not getattr(judge(out, expected), kind):
            unseen.append(kind)
    path.write_bytes(good)
    slides = out / "slides.csv"
    good = slides.read_bytes()
    lines = good.decode().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.split(",")[1] == slide)
    values = lines[at].split(",")
    values[2] = str(int(values[2]) + 1)
    lines[at] = ",".join(values)
    slides.write_bytes("".join(lines).encode())
    if not judge(out, expected).doubled:
        unseen.append("a field too many in slides.csv")
    slides.write_bytes(good)
    return unseen
