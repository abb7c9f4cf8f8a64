"""What the files at the root of the repository promise: one version everywhere, one place for every check."""

import os
import re
import tomllib
from pathlib import Path

import pytest

from tests.docs import test_docs

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pinned() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 200


def test_citation_names_this_version_and_licence() -> None:
    found = dict(re.findall(r"^([a-z-]+): (.+)$", read("CITATION.cff"), re.M))
    assert found["version"] == PROJECT["project"]["version"]
    assert found["license"] == PROJECT["project"]["license"]
    assert found["cff-version"] == "1.2.0"
    assert "Classification of Overlapping Red Blood Cells" in read("CITATION.cff")


def test_changelog_has_its_form() -> None:
    text = read("CHANGELOG.md")
    versions = re.findall(r"^## \[(.+?)\](.*)$", text, re.M)
    assert versions[0] == ("Unreleased", "")
    for version, date in versions[1:]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert re.fullmatch(r" - \d{4}-\d\d-\d\d", date)
    assert PROJECT["project"]["version"] in [version for version, _ in versions]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= kinds
    assert len(re.findall(r"^## ", text, re.M)) == len(versions)


def test_hooks_call_the_programs_of_the_checks() -> None:
    """The versions of the hooks are those of constraints.txt, because they are the same programs."""
    text = read(".pre-commit-config.yaml")
    assert re.findall(r"- repo: (.+)", text) == ["local"]
    entries = re.findall(r"entry: (\S+)(.*)", text)
    assert entries and all(program.startswith(".venv/bin/") for program, _ in entries)
    packages = {"ruff": "ruff", "mypy": "mypy", "lint-imports": "import-linter"}
    called = {Path(program).name for program, _ in entries}
    assert called == set(packages)
    dev = {re.split(r"[<>=]", need)[0] for need in PROJECT["dependency-groups"]["dev"]}
    assert {packages[name] for name in called} <= set(pinned()) & dev
    makefile = read("Makefile")
    for name in called:  # what the hooks check, `make check` checks too
        assert re.search(rf"^\t\$\(BIN\)/{name}\b", makefile, re.M), name


def test_every_dependency_is_pinned() -> None:
    project = PROJECT["project"]
    needs = [
        *project["dependencies"],
        *(need for extra in project["optional-dependencies"].values() for need in extra),
        *PROJECT["dependency-groups"]["dev"],
    ]
    names = {re.split(r"[<>=\[ ]", need)[0].lower() for need in needs}
    assert names <= set(pinned())


def test_the_server_runs_what_the_pages_name() -> None:
    script = read(".ci/run")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    for call in ("make test", "make demo", "make faults"):
        assert re.search(rf"^{call}\b", script, re.M), call
    targets = {
        word for line in re.findall(r"^make (.*)$", script, re.M) for word in line.split("#")[0].split()
    }
    assert {"test", "check", "demo", "faults"} <= targets
    assert re.search(r"^ *- run: \.ci/run$", read(".github/workflows/check.yml"), re.M)


def test_make_check_measures_the_tests_of_make_test_once() -> None:
    makefile = read("Makefile")
    assert re.search(r"^check: lint types imports coverage$", makefile, re.M)
    assert re.search(r"^coverage: test\n\t\$\(BIN\)/python -m coverage report$", makefile, re.M)
    assert len(re.findall(r"-m pytest \$\(TESTS\)$", makefile, re.M)) == 1
    assert PROJECT["tool"]["coverage"]["run"]["source_pkgs"] == ["rbc_edge"]
    assert PROJECT["tool"]["coverage"]["report"]["fail_under"] >= 97


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.name
)
def test_commands_in_the_forms_can_be_typed(form: Path) -> None:
    text = form.read_text(encoding="utf-8")
    for span in test_docs.spans(text):
        call = test_docs.called(span)
        if call is None or not call[1] or test_docs.EAGER & set(call[1]):
            continue
        test_docs.parse(*call)
    named = {span for span in test_docs.spans(text) if span.startswith("--")}
    known = {o for _, command in test_docs.leaves(test_docs.PROGRAM) for o in test_docs.options(command)}
    assert named <= known


def test_what_the_source_archive_holds_exists() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {name for name in included if not (ROOT / name).exists()} <= {"examples"}
    assert {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md"} <= set(included)


def test_rungs_leave_no_room_out() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (rungs,) = [c for c in contracts if c.get("containers") == ["rbc_edge"]]
    assert rungs["exhaustive"]
    assert any(c["type"] == "acyclic_siblings" and "rbc_edge" in c["ancestors"] for c in contracts)
    ladder = re.findall(
        r"^\| (`.+?`) \|", test_docs.section(ROOT / "docs" / "architecture.md", "The ladder"), re.M
    )
    on_the_page = [sorted(re.findall(r"`(\w+)`", rung)) for rung in ladder]
    assert on_the_page == [sorted(re.findall(r"\w+", layer)) for layer in rungs["layers"]]
