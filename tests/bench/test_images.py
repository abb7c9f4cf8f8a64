from pathlib import Path

import pytest

from bench.images import lay_out, link
from rbc_edge.vision.image_file import load_field


def test_fields_are_drawn_and_put_together(tmp_path: Path) -> None:
    told = lay_out(tmp_path, None, 3, [(2, 2)])
    assert told["fields"] == {"n": 3, "px": (640, 480), "megapixels": 0.3072}
    assert told["mosaic-2"] == {"n": 2, "px": (1280, 960), "megapixels": 1.2288}
    mosaics = [load_field(p, "", p.name) for p in sorted((tmp_path / "mosaic-2").iterdir())]
    assert [m.image.shape for m in mosaics] == [(960, 1280, 3)] * 2
    assert mosaics[0].sha256 != mosaics[1].sha256  # else the second is a duplicate and costs nothing
    assert (
        len(list((tmp_path / "mosaic-2-one").iterdir()))
        == len(list((tmp_path / "fields-one").iterdir()))
        == 1
    )


def test_photographs_are_copied_evenly(tmp_path: Path) -> None:
    lay_out(tmp_path / "drawn", None, 5, [])
    told = lay_out(tmp_path / "some", tmp_path / "drawn" / "fields", 3, [])
    assert sorted(p.name for p in (tmp_path / "some" / "fields").iterdir()) == [
        f"field-000{i}.jpg" for i in (0, 2, 4)
    ]
    assert isinstance(told["fields"], dict)
    link(tmp_path / "drawn" / "fields", tmp_path / "all", 9)
    assert len(list((tmp_path / "all").iterdir())) == 5


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images there"):
        lay_out(tmp_path / "out", tmp_path / "empty", 3, [])
