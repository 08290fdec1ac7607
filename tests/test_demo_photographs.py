"""The demo on photographs: their capture is made once, used again, and never taken for that of others."""

import json
import shutil
from pathlib import Path

import corner
import pytest
from PIL import Image

from ddm_training.errors import InputError
from ddm_training.transforms import is_made_here
from diffusionerf_ns import demo, pose_search


def test_the_demo_makes_a_capture_of_photographs_once_and_removes_nothing(taken, placed, tmp_path, capsys):
    assert demo.find_capture(placed[0], tmp_path / "unused") == placed[0]
    assert not (tmp_path / "unused").exists()
    folder = tmp_path / "capture"
    for _ in range(2):
        assert demo.find_capture(taken[0], folder) == folder
        assert sorted(p.name for p in tmp_path.iterdir()) == ["capture"]
        assert (folder / "transforms.json").is_file()
    assert "are used again" in capsys.readouterr().out


def brighter(source: Path, target: Path) -> None:
    """The same photographs under the same names, taken again: a little brighter."""
    target.mkdir()
    for path in source.iterdir():
        Image.open(path).point([min(value + 3, 255) for value in range(256)] * 3).save(target / path.name)


def test_the_demo_tells_photographs_of_the_same_names_apart(taken, placed, tmp_path, capsys):
    again, folder = tmp_path / "again", tmp_path / "capture"
    brighter(taken[0], again)
    shutil.copytree(placed[0], folder)
    demo.find_capture(again, folder)
    assert (folder / "images" / "0.png").read_bytes() == (again / "0.png").read_bytes()
    assert f"it is kept as {tmp_path / 'capture-1'}." in capsys.readouterr().out
    for name in ("transforms.json", "images/0.png"):
        assert (tmp_path / "capture-1" / name).read_bytes() == (placed[0] / name).read_bytes()
    demo.find_capture(taken[0], folder)
    assert (folder / "images" / "0.png").read_bytes() == (taken[0] / "0.png").read_bytes()
    assert (tmp_path / "capture-2" / "images" / "0.png").read_bytes() == (again / "0.png").read_bytes()


def test_the_demo_goes_on_after_a_photograph_more(taken, placed, tmp_path):
    more, folder = tmp_path / "more", tmp_path / "capture"
    shutil.copytree(taken[0], more)
    shutil.copytree(placed[0], folder)
    corner.noise(more / "3.png")
    demo.find_capture(more, folder)
    assert sorted(p.name for p in (folder / "images").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    assert sorted(p.name for p in (tmp_path / "capture-1" / "images").iterdir()) == ["0.png", "1.png", "2.png"]
    assert pose_search.was_made_of(folder, more)
    assert not pose_search.was_made_of(folder, taken[0])


def test_the_demo_keeps_a_capture_in_its_place_where_other_photographs_have_no_poses(placed, tmp_path):
    unrelated, folder = tmp_path / "unrelated", tmp_path / "capture"
    unrelated.mkdir()
    for seed in range(3):
        corner.noise(unrelated / f"{seed}.png", seed)
    shutil.copytree(placed[0], folder)
    with pytest.raises(InputError, match="could be placed"):
        demo.find_capture(unrelated, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["capture", "unrelated"]
    assert (folder / "transforms.json").read_bytes() == (placed[0] / "transforms.json").read_bytes()


@pytest.mark.parametrize("own", ["transforms.json", "notes.txt"])
def test_the_demo_leaves_a_folder_of_the_users_own_alone(taken, tmp_path, own):
    folder = tmp_path / "capture"
    folder.mkdir()
    (folder / own).write_text("{}")
    with pytest.raises(InputError, match=r"diffusionerf-poses did not make; expected .* Give another OUTPUT"):
        demo.find_capture(taken[0], folder)
    assert [p.name for p in tmp_path.iterdir()] == ["capture"]
    assert [p.name for p in folder.iterdir()] == [own]


def test_captures_are_of_other_photographs_where_images_or_contents_are_not_known(taken, placed, tmp_path):
    assert pose_search.was_made_of(placed[0], taken[0])
    earlier, damaged = tmp_path / "earlier", tmp_path / "damaged"
    for folder in (earlier, damaged):
        shutil.copytree(placed[0], folder)
    content = json.loads((earlier / "transforms.json").read_text())
    del content["made_of"]
    (earlier / "transforms.json").write_text(json.dumps(content))
    (damaged / "images" / "1.png").unlink()
    for folder in (earlier, damaged):
        assert is_made_here(folder)
        assert not pose_search.was_made_of(folder, taken[0])
