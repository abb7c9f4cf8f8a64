"""File names: valid on every disk, no two the same, and the same for a slide whatever comes later."""

import os
from pathlib import Path

from rbc_edge.views.names import file_names, overlay_paths, page_name


def test_file_names_are_safe_and_no_two_alike() -> None:
    slides = [
        "A",
        "a",
        "slides",
        "x/y",
        "x:y",
        ".hidden",
        "-rf",
        "é",
        "e\u0301",
        "n" * 300,
        "n" * 301,
        "",
        "a b",
    ]
    names = file_names(slides)
    assert names["A"] == "A"
    assert names["a"].startswith("a-")
    assert names["slides"].startswith("slides-")
    assert (names["x/y"], names[".hidden"], names["-rf"], names["a b"]) == ("x_y", "_hidden", "_rf", "a b")
    assert names["é"] == "é"
    folded = [name.casefold() for name in names.values()]
    assert len(set(folded)) == len(slides)
    assert all(0 < len(os.fsencode(name)) < 140 and "/" not in name for name in names.values())
    assert file_names([*slides, "new"]) == {**names, "new": "new"}  # a new slide renames no other


def test_overlays_lie_in_the_folder_of_their_slide_and_no_two_share_a_file() -> None:
    paths = overlay_paths(Path("out"), "x_y", ["a", "A", "a/b"])
    assert paths["a"] == Path("out/overlays/x_y/a_overlay.jpg")
    assert paths["a/b"] == Path("out/overlays/x_y/a_b_overlay.jpg")
    assert len({str(path).casefold() for path in paths.values()}) == 3


def test_no_page_of_a_slide_is_the_index() -> None:
    assert page_name("s1") == "s1.html"
    assert [page_name(name) for name in ("index", "Index")] == ["index_.html", "Index_.html"]
