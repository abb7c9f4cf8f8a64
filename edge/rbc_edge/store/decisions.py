"""What a person decides about the counts: a field forgotten or excluded, a scale for one slide.

A decision is about a content of a slide, not about a file. So it holds while the file lies there, after it
was renamed, and for the count of another bundle. Everything can be undone, because no row is changed.
"""

from collections.abc import Sequence

from rbc_edge.store.ledger import RECOUNT, Ledger
from rbc_edge.store.rows import CONTENT, Status, checksum, decision_values, scale_values
from rbc_edge.text import name_text
from rbc_edge.values import Scale


def decide(
    ledger: Ledger, slide_id: str, fovs: Sequence[str], kind: Status | None, *, reason: str = ""
) -> int:
    """Decides about fields of a slide, and about their copies there; no `fovs`: about all it has now.

    Args:
        ledger: Open for writing. The decision lasts with its next commit.
        slide_id: The slide.
        fovs: Names of fields of view.
        kind: `Status.EXCLUDED`, `Status.FORGOTTEN`, or None: what was decided is undone.
        reason: Why, for the tables.

    Returns:
        How many fields it is about.

    Raises:
        UsageError: The ledger does not know the slide or a field.
    """
    key = _slide_key(ledger, slide_id)
    query = f"SELECT fov, {CONTENT} FROM field WHERE slide_key = ?"
    content_of: dict[str, str] = dict(ledger.database.rows(query, key))
    names = [name_text(fov) for fov in fovs] or list(content_of)
    ledger.reader.check_known(name_text(slide_id), names)
    contents = {content_of[name] for name in names}
    with ledger.database.change() as db:
        for content in contents:
            db.execute("DELETE FROM decision WHERE slide_key = ? AND content = ?", (key, content))
            if kind is not None:
                values = decision_values(key, content, str(kind), reason)
                db.execute("INSERT INTO decision VALUES (?, ?, ?, ?, ?)", values)
    return sum(content in contents for content in content_of.values())


def give_scale(ledger: Ledger, slide_id: str, scale: Scale | None) -> int:
    """Gives a slide its scale, or takes back the one that was given. Its fields are to be counted again.

    Their counts stand until then. Returns how many fields that are. Raises `UsageError` where the ledger does
    not know the slide.
    """
    key = _slide_key(ledger, slide_id)
    with ledger.database.change() as db:
        values = scale_values(scale)
        db.execute(
            "UPDATE slide SET given_diameter_px = ?, given_source = ?, given_by_run = 0, given_checksum = ?"
            " WHERE slide_key = ?",
            (*values, checksum(*values, 0) if scale else None, key),
        )
        query = "UPDATE field SET settings = ? WHERE slide_key = ? AND status = 'ok'"
        return db.execute(query, (RECOUNT, key)).rowcount


def _slide_key(ledger: Ledger, slide_id: str) -> int:
    ledger.reader.check_known(name_text(slide_id))
    row = ledger.database.first("SELECT slide_key FROM slide WHERE slide_id = ?", name_text(slide_id))
    assert row is not None
    return int(row[0])
