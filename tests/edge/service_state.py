"""A service's state at noon, and results of that day, for tests of what is told about a station."""

from datetime import UTC, datetime
from math import nan
from pathlib import Path

from rbc_edge.station.state_file import Activity, ServiceState, boot_id
from rbc_edge.station.status import StationStatus, status_of
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import Look, Version
from rbc_edge.values import Cells, FovResult, InboxFile, Scale, ScaleSource

NOON = datetime(2026, 3, 4, 12, 0, 0, tzinfo=UTC)
NOON_S = 50_000.0  # the monotonic clock at noon
STATE = ServiceState(
    pid=123,
    version="1.2",
    started_at="2026-03-04T06:00:00Z",
    activity=Activity.WATCHING,
    source="/camera",
    source_online=True,
    file_system="ext4",
    last_image_at="2026-03-04T11:57:00Z",
    last_image_monotonic_s=NOON_S - 180,
    n_counted=40,
    n_failed=1,
    images_per_min=2.4,
    bundle_id="feedfacefeedface",
    updated_at="2026-03-04T11:59:58Z",
    updated_monotonic_s=NOON_S - 2,
    boot_id=boot_id(),
)


def stamp(when: datetime) -> str:
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")


def at_noon(out: Path) -> StationStatus:
    return status_of(out, now=NOON, monotonic_s=NOON_S)


def record(
    out: Path, *, ok: int = 0, failed: tuple[str, ...] = (), when: datetime = NOON, slide: str = "s"
) -> None:
    """Records images as the runner does."""
    nothing = FovResult(64, 48, Scale(nan, ScaleSource.NONE), Cells.empty())
    version = Version("b", "estimated")
    with Ledger(out) as ledger:
        for i in range(ok):
            name = f"ok{i}-{when.timestamp()}"
            file = InboxFile(out / "gone" / name, slide, name, 10, 1)
            ledger.record(Look(file, name, result=nothing), version, stamp(when))
        for i, failure in enumerate(failed):
            file = InboxFile(out / "gone" / f"bad{i:03}.png", slide, f"bad{i:03}", 10, 1)
            look = Look(file, f"bad{i}", failure=failure, message=f"bad{i:03}.png: {failure}, it seems")
            ledger.record(look, version, stamp(when))
        ledger.commit()
