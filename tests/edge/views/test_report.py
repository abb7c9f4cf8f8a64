"""The pages: whole and well-formed, safe whatever a name holds, without a request, not too large."""

import base64
import io
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from math import nan
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stand_in import disks, encoded, write_disks

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import Look, Version
from rbc_edge.values import (
    SHAPES,
    Cells,
    Detections,
    FieldOfView,
    FovResult,
    InboxFile,
    Morphology,
    Scale,
    ScaleSource,
    Shape,
)
from rbc_edge.views import figures, gallery, report
from rbc_edge.views.report import Reports
from rbc_edge.views.tables import summarize
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.image_file import load_field
from rbc_edge.vision.quality import FLAGS

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
_VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}
_SVG = {"rect", "line", "ellipse", "circle", "path", "text", "g", "title", "svg"}


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed in its order. Keeps what a browser would use."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _SVG
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style",):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def pictures(self) -> list[dict[str, str]]:
        return self.all("img")

    def check(self, page: Path) -> None:
        """What holds for every page."""
        assert self.source.startswith("<!doctype html>")
        assert self.all("html")[0]["lang"] == "en"
        assert len(self.all("h1")) == 1
        assert "script" not in dict(self.tags)
        assert not any(name.startswith("on") for _, attrs in self.tags for name in attrs)
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(set(ids)) == len(ids)
        for _, attrs in self.tags:
            assert "srcset" not in attrs
            assert attrs.get("src", "data:").startswith("data:")
            href = attrs.get("href", "#")
            if href.startswith("#"):
                assert href[1:] in [*ids, ""]
            elif not href.startswith("data:"):
                assert not re.match(r"[a-z+]*:|//", href)
        assert "url(" not in self.source and "@import" not in self.source
        assert all(attrs["alt"] for attrs in self.pictures())
        policy = next(m["content"] for m in self.all("meta") if m.get("http-equiv"))
        assert policy.startswith("default-src 'none'")
        assert "Not a medical device" in self.text


class Desk:
    """A ledger, its output folder and a camera's folder. Counts are invented, images are real."""

    def __init__(self, folder: Path) -> None:
        self.camera, self.out = folder / "camera", folder / "out"
        self.out.mkdir()
        self.ledger = Ledger(self.out)
        self.n_images = 0

    def ok(
        self,
        slide_id: str,
        fov: str,
        n: int = 4,
        n_overlapping: int = 2,
        *,
        image: bytes | None = None,
        flags: tuple[str, ...] = (),
        captured_at: str = "",
        morphology: Morphology | None = None,
    ) -> Path:
        path = self.camera / f"{self.n_images}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.n_images += 1
        if image is None:
            write_disks(path, 3, seed=self.n_images)
        else:
            path.write_bytes(image)
        field = load_field(path, slide_id, fov)
        self.count(slide_id, fov, path, field.sha256, n, n_overlapping, flags, captured_at, morphology)
        return path

    def count(
        self,
        slide_id: str,
        fov: str,
        path: Path,
        sha256: str,
        n: int,
        n_overlapping: int,
        flags: tuple[str, ...] = (),
        captured_at: str = "",
        morphology: Morphology | None = None,
        *,
        at: str = "2026-11-23T11:00:00Z",
    ) -> None:
        overlapping = np.arange(n) < n_overlapping
        start = (np.arange(n, dtype=np.float32) * 7)[:, None]
        cells = Cells(
            Detections(
                np.hstack([start, start, start + 40, start + 40]).astype(np.float32),
                np.full(n, 0.9, np.float32),
                np.zeros(n, np.int64),
            ),
            np.full(n, 0.5, np.float32),
            overlapping,
            overlapping.astype(np.int64),
            np.zeros((n, 4), np.bool_),
            morphology or Morphology.unknown(n),
        )
        scale = Scale(40.0, ScaleSource.SLIDE) if n else Scale(nan, ScaleSource.NONE)
        result = FovResult(360, 240, scale, cells, flags)
        self.record(slide_id, fov, path, at=at, sha256=sha256, captured_at=captured_at, result=result)

    def failed(self, slide_id: str, fov: str, path: Path = Path("/camera/x.png")) -> None:
        message = f"{path}: the image is cut short (copy it again)"
        self.record(slide_id, fov, path, sha256=f"sha of {fov}", failure="truncated", message=message)

    def record(
        self, slide_id: str, fov: str, path: Path, *, at: str = "2026-11-23T11:00:00Z", **look: object
    ) -> None:
        file = InboxFile(path, slide_id, fov, 1, 1)
        self.ledger.record(
            Look(file, elapsed_ms=12.0, **look),  # type: ignore[arg-type]
            Version("b1", "x"),
            at,
            force=True,
        )

    def reports(self, **options: object) -> Reports:
        self.ledger.commit()
        return Reports(self.out, self.ledger.reader, now=lambda: NOW, **options)  # type: ignore[arg-type]

    def page(self, slide: str = "s", **options: object) -> Page:
        self.reports(**options).write()
        path = self.out / "reports" / f"{slide}.html"
        page = Page(path)
        page.check(path)
        return page


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    with made.ledger:
        yield made


def test_a_pipe_at_the_name_of_a_page_is_replaced(desk: Desk) -> None:
    desk.ok("s", "a", 4, 2)
    (desk.out / "reports").mkdir()
    os.mkfifo(desk.out / "reports" / "s.html")
    assert "4" in desk.page().text


def test_a_page_says_the_counts_shows_the_fields_and_where_they_come_from(desk: Desk) -> None:
    desk.ok("s", "a", 4, 2)
    desk.ok("s", "b", 10, 3)
    page = desk.page()
    assert "14" in page.text and "35.7\xa0%" in page.text
    assert "2 fields of view counted" in page.text
    assert [p["alt"].split(" with")[0] for p in page.pictures()] == ["b", "a"]  # the most crowded first
    assert "10 red cells: 7 single, 3 overlapping; 0 white, 0 platelets" in page.text
    for fact in ("b1", "red cell 40.0 px, estimated from the slide", "360 x 240 px", "2026-11-23T12:00:00Z"):
        assert fact in page.text
    index = Page(desk.out / "reports" / "index.html")
    index.check(desk.out / "reports" / "index.html")
    assert {"href": "s.html"} in index.all("a")


def test_what_failed_is_flagged_or_unlike_the_others_comes_first(desk: Desk) -> None:
    for i in range(9):
        desk.ok("s", f"f{i}", 20, 10)
    desk.ok("s", "flagged", 20, 10, flags=("no-red-cells", "one-of-tomorrow"))
    desk.ok("s", "few", 1, 1)
    desk.ok("s", "lonely", 20, 1)
    desk.failed("s", "broken")
    page = desk.page()
    first = page.text[page.text.index("Look at these first") : page.text.index("Along the slide")]
    assert first.index("broken") < first.index("flagged")
    assert "failed: truncated" in first and "the image is cut short (copy it again)" in first
    assert "No red cell was found" in first
    assert "one-of-tomorrow" in first  # a flag without words is still shown
    assert "far fewer red cells than the other fields of this slide: 1 (usual: about 20)" in first
    assert "far less overlap than the other fields of this slide: 5.0\xa0% (usual: about 50.0\xa0%)" in first
    assert "f3" not in first
    shown = [p["alt"].split(" with")[0] for p in desk.page(images=3).pictures()]
    assert sorted(shown) == ["few", "flagged", "lonely"]


def test_a_note_is_said_and_is_no_reason_to_look(desk: Desk) -> None:
    for i in range(3):
        desk.ok("s", f"f{i}", 20, 10, flags=("round-field",))
    text = desk.page().text
    assert "Nothing: no image failed, no field has a quality flag" in text
    assert re.search(r"round-field\s*, 3 fields", text)
    assert "a black surround" in text
    assert not re.search(r"\d flagged", Page(desk.out / "reports" / "index.html").text)


def test_fields_to_check_that_lie_close_together_are_said(desk: Desk) -> None:
    for i in range(12):
        desk.ok("s", f"f{i}", flags=("blurred",) if 4 <= i < 7 else ())
    assert (
        "3 of these 3 fields lie close together, between f4 and f6. Check this part of the slide."
        in desk.page().text
    )


def test_what_does_not_fit_is_counted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_MAX_FIRST", 2)
    monkeypatch.setattr(report, "_MAX_TABLE_ROWS", 3)
    for i in range(4):
        desk.ok("s", f"f{i}", 20, 15, flags=("blurred",))
    desk.failed("s", "broken")
    page = desk.page(images=1)
    assert "And 2 more. They are in the table of all fields" in page.text
    assert "Table of 5 fields. Only the first 3 are here" in page.text
    assert "1 of 4 fields are shown" in page.text and "The other 3 are in the table below." in page.text
    assert "blurred, 4 fields" in page.text and page.text.count(FLAGS["blurred"]) == 1
    assert "4 groups of 12+ cells" in page.source and "in 4 groups of 2 or more" in page.text
    index = Page(desk.out / "reports" / "index.html")
    assert "1 failed" in index.text and "4 flagged" in index.text


def test_names_are_text_whatever_they_hold(desk: Desk) -> None:
    evil = "<script>alert(1)</script>\u202e&\"'\x07"
    desk.ok(evil, evil)
    desk.failed(evil, "</main><img src=x onerror=y>", Path("/camera/<b>.png"))
    pages = desk.reports().write()
    page = Page(pages[0])
    page.check(pages[0])
    assert "<script>alert(1)</script>\\u202e&\"'\\x07" in page.text
    index = desk.out / "reports" / "index.html"
    Page(index).check(index)
    assert [a for a in Page(index).all("a") if a["href"].endswith(".html")]


def test_without_its_image_a_field_is_shown_without_picture(desk: Desk) -> None:
    gone, other, empty = (desk.ok("s", fov) for fov in ("gone", "other", "empty"))
    gone.unlink()
    other.write_bytes(encoded(disks(6, seed=77)))
    empty.write_bytes(b"")
    page = desk.page()
    assert page.pictures() == []
    assert f"no picture: the image is no longer at {gone}" in page.text
    assert "the file now holds another image" in page.text
    assert "the file is empty" in page.text
    assert page.text.count("4 red cells: 2 single, 2 overlapping") == 3


def test_a_slide_without_cells_and_one_without_a_counted_field(desk: Desk) -> None:
    desk.ok("empty", "a", 0, 0)
    desk.failed("broken", "a")
    page = desk.page("empty")
    assert "0 red cells: 0 single" in page.text
    assert "nan" not in page.text.lower()
    assert "No field of view of this slide could be counted." in desk.page("broken").text


def test_an_empty_ledger_has_an_index_that_says_so(desk: Desk) -> None:
    assert desk.reports().write() == []
    index = desk.out / "reports" / "index.html"
    Page(index).check(index)
    assert "No image has been counted yet." in Page(index).text


def test_a_thousand_fields_stay_within_their_size(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (240, 360, 3), np.uint8)  # the largest file
    path = desk.ok("s", "0000", 30, 9, image=encoded(noise))
    field = load_field(path, "s", "0")
    for i in range(1, 1000):
        desk.count("s", f"{i:04}", path.with_name(f"{i}.png"), f"{i}", 30 + i % 7, 9)
    monkeypatch.setattr(gallery, "MAX_BYTES", 400_000)
    # Every row shows the same picture, under its own checksum.
    own = {path: field.sha256}
    monkeypatch.setattr(
        gallery, "load_field", lambda image, *_: replace(field, sha256=own.get(image, image.stem))
    )
    page = desk.page(images=40)
    assert len(page.source) < 400_000 + 600 * 1000
    shown = len(page.pictures())
    assert 1 <= shown < 40
    assert f"{shown} of 1000 fields are shown" in page.text


def test_a_page_that_shows_the_ledger_is_left_alone_and_gives_its_pictures_to_the_next(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.ok("s", "a")
    [page] = desk.reports().write()
    before = page.stat().st_ino
    assert desk.reports().write() == [page]
    assert page.stat().st_ino == before

    desk.ok("s", "b", 9)
    looked: list[str] = []

    def looking(path: Path, slide_id: str, fov: str, page: int) -> FieldOfView:
        looked.append(fov)
        return load_field(path, slide_id, fov, page)

    monkeypatch.setattr(gallery, "load_field", looking)
    assert len(desk.page().pictures()) == 2
    assert looked == ["b"]
    assert page.stat().st_ino != before


def test_a_page_goes_with_its_slide(desk: Desk) -> None:
    path = desk.ok("s", "a")
    reports = desk.reports()
    [page] = reports.write()
    desk.failed("t", "a", path)  # another slide claims the file
    [other] = reports.write()
    assert other.name == "t.html"
    assert not page.exists()
    desk.ledger.database.connection.execute("DELETE FROM field")
    assert reports.write() == []
    assert not other.exists()
    assert "No image has been counted yet." in Page(reports.index).text


def test_only_some_slides_and_one_that_is_not_there(desk: Desk) -> None:
    desk.ok("s1", "a")
    desk.ok("s2", "a")
    assert [p.name for p in desk.reports().write(["s2"])] == ["s2.html"]
    index = Page(desk.out / "reports" / "index.html")
    assert [a["href"] for a in index.all("a") if "." in a["href"]] == ["s2.html"]
    assert "s1" in index.text
    with pytest.raises(UsageError, match=r"'s3'.*did you mean s2, s1"):
        desk.reports().write(["s3"])


def test_a_slide_called_index_does_not_take_the_index(desk: Desk) -> None:
    desk.ok("Index", "a")
    [page] = desk.reports().write()
    assert page.name.startswith("Index-") and page.suffix == ".html"
    assert {"href": page.name} in Page(desk.out / "reports" / "index.html").all("a")


def test_the_index_puts_failures_first_then_slides_unlike_the_others(desk: Desk) -> None:
    for i in range(9):
        desk.ok(f"s{i}", "a", 20, 10)
    desk.ok("odd", "a", 20, 1)
    desk.ok("broken", "a", 20, 10)
    desk.failed("broken", "b")
    desk.reports().write()
    links = [a["href"] for a in Page(desk.out / "reports" / "index.html").all("a") if "." in a["href"]]
    assert links[:3] == ["broken.html", "odd.html", "s0.html"]


def test_counts_follow_the_edge_rule(desk: Desk) -> None:
    desk.ok("s", "a", 4, 2)
    assert "inside: cells that touch the border are not counted" in desk.page(edges=EdgeRule.INSIDE).text


def test_fields_lie_along_the_slide_as_captured_or_by_number(desk: Desk) -> None:
    for fov in ("f10", "f9", "f1"):
        desk.ok("s", fov)
    assert re.search(r"from f1 to f10\.", desk.page().source)
    for fov, when in (("a", "2026-01-01T10:00:02"), ("b", "2026-01-01T10:00:01")):
        desk.ok("t", fov, captured_at=when)
    page = desk.page("t")
    assert "from b to a." in page.source and "in order of capture" in page.text


def test_an_end_asked_for_leaves_the_page_of_before(desk: Desk) -> None:
    desk.ok("s", "a")
    [page] = desk.reports().write()
    before = page.read_bytes()
    desk.ok("s", "b")
    assert desk.reports().write(keep_going=lambda: False) == []
    assert page.read_bytes() == before
    assert list(page.parent.glob(".*")) == []


def test_a_folder_that_cannot_be_written_is_reported(desk: Desk) -> None:
    desk.ok("s", "a")
    (desk.out / "reports").write_bytes(b"")
    with pytest.raises(UnavailableError, match="cannot write the reports"):
        desk.reports().write()


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([], []),
        ([3], ["3"]),
        ([0, 1, 2], ["0", "1", "2"]),
        ([5, 40], ["0-19", "20-39", "40-59"]),
        (list(range(100, 200)), [f"{n}-{n + 9}" for n in range(100, 200, 10)]),
    ],
)
def test_histograms_have_round_bins(values: list[int], labels: list[str]) -> None:
    bars = figures.histogram(values)
    assert list(bars) == labels
    assert sum(bars.values()) == len(values)


def test_more_pictures_are_smaller_ones() -> None:
    sides = [gallery.side_px(n) for n in (0, 1, 50, 364, 5000)]
    assert sides == sorted(sides, reverse=True)
    assert sides[1] == 1600 and sides[3] >= 640


def test_the_sentence_of_a_flag_is_said_once_with_the_list_of_its_fields(desk: Desk) -> None:
    for i in range(30):
        desk.ok("s", f"f{i}", 20, 10, flags=("blurred", "dark") if i < 20 else ())
    page = desk.page()
    assert page.text.count(FLAGS["blurred"]) == page.text.count(FLAGS["dark"]) == 1
    first = page.text[page.text.index("Look at these first") : page.text.index("Along the slide")]
    names = re.findall(r"f\d+", first.partition("blurred, 20 fields")[2].partition("dark, 20 fields")[0])
    assert names == [f"f{i}" for i in range(20)]


def test_what_needs_a_look_can_be_shown_alone_and_is_printed_first(desk: Desk) -> None:
    for i in range(40):
        desk.ok("s", f"f{i}", 4 + i, 2, flags=("blurred",) if i < 5 else ())
    page = desk.page()
    figures_ = {a["id"]: a["class"].split() for a in page.all("figure")}
    assert [number for number, names in figures_.items() if "look" in names] == ["f5", "f4", "f3", "f2", "f1"]
    printed = [number for number, names in figures_.items() if "paper" in names]
    assert len(printed) == 12 and {"f1", "f2", "f3", "f4", "f5", "f40"} <= set(printed)
    assert sum(a.get("class") == "look" for a in page.all("tr")) == 5
    assert {"flagged", "bare", "rows"} == {a["id"] for a in page.all("input")}
    assert "Only the 5 fields that need a look" in page.text
    assert "#flagged:checked ~ .gallery figure:not(.look)" in page.source


def test_a_picture_is_bare_and_its_outlines_lie_over_it(desk: Desk) -> None:
    path = desk.ok("s", "a", 4, 2)
    page = desk.page()
    (picture,) = page.pictures()
    data = base64.b64decode(picture["src"].partition(",")[2])
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    image = load_field(path, "s", "a").image
    assert shown.shape == image.shape and np.abs(shown - image).mean() < 3
    paths = {a["class"]: a["d"] for a in page.all("path")}
    assert paths.keys() == {"l-single", "l-overlapping", "l-group"}
    assert paths["l-single"].count("z") == 0 and paths["l-single"].count("M") == 2
    assert paths["l-overlapping"].startswith("M0 20a20 20 0 1 0 40 0a20 20 0 1 0 -40 0M7 ")
    assert re.search(r"\.shot path \{[^}]*vector-effect: non-scaling-stroke", page.source)


def test_outlines_have_the_form_of_their_kind() -> None:
    cells = Cells(
        Detections(
            np.array([[10, 20, 30, 50], [60, 60, 90, 80]], np.float32),
            np.full(2, 0.9, np.float32),
            np.array([1, 2], np.int64),
        ),
        np.full(2, nan, np.float32),
        np.zeros(2, np.bool_),
        np.zeros(2, np.int64),
        np.zeros((2, 4), np.bool_),
    )
    assert gallery.outlines(cells) == {
        "white": "M10 20h20v30h-20z",
        "platelet": "M60 70a15 10 0 1 0 30 0a15 10 0 1 0 -30 0",
    }
    assert gallery.outlines(Cells.empty()) == {}


def test_a_page_says_of_too_few_fields_what_a_run_says(desk: Desk) -> None:
    desk.ok("s", "a", 20, 9)
    desk.ok("s", "b", 20, 4)
    page = desk.page()
    rows = list(desk.ledger.reader.fields("s"))
    said = summarize("s", rows, EdgeRule.ALL).advice_on_fields
    assert said.startswith("2 fields with 40 red cells. The overlap can be anything from")
    assert f"Too few fields: {said}" in page.text
    assert "too few fields" in Page(desk.out / "reports" / "index.html").text


def test_a_long_name_breaks_behind_its_signs(desk: Desk) -> None:
    desk.ok("slide_17-a", "field_003.b")
    page = desk.page("slide_17-a")
    assert "<h1>slide_<wbr>17-<wbr>a</h1>" in page.source
    assert "<strong>field_<wbr>003.<wbr>b</strong>" in page.source


def shaped(*names: Shape, unsure: int = 1) -> Morphology:
    n = len(names)
    shape = np.array([SHAPES.index(name) for name in names], np.int64)
    columns = (np.full(n, 900.0) + np.arange(n) * 100, np.full(n, 1.2), np.full(n, 0.9), np.full(n, 0.1))
    sure = np.arange(n) >= unsure
    return Morphology(shape, np.full(n, 0.7, np.float32), sure, *(c.astype(np.float32) for c in columns))


def test_sizes_and_shapes_with_examples(desk: Desk) -> None:
    form = shaped(Shape.BURR, Shape.NORMAL, Shape.NORMAL, Shape.BURR, Shape.TARGET)
    desk.ok("s", "a", 5, 0, morphology=form)
    page = desk.page()
    assert "4 cells judged. The ICSH asks for 1,000" in page.text
    assert "echinocyte" in page.text and "target cell" in page.text
    examples = [p for p in page.pictures() if "in a" in p["alt"]]
    assert [p["alt"] for p in examples] == [
        *["normal red cell, 0.70, in a"] * 2,
        *("target cell, 0.70, in a", "echinocyte, 0.70, in a", "doubtful echinocyte, 0.70, in a"),
    ]
    # Each kind of point has letters, not only a colour.
    assert page.source.count('class="letters"') == 2
    assert "of the median: 1 cell" in page.text
    # Another version of the page takes the pictures of this one.
    before = [p["src"] for p in examples]
    (desk.camera / "0.png").unlink()
    desk.ok("s", "b", 4, 2)
    again = desk.page()
    assert [p["src"] for p in again.pictures() if "in a" in p["alt"]] == before


def test_a_shape_that_a_person_said_is_the_most_certain_and_has_no_probability(desk: Desk) -> None:
    form = shaped(*[Shape.TARGET] * 6)
    form.shape_score[:] = 0.9, 0.8, 0.7, 0.6, 0.95, nan
    form.shape_sure[:] = True
    desk.ok("s", "a", 6, 0, morphology=form)
    examples = [p["alt"] for p in desk.page().pictures() if "target" in p["alt"]]
    assert examples == [f"target cell, {score}, in a" for score in ("corrected", "0.95", "0.90", "0.80")]


def test_a_page_follows_where_the_same_bundle_counts_again_and_only_forms_differ(desk: Desk) -> None:
    path = desk.ok("s", "a", 4, 0, morphology=shaped(*[Shape.TARGET] * 4))
    assert "target cell Ta" in desk.page().text
    field = load_field(path, "s", "a")
    later = "2026-11-23T11:30:00Z"
    desk.count("s", "a", path, field.sha256, 4, 0, morphology=shaped(*[Shape.BURR] * 4), at=later)
    page = desk.page()
    assert "echinocyte Bu" in page.text and later in page.text


def test_an_unfamiliar_slide_has_its_shares_in_grey_with_the_reason(desk: Desk) -> None:
    names = (Shape.NORMAL,) * 4
    desk.ok("s", "a", 4, 0, morphology=shaped(*names), flags=("unfamiliar",))
    desk.ok("s", "b", 4, 0, morphology=shaped(*names), flags=("unfamiliar",))
    desk.ok("s", "c", 4, 0, morphology=shaped(*names))
    page = desk.page()
    assert 'class="shapes doubted"' in page.source
    assert "Do not rely on these shares." in page.text and FLAGS["unfamiliar"] in page.text
    assert "3 cells judged" in page.text


def test_without_form_there_is_no_such_part(desk: Desk) -> None:
    desk.ok("s", "a")
    assert "Sizes and shapes" not in desk.page().text
