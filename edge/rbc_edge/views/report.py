"""Writes a page for each slide and an index of the slides: HTML files that show the ledger.

``reports/<slide>.html`` holds its pictures inside itself. It runs no script and loads nothing. Fields that
need a look come first. The text of the pages is in ``templates/``, their figures are in `figures`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

from rbc_edge import __version__
from rbc_edge.errors import unavailable
from rbc_edge.store.outdir import replacing
from rbc_edge.store.queries import Reader
from rbc_edge.store.rows import FieldRow, Status
from rbc_edge.text import count_text, in_order, local_text, natural_key, one_line, path_text, utc_text
from rbc_edge.values import ScaleSource
from rbc_edge.views import examples, figures, gallery, shapes
from rbc_edge.views.figures import PageField, Reason
from rbc_edge.views.names import REPORTS, file_names, old_files, on_disk, overlay_paths, page_names
from rbc_edge.views.overlay import digest, row_key, threshold_texts
from rbc_edge.views.tables import SlideSummary, known_shapes, summarize
from rbc_edge.vision.bundle import Manifest
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.quality import FLAGS, warnings

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_KeepGoing = Callable[[], bool]

IMAGES: Final = 400  # pictures in a slide's page if the user gives no other number
_PAGE: Final = 3  # another version writes all pages again
_CONTENT: Final = re.compile(rb'<meta name="rbc-edge-content" content="([0-9a-f]{16})">')
_HEAD_BYTES: Final = 2048
_MAX_TABLE_ROWS: Final = 3000
_MAX_FIRST: Final = 60  # of a kind; the other ones are in the table
_MAX_PRINTED: Final = 12  # pictures


class SlideLine(NamedTuple):
    """A slide as the index shows it. `unusual_*` are 0 if it does not differ much from the other slides."""

    name: str
    page: str
    summary: SlideSummary
    unusual_overlap: float = 0.0
    unusual_count: float = 0.0


@dataclasses.dataclass(eq=False)
class Reports:
    """Keeps the pages of one output folder up to date.

    A page is replaced completely or not at all. It is not touched while it shows what the ledger says. A
    new version takes the pictures of the old one, so one more field costs only one more picture. The manifest
    of the installed bundle gives the thresholds of fields that this bundle counted.
    """

    out: Path
    ledger: Reader
    _: dataclasses.KW_ONLY
    edges: EdgeRule = EdgeRule.ALL
    images: int = IMAGES  # pictures in a page, at most
    manifest: Manifest | None = None
    new: bool = True  # False: only pages that exist
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    _lines: dict[str, SlideLine] = dataclasses.field(default_factory=dict, init=False)

    @property
    def index(self) -> Path:
        """The path of the index."""
        return self.out / REPORTS / "index.html"

    def write(
        self, slide_ids: Collection[str] | None = None, *, keep_going: _KeepGoing = lambda: True
    ) -> list[Path]:
        """Writes pages of slides (None: all), and the index of all slides. Returns the pages.

        `keep_going` is asked before each picture. False ends the work early, and old pages stay. Raises
        `UsageError` where the ledger does not know one of these slides, and `UnavailableError` where pages
        cannot be written: the old ones are intact.
        """
        slides = self.ledger.slide_ids()
        names, page_of = file_names(slides), page_names(slides)
        for slide_id in slide_ids or ():
            self.ledger.check_known(slide_id)
        pages: list[Path] = []
        folder = self.index.parent
        advice = "check permissions and free space; the counts are kept in the ledger"
        with unavailable(f"{path_text(folder)}: cannot write the reports", advice):
            for slide_id, name in names.items():
                page = folder / on_disk(page_of[slide_id])
                wanted = (slide_ids is None or slide_id in slide_ids) and (self.new or page.exists())
                if not wanted and slide_id in self._lines:
                    continue
                rows = list(self.ledger.fields(slide_id))
                if not rows:  # its images are in another slide now
                    self._lines.pop(slide_id, None)
                    page.unlink(missing_ok=True)
                    continue
                summary = summarize(slide_id, rows, self.edges)
                if wanted and not self._write_slide(name, rows, summary, page, keep_going):
                    return pages
                pages += [page] * wanted
                self._lines[slide_id] = SlideLine(one_line(slide_id), page_of[slide_id], summary)
            stems = {slide_id: name.removesuffix(".html") for slide_id, name in page_of.items()}
            for old in old_files(folder, stems, ".html"):
                old.unlink()
            self._write_index()
        return pages

    def _write_slide(
        self, name: str, rows: list[FieldRow], summary: SlideSummary, page: Path, keep_going: _KeepGoing
    ) -> bool:
        """Writes a page if it is out of date. Returns False if it was ended early."""
        unusual = figures.unusual_fields(rows, self.edges)
        fields = [self._field(i, row, unusual.get(row.fov, ())) for i, row in enumerate(rows, 1)]
        counted = [field for field in fields if field.row.status is Status.OK]
        shown = sorted(counted, key=lambda f: (not f.reasons, -f.crowding, f.number))[: self.images]
        side_px = gallery.side_px(len(shown))
        overlays = overlay_paths(self.out, name, [field.row.fov for field in counted])
        for field in shown:
            if (overlay := overlays[field.row.fov]).exists():
                field.overlay = _url(f"../{path_text(overlay.relative_to(self.out))}")
        key = self._key(rows, shown, side_px)
        if _content_key(page) == key:
            return True
        old = gallery.old_pictures(page)
        if not self._put_pictures(summary.slide_id, shown, side_px, old, keep_going):
            return False
        of_fov = {row.fov: row for row in rows}
        cells = [(of_fov[fov], c) for fov, c in self.ledger.cells(summary.slide_id) if fov in of_fov]
        named = {shape for b in summary.bundle_ids for shape in known_shapes(self.ledger, b)}
        forms = examples.of_slide(cells, named)
        crops = examples.pictures(of_fov, forms.examples, old, keep_going)
        if crops is None:
            return False
        for field in [field for field in shown if field.is_in_gallery][:_MAX_PRINTED]:
            field.is_printed = True
        in_order, order = figures.in_order(fields)
        self._render(
            "slide.html.j2",
            page,
            key,
            title=one_line(summary.slide_id),
            summary=summary,
            n_duplicates=sum(row.status is Status.DUPLICATE for row in rows),
            n_first=sum(bool(field.reasons) for field in fields),
            failed=[field for field in fields if field.row.status is Status.FAILED],
            flagged={flag: _with(fields, flag) for flag in summary.flags},
            unusual=[f for f in fields if any(each.kind in ("count", "overlap") for each in f.reasons)],
            most=_MAX_FIRST,
            cluster=figures.cluster(in_order),
            n_rbc_bars=figures.histogram([field.counts.n_rbc for field in counted if field.counts]),
            group_bars=figures.group_sizes(c for _, c in cells),
            forms=forms,
            crops=crops,
            is_unfamiliar=summary.flags.get("unfamiliar", 0) > summary.n_fov_ok / 2,
            strip=figures.strip(in_order) if counted else [],
            order=order,
            gallery=sorted((f for f in shown if f.is_in_gallery), key=lambda f: (-f.crowding, f.number)),
            n_left_out=sum(not field.is_in_gallery for field in counted),
            table=fields[:_MAX_TABLE_ROWS],
            n_fields=len(fields),
            csv=_url(f"../{name}.csv"),
            sources=self._sources(rows, summary),
        )
        return True

    def _field(self, number: int, row: FieldRow, unusual: tuple[Reason, ...]) -> PageField:
        counts = row.counts.get(self.edges)
        reasons = (
            (*(Reason("flag", flag) for flag in warnings(row.quality_flags)), *unusual) if counts else ()
        )
        if row.status is Status.FAILED:
            reasons = (Reason("failed", one_line(row.message.removeprefix(f"{path_text(row.path)}: "))),)
        crowding = float(counts.n_rbc) if counts else 0.0
        if row.scale and not isnan(row.scale.cell_diameter_px) and row.width_px and row.height_px:
            crowding *= row.scale.cell_diameter_px**2 / (row.width_px * row.height_px)
        path = one_line(path_text(row.path))
        return PageField(number, one_line(row.fov), path, row, counts, reasons, crowding)

    def _put_pictures(
        self,
        slide_id: str,
        shown: Sequence[PageField],
        side_px: int,
        old: Mapping[str, gallery.EmbeddedPicture],
        keep_going: _KeepGoing,
    ) -> bool:
        """Gives fields their pictures until the page is full. Returns False if it was ended early."""
        keys = {field.row.fov: f"{digest(field.row.sha256)}-{side_px}" for field in shown}
        outlines = {fov: gallery.outlines(c) for fov, c in self.ledger.cells(slide_id) if fov in keys}
        left_bytes = gallery.MAX_BYTES
        for field in shown:
            if not keep_going():
                return False
            key, field.outlines = keys[field.row.fov], outlines.get(field.row.fov, {})
            field.picture = old.get(key)
            if field.picture is None:
                field.picture, field.note = gallery.embed(field.row, key, side_px)
            left_bytes -= (
                len(field.picture.base64) + sum(map(len, field.outlines.values())) if field.picture else 0
            )
            if left_bytes < 0:
                break
            field.is_in_gallery = True
        return True

    def _key(self, rows: Sequence[FieldRow], shown: Sequence[PageField], side_px: int) -> str:
        """Changes when the page has to."""
        thresholds = {t for row in rows for t in threshold_texts(row.version.bundle_id, self.manifest)}
        return digest(
            *(_PAGE, __version__, self.edges, self.images, side_px, sorted(thresholds)),
            *(
                # The time of the count, because forms are in no key, and the page says it.
                (row_key(r, self.edges), r.status, r.message, r.captured_at, r.analyzed_at, path_text(r.path))
                for r in rows
            ),
            *((field.number, field.overlay, field.row.path.exists()) for field in shown),
        )

    def _sources(self, rows: Sequence[FieldRow], summary: SlideSummary) -> dict[str, Any]:
        """Returns what the counts come from."""
        counted = [row for row in rows if row.status is Status.OK]
        kept = self.ledger.slide_scale(summary.slide_id)
        analyzed = [row.analyzed_at for row in rows]
        return {
            "thresholds": {b: threshold_texts(b, self.manifest) for b in summary.bundle_ids},
            "scales": Counter(
                (f"{row.scale.cell_diameter_px:.1f}", row.scale.source) for row in counted if row.scale
            ).most_common(),
            "n_scale_fields": kept.n_fields if kept and kept.scale.source is ScaleSource.SLIDE else None,
            "image_sizes": Counter((row.width_px, row.height_px) for row in counted).most_common(4),
            "analyzed": (min(analyzed), max(analyzed)),
            "mean_ms": sum(row.elapsed_ms for row in counted) / len(counted) if counted else None,
            "folders": in_order({one_line(path_text(row.path.parent)) for row in rows}),
        }

    def _write_index(self) -> None:
        lines = [self._lines[slide_id] for slide_id in in_order(self._lines)]
        shares = [figures.overlap_share(line.summary.counts) for line in lines]
        means = [nan if (m := line.summary.n_rbc_per_fov_mean) is None else m for line in lines]
        unusual = zip(figures.outliers(shares, floor=0.02), figures.outliers(means, floor=1.0), strict=True)
        shown = [SlideLine(*line[:3], *each) for line, each in zip(lines, unusual, strict=True)]
        shown.sort(key=lambda s: (-s.summary.n_fov_flagged / max(s.summary.n_fov_ok, 1), natural_key(s.name)))
        shown.sort(key=lambda s: (not s.summary.n_fov_failed, not (s.unusual_overlap or s.unusual_count)))
        pages = {s.page for s in shown if (self.index.parent / on_disk(s.page)).exists()}
        key = digest(_PAGE, self.edges, shown, sorted(pages))
        if _content_key(self.index) != key:
            self._render("index.html.j2", self.index, key, title="Slides", slides=shown, pages=pages)

    def _render(self, template: str, page: Path, key: str, **context: object) -> None:
        context |= {"content_key": key, "edges": self.edges, "version": __version__}
        made = local_text(utc_text(self.now()))
        with replacing(page) as file:
            for part in _environment().get_template(template).generate(context, made=made):
                file.write(part.encode("utf-8", "backslashreplace"))


def _with(fields: Sequence[PageField], flag: str) -> list[PageField]:
    return [field for field in fields if Reason("flag", flag) in field.reasons]


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415  0.1 s, needed for pages

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.loader, environment.undefined = PackageLoader("rbc_edge.views"), StrictUndefined
    environment.keep_trailing_newline = True
    environment.filters["percent"] = lambda v: "-" if v is None else f"{100 * v:.1f}\N{NO-BREAK SPACE}%"
    environment.filters |= {"url": _url, "counted": count_text, "local": local_text, "breaks": _with_breaks}
    environment.globals |= {"FLAGS": FLAGS, "MAX_GROUP": figures.MAX_GROUP, "shapes": shapes}
    return environment


def _with_breaks(name: str) -> "Markup":
    """Returns a name for a page that may go on in a new line behind its signs."""
    from markupsafe import Markup, escape  # noqa: PLC0415  as Jinja2

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[-_./#])(?=.)", name))


def _content_key(page: Path) -> str:
    if not page.is_file():  # a pipe of that name would block
        return ""
    with suppress(OSError), page.open("rb") as file:
        if match := _CONTENT.search(file.read(_HEAD_BYTES)):
            return match[1].decode("ascii")
    return ""


def _url(path: str) -> str:
    return quote(path, safe="/.-_~")
