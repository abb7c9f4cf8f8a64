from dataclasses import fields
from pathlib import Path

import pytest

from rbc_edge import config
from rbc_edge.config import SETTINGS, load
from rbc_edge.errors import UsageError
from rbc_edge.vision.counting import EdgeRule


@pytest.fixture(autouse=True)
def _no_system_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_SYSTEM_FILE", tmp_path / "etc.toml")


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_defaults(tmp_path: Path) -> None:
    loaded = load({}, env={"HOME": str(tmp_path)})
    assert loaded.settings == config.Settings()
    assert set(loaded.source.values()) == {"default"}
    assert loaded.file is None


def test_flag_then_environment_then_file(tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml", 'threads = 1\nedges = "inside"\ncells = true\nmax_failures = 9\n')
    env = {"RBC_EDGE_THREADS": "2", "RBC_EDGE_EDGES": "two-sides", "RBC_EDGE_CELLS": "no", "OTHER": "x"}
    loaded = load({"threads": 3, "edges": None}, file=file, env=env)
    settings = loaded.settings
    assert (settings.threads, settings.edges, settings.cells) == (3, "two-sides", False)
    assert settings.max_failures == 9
    assert loaded.source["threads"] == "flag"
    assert loaded.source["edges"] == "RBC_EDGE_EDGES"
    assert loaded.source["max_failures"] == f"{file}:4"
    assert loaded.source["quiet"] == "default"


def test_where_the_file_is_looked_for(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    system = written(tmp_path / "etc.toml", "threads = 1")
    assert load({}, env=env).file == system
    home = written(tmp_path / ".config" / "rbc-edge" / "config.toml", "threads = 2")
    assert load({}, env=env).file == home
    xdg = written(tmp_path / "xdg" / "rbc-edge" / "config.toml", "threads = 3")
    assert load({}, env={**env, "XDG_CONFIG_HOME": str(tmp_path / "xdg")}).file == xdg
    named = written(tmp_path / "named.toml", "threads = 4")
    assert load({}, env={**env, "RBC_EDGE_CONFIG": str(named)}).settings.threads == 4
    assert load({}, file=xdg, env={**env, "RBC_EDGE_CONFIG": str(named)}).settings.threads == 3


def test_paths_in_the_file_are_relative_to_it(tmp_path: Path) -> None:
    file = written(tmp_path / "deep" / "c.toml", 'bundle = "models"\nout = "/results"\n')
    settings = load({}, file=file, env={}).settings
    assert (settings.bundle, settings.out) == (tmp_path / "deep" / "models", Path("/results"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("thread = 2", r"unknown setting 'thread'.*did you mean threads\?"),
        ("max-failures = 2", r"did you mean max_failures\?"),
        ('threads = "2"', "threads is '2'.*whole number"),
        ("threads = true", "threads is True.*whole number"),
        ("threads = 1.5", "whole number"),
        ("cells = 1", "true or false"),
        ("cell_diameter = 'x'", "a number"),
        ("out = 3", "a path"),
        ("out = ''", "out is empty.*a path"),
        ("[run]\nthreads = 1", "unknown setting 'run'"),
        ("threads = ", "not a TOML file"),
        ("edges = 'left'", "all, two-sides, inside"),
        ("threads = -1", r"it has to be 0 \(as many as .*\), or from 1 to 64"),
        ("threads = 10000", r"it has to be 0 .*or from 1 to 64"),
        ("max_failures = 0", "1 or more"),
        ("cell_diameter = 40\num_per_px = 0.1", "two ways to say the same"),
        ("ignore = 'old'", "ignore is 'old'.*a list of texts"),
        ("ignore = [1]", r"ignore is \[1\].*a list of texts"),
        ("ignore = ['/old']", "ignore is /old.*do not begin"),
    ],
)
def test_wrong_file_is_refused_and_named(tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path / "c.toml", text)
    with pytest.raises(UsageError, match=f"(?s)c.toml(:1)?: .*{said}") as caught:
        load({}, file=file, env={})
    assert caught.value.exit_code == 2


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load({}, file=tmp_path / "none.toml", env={})
    (tmp_path / "latin.toml").write_bytes(b"edges = '\xff'")
    with pytest.raises(UsageError, match="not a TOML file"):
        load({}, file=tmp_path / "latin.toml", env={})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RBC_EDGE_THREAD", "1", "did you mean RBC_EDGE_THREADS"),
        ("RBC_EDGE_THREADS", "two", "whole number"),
        ("RBC_EDGE_CELLS", "maybe", "true or false"),
        ("RBC_EDGE_UM_PER_PX", "", "a number"),
    ],
)
def test_wrong_environment_is_refused_and_named(name: str, value: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load({}, env={name: value})


@pytest.mark.parametrize("diameter", [0.0, -1.0, float("nan"), float("inf"), 3.9, 4001.0])
def test_impossible_cell_diameter(diameter: float) -> None:
    with pytest.raises(UsageError, match="--cell-diameter is"):
        load({"cell_diameter": diameter}, env={})


@pytest.mark.parametrize("um_per_px", [0.0, -0.1, float("nan"), 7.5 / 3, 7.5 / 5000])
def test_impossible_um_per_px(um_per_px: float) -> None:
    with pytest.raises(UsageError, match="--um-per-px is"):
        load({"um_per_px": um_per_px}, env={})


def test_the_scale_is_one_setting(tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml", "um_per_px = 0.1")
    assert load({}, file=file, env={}).settings.cell_diameter_px == pytest.approx(75)
    settings = load({"cell_diameter": 40.0}, file=file, env={}).settings
    assert (settings.cell_diameter_px, settings.um_per_px) == (40.0, None)
    with pytest.raises(UsageError, match=r"the command line: .*two ways"):
        load({"cell_diameter": 40.0, "um_per_px": 0.1}, env={})


def test_edges_are_those_of_the_counting_module() -> None:
    assert tuple(EdgeRule) == config.EDGES


def test_every_setting_says_what_it_is_and_its_default_is_allowed() -> None:
    assert list(SETTINGS) == [f.name for f in fields(config.Settings)]
    for name, setting in SETTINGS.items():
        assert setting.help.endswith(".") and ";" not in setting.help, name
        assert setting.kind in (Path, int, float, str, bool, tuple), name
        assert setting.default is None or type(setting.default) is setting.kind, name
        assert setting.allows(setting.default), name
        assert (setting.default is None) == bool(setting.example), name  # the example file shows one of them
    assert next(iter(SETTINGS.values())).heading


def test_examples_of_settings_are_valid(tmp_path: Path) -> None:
    for name, setting in SETTINGS.items():
        if setting.example:
            file = written(tmp_path / "c.toml", f"{name} = {setting.example}\n")
            assert getattr(load({}, file=file, env={}).settings, name) is not None


@pytest.mark.parametrize("name", ["RBC_EDGE_OUT", "RBC_EDGE_BUNDLE", "RBC_EDGE_THREADS"])
def test_an_empty_variable_is_an_error_and_not_the_current_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=name):
        load({}, env={name: " ", "HOME": str(tmp_path)})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("settle_s", -1.0, "--settle-s is -1"),
        ("scan_every_s", 0.0, "from 0.1 to 3600"),
        ("grace_s", float("nan"), "--grace-s is nan"),
        ("min_free_mb", 1e9, "--min-free-mb"),
        ("marker", "a/b", "name of a file"),
        ("marker", "..", "name of a file"),
        ("ignore", ["old", ""], "--ignore is empty"),
        ("ignore", ["**"], r"--ignore is \*\*.*not \* alone"),
        ("ignore", ["tmp/"], r"--ignore is tmp/.*end with /"),
        ("ignore", ["[ab"], r"--ignore is \[ab.*close each \["),
    ],
)
def test_impossible_settings_of_a_watch(key: str, value: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load({key: value}, env={})


def test_settings_of_a_watch_come_from_a_file(tmp_path: Path) -> None:
    text = 'source = "camera"\nmarker = ".station"\nsettle_s = 3\npolling = true\nprometheus = "/run/x.prom"'
    settings = load({}, file=written(tmp_path / "c.toml", text), env={}).settings
    assert (settings.source, settings.marker) == (tmp_path / "camera", ".station")
    assert (settings.settle_s, settings.polling) == (3.0, True)
    assert settings.prometheus == Path("/run/x.prom")
    assert load({}, env={"HOME": "/none"}).settings.polling is None


def test_patterns_to_ignore_come_from_each_place_and_do_not_add_up(tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml", "ignore = ['old*', 'day1/test', '[ab]x', '[]]']")
    assert load({}, file=file, env={}).settings.ignore == ("old*", "day1/test", "[ab]x", "[]]")
    env = {"RBC_EDGE_IGNORE": "tmp:*~"}
    assert load({"ignore": []}, file=file, env=env).settings.ignore == ("tmp", "*~")
    assert load({"ignore": ["x"]}, file=file, env=env).settings.ignore == ("x",)
    with pytest.raises(UsageError, match="RBC_EDGE_IGNORE: ignore is empty"):
        load({}, env={"RBC_EDGE_IGNORE": "tmp::x"})


def test_each_setting_names_its_line(tmp_path: Path) -> None:
    text = "# a note\n\n  \"edges\" = 'inside'\ncells=true\n#threads = 2\nout = 'results'\n"
    file = written(tmp_path / "c.toml", text)
    source = load({}, file=file, env={}).source
    assert (source["edges"], source["cells"], source["out"]) == (f"{file}:3", f"{file}:4", f"{file}:6")
    assert source["threads"] == "default"
    written(file, "cells = true\n\nthread = 3\n")
    with pytest.raises(UsageError, match=r"c.toml:3: unknown setting 'thread'"):
        load({}, file=file, env={})


def test_the_example_changes_nothing(tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml", config.example())
    assert load({}, file=file, env={}).settings == config.Settings()


def test_the_example_takes_folders_whatever_their_names(tmp_path: Path) -> None:
    odd = Path('/srv/Mikroskop "1" \\ Ähre')
    file = written(tmp_path / "c.toml", config.example(source=odd, out=Path("/r")))
    loaded = load({}, file=file, env={})
    assert (loaded.settings.source, loaded.settings.out) == (odd, Path("/r"))
    with pytest.raises(UsageError, match=r"--out is .*UTF-8"):
        config.example(out=Path("/srv/\udcff"))


def test_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(b"\xef\xbb\xbfthreads = 3\n")
    loaded = load({}, file=file, env={})
    assert (loaded.settings.threads, loaded.source["threads"]) == (3, f"{file}:1")


def test_what_no_path_can_hold_and_what_is_nested_too_deeply_is_wrong_in_words(tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml", 'source = "a\\u0000b"\n')
    with pytest.raises(UsageError, match=r"c\.toml:1: source is 'a\\x00b'"):
        load({}, file=file, env={})
    file = written(tmp_path / "c.toml", f"cell_diameter = 1{'0' * 400}\n")
    with pytest.raises(UsageError, match=r"c\.toml:1: cell_diameter is inf"):
        load({}, file=file, env={})
    file = written(tmp_path / "c.toml", f"threads = {'9' * 5000}\n")
    with pytest.raises(UsageError, match=r"c\.toml: not a TOML file: .*digits"):
        load({}, file=file, env={})
    file = written(tmp_path / "deep.toml", f"threads = {'[' * 5000}\n")
    with pytest.raises(UsageError, match=r"deep\.toml: not a TOML file"):
        load({}, file=file, env={})
