"""File names: valid on every disk, no two the same, and the same whichever slide came first."""

import os
from pathlib import Path

from rbc_edge.views.names import file_names, overlay_paths, page_names


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


def test_a_device_of_windows_is_no_file_name() -> None:
    slides = ["CON", "nul", "com1", "Lpt².x", "aux .y", "_CON", "console", "com", "com10"]
    names = file_names(slides)
    assert list(names.values())[:5] == ["_CON", "_nul", "_com1", "_Lpt².x", "_aux .y"]
    assert names["_CON"].startswith("_CON-")
    assert list(names.values())[6:] == ["console", "com", "com10"]


def test_no_page_of_a_slide_is_the_index_and_no_two_slides_share_one() -> None:
    pages = page_names(["s1", "index", "index_", "Index"])
    assert (pages["s1"], pages["index_"]) == ("s1.html", "index_.html")
    assert len({page.casefold() for page in (*pages.values(), "index.html")}) == 5
