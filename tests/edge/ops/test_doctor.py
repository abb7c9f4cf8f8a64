import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_in import TOY_BUNDLE, write_disks

from rbc_edge import config
from rbc_edge.ops import station_checks
from rbc_edge.ops.computer import Computer
from rbc_edge.ops.doctor import examine
from rbc_edge.ops.finding import Diagnosis, Finding, Level
from rbc_edge.station import source
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, count_once
from rbc_edge.station.source import Mount
from rbc_edge.station.state_file import Activity, ServiceState, StateFile
from rbc_edge.store.queries import Reader
from rbc_edge.store.schema import FILE_NAME

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
PC = Computer(
    machine="x86_64",
    model="Old PC",
    flags=frozenset({"avx2", "avx_vnni"}),
    n_cores=4,
    n_usable=4,
    quota_cores=None,
    available_bytes=4_000_000_000,
    memory_bytes=8_000_000_000,
    memory_limit_bytes=None,
    accounts_memory=True,
    max_watches=8192,
    is_synchronised=True,
)
Look = Callable[..., dict[str, Finding]]


@pytest.fixture(autouse=True)
def _quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but the test's, and a disk that is like a station's."""
    monkeypatch.setattr(config, "_SYSTEM_FILE", tmp_path / "etc.toml")
    disk = Mount("/", "/", "ext4", "/dev/sda1")
    monkeypatch.setattr(source, "mount_of", lambda *_, **__: disk)


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    for i in range(2):
        write_disks(tmp_path / "camera" / "Anna" / f"{i}.png", 4 + i, seed=i)
        os.utime(tmp_path / "camera" / "Anna" / f"{i}.png", (NOON.timestamp() - 60,) * 2)
    return tmp_path / "camera"


@pytest.fixture
def out(tmp_path: Path, camera: Path) -> Path:
    """Results of a run over the camera's folder."""
    from stand_in import BUNDLE_ID, StandIn

    folder = tmp_path / "out"
    count_once([camera], CountOptions(folder, AnalyzerRecipe(BUNDLE_ID, StandIn)))
    return folder


def asked(computer: Computer = PC, now: datetime | None = None, **flags: object) -> Diagnosis:
    now = now or datetime.now(UTC)
    return examine({"bundle": TOY_BUNDLE, **flags}, env={"HOME": "/none"}, computer=computer, now=now)


def look(computer: Computer = PC, now: datetime | None = None, **flags: object) -> dict[str, Finding]:
    return {finding.what: finding for finding in asked(computer, now, **flags).findings}


def test_all_is_well(camera: Path, out: Path) -> None:
    found = asked(source=camera, out=out)
    assert {f.what: f.level for f in found.findings if f.level is not Level.OK} == {}
    assert found.exit_code == 0
    assert [f.what for f in found.findings] == [
        *("installation", "processor", "cores", "memory", "settings", "bundle", "source", "events"),
        *("results", "disk", "ledger", "service", "clock"),
    ]
    assert found.as_lines()[-1] == "0 failed, 0 warnings, 13 ok"
    assert "2 images of 1 slide counted" in look(out=out)["ledger"].text


def test_nothing_is_written(camera: Path, out: Path) -> None:
    def all_of(folder: Path) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before = all_of(camera.parent)
    asked(source=camera, out=out)
    assert {k: v for k, v in all_of(camera.parent).items() if not k.endswith(("-wal", "-shm"))} == before


@pytest.mark.parametrize(
    ("machine", "flags", "level", "said"),
    [
        ("x86_64", {"avx2", "avx512_vnni"}, Level.OK, "int8 is fast (avx512_vnni)"),
        ("x86_64", {"avx2", "avx_vnni"}, Level.OK, "int8 is fast (avx_vnni)"),
        ("x86_64", {"avx2"}, Level.OK, "not at its fastest (avx2)"),
        ("x86_64", {"sse4_1"}, Level.WARNING, "slow"),
        ("aarch64", {"asimd", "asimddp"}, Level.OK, "int8 is fast (asimddp)"),
        ("aarch64", {"asimd", "asimddp", "i8mm"}, Level.OK, "int8 is fast (i8mm)"),
        ("aarch64", {"asimd"}, Level.OK, "not at its fastest (asimd)"),
        ("riscv64", set(), Level.WARNING, "slow"),
    ],
)
def test_what_the_processor_does_with_int8(machine: str, flags: set[str], level: Level, said: str) -> None:
    finding = look(replace(PC, machine=machine, flags=frozenset(flags)))["processor"]
    assert finding.level is level
    assert said in finding.text


def test_threads_that_would_wait_for_each_other() -> None:
    assert look(threads=4)["cores"].level is Level.OK
    assert look(replace(PC, n_usable=2), threads=4)["cores"].level is Level.WARNING
    few = look(replace(PC, quota_cores=1.5), threads=3)["cores"]
    assert (few.level, few.advice[:11]) == (Level.WARNING, "threads = 2")


def test_memory() -> None:
    assert look(replace(PC, available_bytes=200_000_000))["memory"].level is Level.WARNING
    limited = look(replace(PC, memory_limit_bytes=200_000_000))["memory"]
    assert (limited.level, "a control group allows 200 MB" in limited.text) == (Level.WARNING, True)
    assert "cmdline.txt" in look(replace(PC, accounts_memory=False))["memory"].advice
    assert look(replace(PC, available_bytes=None))["memory"].level is Level.OK


def test_wrong_settings_are_exit_2_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("thread = 2\n")
    found = examine({"bundle": TOY_BUNDLE}, file=file, env={}, computer=PC)
    findings = {f.what: f for f in found.findings}
    assert findings["settings"].level is Level.FAILED
    assert (findings["settings"].advice, found.exit_code) == ("did you mean threads?", 2)
    assert findings["bundle"].level is Level.OK


def test_settings_that_contradict_each_other(camera: Path) -> None:
    found = asked(source=camera, out=camera / "out")
    assert [(f.what, f.exit_code) for f in found.findings if f.level is Level.FAILED] == [("settings", 2)]
    assert asked(slide_pattern="(").exit_code == 2
    assert asked(prometheus=camera / "none" / "x.prom").exit_code == 2


def test_a_bundle_that_is_not_intact_is_exit_4(tmp_path: Path) -> None:
    found = asked(bundle=tmp_path)
    assert {f.what for f in found.findings if f.level is Level.FAILED} == {"bundle"}
    assert found.exit_code == 4
    assert asked(bundle=tmp_path, slide_pattern="(").exit_code == 2
    assert asked(precision="fp32").exit_code == 4  # the toy bundle holds none


def test_a_source_that_is_away_is_exit_5(camera: Path) -> None:
    assert asked(source=camera / "none").exit_code == 5
    found = asked(source=camera, marker=".share")
    assert found.exit_code == 5
    assert ".share is not there" in next(f.text for f in found.findings if f.what == "source")


def test_images_that_cannot_be_read(camera: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(source=camera)["source"].text.endswith("2 images in 2 folders")
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith("1.png"))
    finding = look(source=camera)["source"]
    assert (finding.level, "1 files or folders" in finding.text) == (Level.WARNING, True)
    assert "setfacl" in finding.advice


def test_how_new_images_are_noticed(camera: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ext4 gives them" in look(source=camera)["events"].text
    assert "as the settings say" in look(source=camera, polling=True)["events"].text
    many = look(replace(PC, max_watches=2), source=camera)["events"]
    assert (many.level, many.advice[:38]) == (Level.WARNING, "sysctl fs.inotify.max_user_watches=8, "[:38])
    share = Mount("/camera", "/", "cifs", "//camera/Anna")
    monkeypatch.setattr(source, "mount_of", lambda *_, **__: share)
    assert look(source=camera)["events"].text == "cifs gives none: scanned every 10 s"
    assert look(source=camera, polling=False)["events"].level is Level.WARNING


def test_results_that_cannot_be_written(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(out=tmp_path / "new" / "out")["results"].text.endswith("will be made")
    (tmp_path / "file").write_text("")
    assert asked(out=tmp_path / "file").exit_code == 5
    assert asked(out=tmp_path / "file" / "below").exit_code == 5
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert asked(out=out).exit_code == 5
    page = StateFile(out)
    page.write(ServiceState(pid=1, activity=Activity.WATCHING, updated_at="2026-11-23T12:00:00Z"))
    during_the_service = look(out=out)["results"]
    page.close()
    assert during_the_service.level is Level.WARNING


def test_results_of_another_user(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: out.stat().st_uid + 1)
    finding = look(out=out)["results"]
    assert (finding.level, "runuser -u" in finding.advice) == (Level.WARNING, True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_results_that_root_made(out: Path) -> None:
    os.chown(out / FILE_NAME, 65534, -1)
    finding = look(out=out)["results"]
    assert (finding.level, "chown -R" in finding.advice) == (Level.WARNING, True)


def test_disks(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_room(n_bytes: float, n_files: int = 9) -> None:
        disk = SimpleNamespace(f_bavail=n_bytes, f_frsize=1, f_files=10, f_favail=n_files, f_flag=0)
        monkeypatch.setattr(os, "statvfs", lambda _: disk)

    with_room(150e6)
    assert (look(out=out)["disk"].level, asked(out=out).exit_code) == (Level.FAILED, 5)
    assert look(out=out, min_free_mb=100.0)["disk"].level is Level.WARNING
    with_room(5e9)
    assert look(out=out)["disk"].level is Level.OK
    for kind, level in (("tmpfs", Level.WARNING), ("nfs4", Level.WARNING), ("btrfs", Level.OK)):
        mount = Mount("/", "/", kind, "x")
        monkeypatch.setattr(source, "mount_of", lambda *_, mount=mount, **__: mount)
        assert look(out=out)["disk"].level is level
    with_room(5e9, n_files=0)
    assert "no room for another file" in look(out=out)["disk"].text


def test_a_damaged_ledger_is_exit_5(out: Path) -> None:
    db = sqlite3.connect(out / FILE_NAME)
    db.execute("UPDATE cells SET packed = x'00'")  # SQLite takes any bytes there
    db.commit()
    db.close()
    found = asked(out=out)
    assert {f.what for f in found.findings if f.level is Level.FAILED} == {"ledger"}
    assert found.exit_code == 5
    (out / FILE_NAME).write_bytes(b"no ledger at all" * 100)
    assert asked(out=out).exit_code == 5


def test_images_that_failed_are_a_warning(camera: Path, tmp_path: Path) -> None:
    from stand_in import BUNDLE_ID, StandIn

    (camera / "Anna" / "bad.png").write_bytes(b"")
    count_once([camera], CountOptions(tmp_path / "out", AnalyzerRecipe(BUNDLE_ID, StandIn)))
    found = look(out=tmp_path / "out")["ledger"]
    assert (found.level, found.text.endswith("1 failed: 1 empty")) == (Level.WARNING, True)


@pytest.mark.parametrize(
    ("activity", "level"),
    [
        (Activity.WATCHING, Level.OK),
        (Activity.COUNTING, Level.OK),
        (Activity.SOURCE_AWAY, Level.FAILED),
        (Activity.DISK_FULL, Level.FAILED),
    ],
)
def test_the_running_service(out: Path, activity: Activity, level: Level) -> None:
    page = StateFile(out)
    page.write(ServiceState(pid=1, activity=activity, source="/camera", updated_at=_stamp(datetime.now(UTC))))
    found = look(out=out)["service"]
    page.close()
    assert found.level is level


def test_a_service_that_died_hangs_or_has_problems(out: Path) -> None:
    now = datetime.now(UTC)
    page = StateFile(out)
    page.write(ServiceState(pid=1, activity=Activity.WATCHING, updated_at=_stamp(now - timedelta(hours=1))))
    assert look(out=out)["service"].level is Level.FAILED
    assert look(out=out)["service"].text.startswith("SILENT")
    state = ServiceState(pid=1, activity=Activity.WATCHING, updated_at=_stamp(now), problems=("two folders",))
    page.write(replace(state, updated_monotonic_s=100.0))
    assert look(out=out)["service"].level is Level.WARNING
    page.close()
    assert "systemctl start rbc-edge" in look(out=out)["service"].advice
    page = StateFile(out)
    page.write(replace(state, activity=Activity.STOPPING, updated_monotonic_s=200.0))
    page.close()
    assert look(out=out)["service"].level is Level.OK


def _stamp(when: datetime) -> str:
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")


def test_clocks(camera: Path, out: Path) -> None:
    def level(now: datetime, computer: Computer = PC, **flags: object) -> tuple[Level, str]:
        finding = look(computer, now, **flags)["clock"]
        return finding.level, finding.text

    assert level(NOON, source=camera)[0] is Level.OK
    assert "cannot be" in level(datetime(1970, 1, 1, tzinfo=UTC))[1]
    assert "holds an image of 2026-11-23T11:59:00Z" in level(NOON - timedelta(hours=1), source=camera)[1]
    assert "set back" in level(datetime.now(UTC) - timedelta(hours=2), out=out)[1]
    assert level(NOON, replace(PC, is_synchronised=False))[0] is Level.WARNING
    assert level(NOON, replace(PC, is_synchronised=None))[0] is Level.OK
    os.utime(camera / "Anna" / "0.png", (1e11, 1e11))  # the year 5138
    assert level(NOON, source=camera)[0] is Level.WARNING


def test_a_broken_installation_is_told_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = asked()
    assert [f.what for f in found.findings if f.level is Level.FAILED] == ["installation"]
    assert found.exit_code == 5
    assert "bundle" not in [f.what for f in found.findings]


@pytest.mark.parametrize("library", ["numpy", "cv2", "onnxruntime"])
def test_it_loads_where_a_library_is_missing(library: str) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from rbc_edge.ops.doctor import examine\n"
        "found = examine({}, env={})\n"
        "print([f.what for f in found.findings if f.level == 'failed'], int(found.exit_code))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "['installation'] 5\n"  # no words of cv2, which complains without numpy


def write_tree(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_pi_says_what_it_is(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        proc__cpuinfo="processor\t: 0\nFeatures\t: fp asimd asimddp\n\nModel\t\t: Raspberry Pi 5 Model B\n",
        proc__meminfo="MemTotal:        8000000 kB\nMemAvailable:    4000000 kB\n",
        proc__self__cgroup="0::/system.slice/rbc-edge.service\n",
        proc__sys__fs__inotify__max_user_watches="65536\n",
        sys__fs__cgroup__cgroup_dot_controllers="cpuset cpu io pids\n",
    )
    service = tmp_path / "sys/fs/cgroup/system.slice/rbc-edge.service"
    service.mkdir(parents=True)
    (service / "cpu.max").write_text("150000 100000\n")
    (service / "memory.max").write_text("max\n")
    (service.parent / "memory.max").write_text("1000000000\n")
    (service.parent / "cpu.max").write_text("max 100000\n")
    pi = Computer.here(tmp_path)
    assert (pi.model, "asimddp" in pi.flags) == ("Raspberry Pi 5 Model B", True)
    assert (pi.memory_bytes, pi.available_bytes) == (8_192_000_000, 4_096_000_000)
    assert (pi.quota_cores, pi.memory_limit_bytes, pi.max_watches) == (1.5, 1_000_000_000, 65536)
    assert pi.accounts_memory is False


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    bare = Computer.here(tmp_path)
    assert (bare.flags, bare.memory_bytes, bare.quota_cores, bare.max_watches) == (frozenset(),) + (None,) * 3
    assert bare.accounts_memory is None
    assert bare.usable_cores >= 1
    assert examine({"bundle": TOY_BUNDLE}, env={}, computer=bare).exit_code == 0


def test_json_holds_what_the_lines_hold(out: Path) -> None:
    found = asked(out=out, slide_pattern="(")
    shown = json.loads(json.dumps(found.as_json()))
    assert shown["exit_code"] == 2
    for finding in shown["findings"]:
        line = next(line for line in found.as_lines() if finding["text"] in line)
        assert line.split()[:2] == [finding["level"], finding["what"]]


def test_a_ledger_too_large_to_read_through(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(station_checks, "_MAX_CHECKED_BYTES", 1.0)
    monkeypatch.setattr(Reader, "damage", None)
    assert "too large to check here" in look(out=out)["ledger"].text


def test_a_source_too_large_to_walk_through(camera: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(station_checks, "_MAX_ENTRIES", 2)
    assert "or more images" in look(source=camera)["source"].text
