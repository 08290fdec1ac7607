"""Captures as nerfstudio reads them: what is written, and which were written here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddm_training.transforms import (
    FILE,
    MADE_BY,
    content_made_here,
    depth_millimetres,
    is_made_here,
    write_transforms,
    write_views,
)


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_millimetres_are_rounded_and_zero_where_they_do_not_fit(precision):
    z = np.array([[0.0, 0.0004, 0.0006, 1.2344, 65.535, 65.536, np.nan, np.inf]], precision)
    assert depth_millimetres(z).tolist() == [[0, 0, 1, 1234, 65535, 0, 0, 0]]
    assert depth_millimetres(-z).tolist() == [[0] * 8]


def test_what_16_bits_do_not_hold_is_no_surface_in_a_capture(tmp_path):
    depth = np.array([[2.0, 65.535, 65.6, 1000.0, np.inf, np.nan]], np.float32)
    color = np.zeros((1, 6, 3), np.uint8)
    assert write_views(tmp_path, [("train", "0", color, depth, np.eye(4))], (1.0, 1.0, 3.0, 0.5), (6, 1), {}) == 1
    with Image.open(tmp_path / "depth" / "train_0.png") as file:
        assert np.array(file).tolist() == [[2000, 65535, 0, 0, 0, 0]]


def test_the_views_of_a_capture_are_listed_by_what_they_are_for(tmp_path):
    color, depth = np.zeros((3, 4, 3), np.uint8), np.ones((3, 4))
    views = [(kind, name, color, depth, np.eye(4)) for kind, name in (("train", "a"), ("test", "b"))]
    assert write_views(tmp_path, views, (5.0, 6.0, 2.0, 1.5), (4, 3), {"made_by": {"seed": 1}}) == 2
    content = json.loads((tmp_path / FILE).read_text())
    assert list(content) == [
        *("camera_model", "fl_x", "fl_y", "cx", "cy", "w", "h", "made_by"),
        *("train_filenames", "val_filenames", "test_filenames", "frames"),
    ]
    assert content["train_filenames"] == ["images/train_a.png"]
    assert content["val_filenames"] == content["test_filenames"] == ["images/test_b.png"]
    assert [frame["depth_file_path"] for frame in content["frames"]] == ["depth/train_a.png", "depth/test_b.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["depth", "images", FILE]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_transforms(tmp_path, [], {"a": 1})
    before = (tmp_path / FILE).read_text()
    assert json.loads(before) == {"camera_model": "OPENCV", "a": 1, "frames": []}
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_transforms(tmp_path, [], {"a": 2})
    assert (tmp_path / FILE).read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"made_by": {"generator": "ddm rooms"}}'])
def test_captures_of_others_were_not_made_here(tmp_path, text):
    if text is not None:
        (tmp_path / FILE).write_text(text)
    assert not is_made_here(tmp_path)
    assert content_made_here(tmp_path) is None


def test_a_capture_of_photographs_was_made_here(tmp_path):
    write_transforms(tmp_path, [], {**MADE_BY, "made_of": {}})
    assert is_made_here(tmp_path)
    assert content_made_here(tmp_path) == {"camera_model": "OPENCV", **MADE_BY, "made_of": {}, "frames": []}


@pytest.mark.slow
def test_reading_captures_does_not_import_the_search_for_poses():
    code = (
        "import sys, diffusionerf_ns.dataparsers.few_view\n"
        "assert not {'diffusionerf_ns.pose_search', 'diffusionerf_ns.structure_from_motion'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})
