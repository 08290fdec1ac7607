"""What a folder holds: photographs beside, above and below captures, and what is said of folders that hold neither."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig, detect_layout, is_photographs


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of three images beside nothing."""
    return images(tmp_path / "my" / "jpegs")


def images(folder: Path, names: tuple[str, ...] = ("0.jpg", "1.jpg", "2.jpg")) -> Path:
    """Write images of nothing."""
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (40, 30)).save(folder / name)
    return folder


def scan(folder: Path) -> Path:
    """Write a scan in IDR's layout: images, masks and a file for its cameras."""
    for name in ("image", "mask"):
        images(folder / name, ("000.png", "001.png"))
    np.savez(folder / "cameras.npz")
    return folder


def assert_photographs(folder: Path) -> None:
    assert is_photographs(folder)
    with pytest.raises(InputError, match=rf"photographs without camera poses.*diffusionerf-poses --data {folder} "):
        detect_layout(folder)


def test_photographs_beside_a_scan_are_photographs(pictures):
    for name in ("scan24", "another"):
        folder = scan(pictures.parent / name)
        assert_photographs(pictures)
        for part in ("image", "mask"):
            assert not is_photographs(folder / part)
            with pytest.raises(InputError, match=rf"is a folder of a capture \(dtu\); give {folder}\."):
                detect_layout(folder / part)


def test_arrays_above_photographs_say_nothing_of_them(pictures):
    np.save(pictures.parent / "results.npy", np.zeros(3))
    np.savez(pictures.parent / "features.npz", x=np.zeros(3))
    assert_photographs(pictures)
    np.save(pictures.parent / "poses_bounds.npy", np.zeros((3, 17)))
    assert not is_photographs(pictures)
    with pytest.raises(InputError, match=r"is a folder of a capture \(llff\)"):
        detect_layout(pictures)


def test_folders_among_photographs_do_not_matter_unless_they_hold_cameras(pictures):
    images(pictures / "@eaDir")
    (pictures / "raw").mkdir()
    assert_photographs(pictures)
    for name in ("transforms_train.json", "poses_bounds.npy", "cameras.npz", "cameras.bin"):
        (pictures / "raw" / name).write_text("{}")
        assert not is_photographs(pictures)
        (pictures / "raw" / name).unlink()
    assert_photographs(pictures)


def test_a_capture_that_was_made_within_the_photographs_does_not_hide_them(pictures):
    images(pictures / "capture" / "images")
    content = {"made_by": "diffusionerf-poses", "frames": []}
    (pictures / "capture" / "transforms.json").write_text(json.dumps(content))
    assert_photographs(pictures)
    (pictures / "capture" / "transforms.json").write_text(json.dumps({"frames": []}))
    assert not is_photographs(pictures)


def test_images_of_colmap_are_no_photographs_but_those_beside_it_are(pictures):
    (pictures.parent / "sparse").mkdir()
    assert_photographs(pictures)
    shutil.move(pictures, pictures.parent / "images")
    assert not is_photographs(pictures.parent / "images")


def test_folders_of_images_with_unknown_cameras_are_told_of_the_search_for_poses(pictures):
    (pictures / "sparse").mkdir()
    hint = rf"holds no capture that is known.*Found: 0\.jpg.*diffusionerf-poses --data {pictures} --output FOLDER"
    with pytest.raises(InputError, match=hint):
        detect_layout(pictures)
    with pytest.raises(InputError, match="holds no capture that is known") as refused:
        detect_layout(pictures.parent)
    assert "--output" not in str(refused.value)


@pytest.mark.parametrize("name", ["scale_factor", "scene_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_scale_that_is_not_positive_is_refused(name, value):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} must be positive and finite, found"):
        FewViewDataParserConfig(**{name: value})
