"""Captures cut out of an RGBD video: what the script chooses, and that poses and depth survive it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from box_room import Pinhole, look_at, render
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "scripts" / "rgbd_captures.py"
OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A walk along a wall of the box, 48 frames, half a metre to the side and back at other heights."""
    folder = tmp_path_factory.mktemp("video")
    for sub in ("rgb", "depth"):
        (folder / sub).mkdir()
    poses = []
    for i in range(48):
        s = -0.9 + 1.8 * (i % 24) / 23
        camera = Pinhole(c2w=look_at((s, -0.9, 0.5 * (i // 24)), (0.4 + 0.9 * s, 1.5, -0.2)))
        image, z = render(camera)
        Image.fromarray(image).save(folder / "rgb" / f"{i:05d}.png")
        Image.fromarray(np.rint(1000 * z).astype(np.uint16)).save(folder / "depth" / f"{i:05d}.png")
        poses.append((np.vstack([camera.c2w, [0.0, 0.0, 0.0, 1.0]]) @ OPENCV).ravel())
    np.savetxt(folder / "poses.txt", np.array(poses))
    # OpenCV counts pixels from their centres.
    np.savetxt(folder / "K.txt", [[66.0, 0.0, 47.5], [0.0, 66.0, 35.5], [0.0, 0.0, 1.0]])
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The script, as a user calls it."""
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_a_capture_has_true_depth_where_its_poses_say(video: Path, tmp_path: Path) -> None:
    done = run(video, tmp_path, 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("capture-1: training [")
    content = json.loads((tmp_path / "capture-1" / "transforms.json").read_text())
    assert len(content["train_filenames"]) == 3
    assert len(content["test_filenames"]) == 6
    files = [frame["file_path"] for frame in content["frames"]]
    assert sorted(files) == sorted({*content["train_filenames"], *content["test_filenames"]})
    for frame in content["frames"]:
        camera = Pinhole(c2w=np.array(frame["transform_matrix"])[:3])
        image, z = render(camera)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "capture-1" / frame["file_path"])), image)
        stored = np.asarray(Image.open(tmp_path / "capture-1" / frame["depth_file_path"]))
        assert np.abs(stored / 1000 - z).max() < 1e-3
    assert (content["cx"], content["cy"]) == (48.0, 36.0)


def test_training_views_lie_apart_and_show_what_is_tested(video: Path, tmp_path: Path) -> None:
    assert run(video, tmp_path, 1).returncode == 0
    content = json.loads((tmp_path / "capture-1" / "transforms.json").read_text())
    centres = {f["file_path"]: np.array(f["transform_matrix"])[:3, 3] for f in content["frames"]}
    train, test = (np.array([centres[name] for name in content[f"{kind}_filenames"]]) for kind in ("train", "test"))
    between = np.linalg.norm(train[:, None] - train[None], axis=-1)[np.triu_indices(3, 1)]
    assert between.min() > 0.2
    assert np.linalg.norm(test[:, None] - train[None], axis=-1).min() > 0.06


def test_a_capture_that_exists_is_not_overwritten(video: Path, tmp_path: Path) -> None:
    (tmp_path / "capture-1").mkdir()
    done = run(video, tmp_path, 1)
    assert done.returncode == 1
    assert "capture-1 exists already" in done.stderr
    assert not any((tmp_path / "capture-1").iterdir())


def test_too_few_frames_are_said(video: Path, tmp_path: Path) -> None:
    done = run(video, tmp_path, 40)
    assert done.returncode == 1
    assert "of 40 captures were found in 48 frames." in done.stderr


def test_poses_that_are_missing_are_said(video: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.mkdir()
    for name in ("rgb", "depth", "K.txt"):
        (short / name).symlink_to(video / name)
    np.savetxt(short / "poses.txt", np.loadtxt(video / "poses.txt")[:5])
    done = run(short, tmp_path / "out")
    assert done.returncode == 1
    assert "5 lines of 16 numbers; expected 16 numbers for each of the 48 frames." in done.stderr
    assert not (tmp_path / "out").exists()
