"""Writing down the scale of a slide: what its contents say, what follows from them, what a person gave.

An estimated scale is a function of the contents that are counted. A slide is *unsettled* while that may not
be so: its contents have changed, and a process that was killed may have left it like this.
"""

from collections.abc import Collection, Mapping

from rbc_edge.store.ledger import RECOUNT, Ledger
from rbc_edge.store.rows import (
    ESTIMATED,
    GIVEN_COLUMNS,
    SlideScale,
    checksum,
    given_of,
    px_value,
    scale_values,
)
from rbc_edge.values import Measure, Scale


def keep_measures(ledger: Ledger, bundle_id: str, start: int, measures: Mapping[str, Measure]) -> None:
    """Keeps what contents, by their digests, say about the scale of their slide."""
    rows = [
        (sha256, bundle_id, start, px_value(m.cell_diameter_px), m.n_cells, m.n_pixels)
        for sha256, m in measures.items()
    ]
    with ledger.database.change() as db:
        db.executemany(
            "INSERT OR REPLACE INTO measure VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(*row, checksum(*row)) for row in rows],
        )


def keep(ledger: Ledger, slide_id: str, kept: SlideScale, *, is_new: bool = True) -> int:
    """Keeps the scale estimated for a slide. Where it is new, what had another one is to be counted again.

    These counts stand until then. Returns how many they are.
    """
    with ledger.database.change() as db:
        diameter_px, source = scale_values(kept.scale)
        values = (diameter_px, source, kept.bundle_id, kept.n_fields)
        db.execute(
            "UPDATE slide SET cell_diameter_px = ?, scale_source = ?, scale_bundle_id = ?, scale_fields = ?,"
            " scale_checksum = ? WHERE slide_id = ?",
            (*values, checksum(*values), slide_id),
        )
        if not is_new:
            return 0
        return db.execute(
            "UPDATE field SET settings = ? WHERE status = 'ok' AND settings = ?"
            " AND slide_key = (SELECT slide_key FROM slide WHERE slide_id = ?)"
            " AND NOT (scale_source = ? AND cell_diameter_px IS ?)",
            (RECOUNT, ESTIMATED, slide_id, source, diameter_px),
        ).rowcount


def settle(ledger: Ledger, slide_id: str, *, is_settled: bool = True) -> None:
    """Notes whether a slide's scale is that of what is counted. The slide may be a new one."""
    with ledger.database.change() as db:
        db.execute("INSERT OR IGNORE INTO slide (slide_id) VALUES (?)", (slide_id,))
        db.execute("UPDATE slide SET is_unsettled = ? WHERE slide_id = ?", (not is_settled, slide_id))


def give_by_run(ledger: Ledger, slide_ids: Collection[str], scale: Scale | None) -> list[str]:
    """Has slides keep the scale of a run, so that a service does not undo it. None: they lose it.

    A scale that a person has set for a slide stays. Returns the slides that lost one.
    """
    query = f"SELECT slide_id, {GIVEN_COLUMNS} FROM slide"
    known = {row[0]: (given_of(*row), row[-1]) for row in ledger.database.rows(query)}
    old = {slide_id: known.get(slide_id, (None, False)) for slide_id in slide_ids}
    differ = [s for s, (given, by_run) in old.items() if given != scale and (by_run or given is None)]
    if differ:
        values = (*scale_values(scale), 1 if scale else 0)
        given = (checksum(*values) if scale else None, *values)
        with ledger.database.change() as db:
            db.executemany(
                f"INSERT INTO slide ({GIVEN_COLUMNS}, slide_id)"
                " VALUES (?, ?, ?, ?, ?) ON CONFLICT (slide_id)"
                " DO UPDATE SET given_diameter_px = excluded.given_diameter_px,"
                " given_source = excluded.given_source, given_by_run = excluded.given_by_run,"
                " given_checksum = excluded.given_checksum",
                [(*given, slide_id) for slide_id in differ],
            )
    return [] if scale else differ


def inherit(ledger: Ledger, slide_id: str, other: str) -> None:
    """Gives a slide the scale that was given for another one, from which images came. It keeps its own."""
    with ledger.database.change() as db:
        db.execute(
            f"UPDATE slide SET ({GIVEN_COLUMNS}) = (SELECT {GIVEN_COLUMNS} FROM slide WHERE slide_id = ?)"
            " WHERE slide_id = ? AND coalesce(given_source, given_checksum) IS NULL",
            (other, slide_id),
        )
