import csv
import getpass
import json
import zipfile
from pathlib import Path

import pytest
from stand_in import BUNDLE_ID, TOY_BUNDLE, StandIn, write_disks

from rbc_edge import cli, config
from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.ops import support_archive
from rbc_edge.ops.doctor import examine
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, count_once
from rbc_edge.station.state_file import Activity, ServiceState, StateFile
from rbc_edge.store.corrections import Kind
from rbc_edge.store.decisions import correct
from rbc_edge.store.ledger import Ledger

PATIENT = "Müller Anna 1961"


@pytest.fixture
def station(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings, a camera's folder with a patient's name, results with a failure, a service's last state."""
    monkeypatch.setattr(config, "_SYSTEM_FILE", tmp_path / "none.toml")
    root = tmp_path / "Station of Dr. Huber"
    for i in range(3):
        write_disks(root / "camera" / PATIENT / f"{PATIENT} {i}.png", 3 + i, seed=i)
    (root / "camera" / PATIENT / "broken.png").write_bytes(b"")
    count_once([root / "camera"], CountOptions(root / "results", AnalyzerRecipe(BUNDLE_ID, StandIn)))
    with Ledger(root / "results") as ledger:
        row = next(row for row in ledger.reader.fields(PATIENT) if row.counts)
        correct(
            ledger, PATIENT, row.fov, row.sha256, Kind.REVIEWED, who="Zeta Technician", at=row.analyzed_at
        )
        ledger.commit()
    (root / "c.toml").write_text(
        f"source = 'camera'\nout = 'results'\nbundle = '{TOY_BUNDLE}'\nmarker = '{PATIENT}.mark'\n"
        f"slide_pattern = '(?P<slide>{PATIENT})'\nthreads = 2\n"
    )
    page = StateFile(root / "results")
    source = str(root / "camera")
    page.write(
        ServiceState(
            pid=1,
            activity=Activity.SOURCE_AWAY,
            detail=f"{source}/{PATIENT}: no such file",
            source=source,
            problems=(f"two folders would be the slide {PATIENT}: {source}/a and {source}/b",),
            bundle_id=BUNDLE_ID,
        )
    )
    page.close()
    return root


def archive(station: Path, settings: str = "c.toml") -> tuple[dict[str, str], list[tuple[str, str]]]:
    file = station / "report.zip"
    listed = support_archive.write(file, examine({}, file=station / settings, env={}))
    assert file.stat().st_mode & 0o777 == 0o600
    with zipfile.ZipFile(file) as packed:
        return {name: packed.read(name).decode() for name in packed.namelist()}, listed


def test_the_archive_says_what_is_in_it(station: Path) -> None:
    files, listed = archive(station)
    assert list(files) == [name for name, _ in listed]
    assert set(files) == {
        *("README.txt", "doctor.txt", "versions.json", "settings.json", "service.json", "ledger.csv")
    }
    for name in list(files)[1:]:
        assert f"{name}: " in files["README.txt"]


def test_no_name_and_no_path_is_in_it(station: Path) -> None:
    files, _ = archive(station)
    everything = "\n".join(files.values())
    words = [
        *PATIENT.split(),
        "Huber",
        "Zeta",
        "camera/",
        "results/",
        "broken",
        str(station),
        str(station.parent),
    ]
    user = getpass.getuser()
    for word in [*words, *([user] if user not in ("root", "rbc-edge") else [])]:
        assert word not in everything, word
    text = next((station / "camera" / PATIENT).glob("*0.png")).read_bytes()
    assert text[:8] not in (station / "report.zip").read_bytes()


def test_what_a_developer_needs_is_in_it(station: Path) -> None:
    files, _ = archive(station)
    rows = list(csv.DictReader(files["ledger.csv"].splitlines()))
    assert len(rows) == 4
    assert len({row["slide"] for row in rows}) == 1
    assert len({row["fov"] for row in rows}) == 4
    assert sorted(row["failure"] for row in rows) == ["", "", "", "empty"]
    assert sum(int(row["n_rbc_single"] or 0) + int(row["n_rbc_overlapping"] or 0) for row in rows) == 12
    assert sorted(row["n_corrected"] for row in rows) == ["0"] * 4
    settings = json.loads(files["settings.json"])
    assert settings["threads"] == {"value": 2, "source": "file"}
    assert settings["slide_pattern"]["value"] == settings["marker"]["value"] == "given"
    service = json.loads(files["service.json"])
    assert (service["running"], service["activity"], service["problems"]) == (False, "source away", 1)
    assert "failed   source" in files["doctor.txt"]


def test_names_in_a_wrong_setting_stay_out(station: Path) -> None:
    (station / "wrong.toml").write_text(f'"{PATIENT}" = 1\n')
    files, _ = archive(station, "wrong.toml")
    assert "unknown setting <quoted>" in files["doctor.txt"]
    assert PATIENT not in "".join(files.values())
    assert "Huber" not in "".join(files.values())


@pytest.mark.parametrize("key", ["edges", "precision", "marker", "threads"])
def test_a_name_at_the_wrong_key_stays_out(station: Path, key: str) -> None:
    for name in (PATIENT, "O'Brien \"1961", "Müller/1961"):
        (station / "wrong.toml").write_text(f"{key} = {json.dumps(name)}\n")
        files, _ = archive(station, "wrong.toml")
        everything = "".join(files.values())
        assert not [word for word in ("Müller", "Anna", "Brien", "1961") if word in everything]
        (station / "report.zip").unlink()


def test_two_archives_do_not_show_the_same_slide_id(station: Path) -> None:
    first, _ = archive(station)
    (station / "report.zip").unlink()
    second, _ = archive(station)
    slides = [next(csv.DictReader(files["ledger.csv"].splitlines()))["slide"] for files in (first, second)]
    assert slides[0] != slides[1]


def test_a_file_is_never_overwritten_and_errors_are_clear(station: Path) -> None:
    diagnosis = examine({}, env={"HOME": str(station)})
    (station / "there.zip").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        support_archive.write(station / "there.zip", diagnosis)
    assert (station / "there.zip").read_text() == "mine"
    with pytest.raises(UnavailableError, match="cannot write"):
        support_archive.write(station / "none" / "x.zip", diagnosis)


def test_the_command(station: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["doctor", *map(str, arguments)])
        return int(left.value.code or 0), capsys.readouterr().out

    config_file = ("--config", station / "c.toml")
    code, said = run(*config_file, "--support-archive", station / "a.zip")
    assert code == 5
    assert "failed   source" in said
    assert "settings.json  which settings are given" in said
    code, said = run(*config_file, "--json")
    assert (code, json.loads(said)["exit_code"], json.loads(said)["support"]) == (5, 5, [])
    code, said = run("--bundle", TOY_BUNDLE, "--config", "/dev/null")
    assert (code, said.splitlines()[-1].split(",")[0]) == (0, "0 failed")
