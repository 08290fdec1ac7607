"""Normalisation of scenes: poses stay rigid whatever the cameras, and whichever way they are oriented."""

import json
from pathlib import Path

import box_room
import numpy as np
import pytest
import torch

from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.dataparsers.poses import OrientationMethod, normalise


def forward_facing(up: float) -> np.ndarray:
    """Six cameras in a row, whose up is y or -y: [6, 3, 4]."""
    poses = np.tile(np.concatenate([np.diag([up, up, 1.0]), np.zeros((3, 1))], axis=1), (6, 1, 1))
    poses[:, :, 3] = np.random.default_rng(0).normal(size=(6, 3)) * [3.0, 2.0, 0.5] + [5.0, 1.0, -2.0]
    return poses


@pytest.mark.parametrize("method", ["pca", "up", "vertical", "none"])
@pytest.mark.parametrize("up", [1.0, -1.0])
def test_poses_are_those_of_the_capture_turned_and_shifted(method: OrientationMethod, up):
    """Of pca nerfstudio mirrors the second and the third camera where it turns a scene over."""
    poses = forward_facing(up)
    scene = normalise(poses, orientation_method=method, auto_scale=False)
    turn, shift = scene.transform.double().split([3, 1], dim=1)
    moved = turn @ torch.from_numpy(poses)
    moved[:, :, 3:] += shift
    torch.testing.assert_close(scene.poses.double(), moved, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(torch.linalg.det(scene.poses[:, :, :3]), torch.ones(6), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("method", ["up", "vertical"])
@pytest.mark.parametrize("turns", [2, 3, 4])
def test_up_vectors_that_cancel_out_but_for_rounding_turn_no_scene(method: OrientationMethod, turns: int):
    """Cameras that look down and are turned evenly about their axes: the x axes of three or more span a plane."""
    angles = np.arange(turns) * 2.0 * np.pi / turns
    poses = np.stack([np.eye(3, 4) for _ in angles])
    for pose, angle in zip(poses, angles):
        pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        pose[:, 3] = [angle, 0.5 * angle, 0.0]
    scene = normalise(poses, orientation_method=method, auto_scale=False)
    assert scene.orientation == "none"
    assert torch.equal(scene.transform[:, :3], torch.eye(3))


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_cameras_are_enough_to_tell_what_is_vertical(count: int):
    """Cameras that look about them and 20 degrees down."""
    tilt, poses = np.deg2rad(20.0), []
    for angle in np.deg2rad([10.0, 80.0])[:count]:
        right = np.array([np.cos(angle), np.sin(angle), 0.0])
        ahead = np.array([-np.sin(angle), np.cos(angle), 0.0]) * np.cos(tilt) - [0.0, 0.0, np.sin(tilt)]
        poses.append(np.stack([right, np.cross(right, ahead), -ahead, right], axis=1))
    scene = normalise(np.stack(poses), orientation_method="vertical")
    rights, ups = scene.poses[:, :, 0], scene.poses[:, :, 1]
    torch.testing.assert_close(rights[:, 2], torch.zeros(count), atol=1e-6, rtol=0.0)
    expected = np.cos(tilt) if count == 2 else 1.0  # one camera knows of no other direction than its own
    torch.testing.assert_close(ups[:, 2], torch.full((count,), float(expected)), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("method", ["up", "vertical"])
def test_a_scene_whose_cameras_have_no_mean_up_is_left_as_it_lies(method, tmp_path: Path, capsys):
    """Pairs of cameras at the same height, one of each upside down."""
    folder = box_room.write_transforms(tmp_path / "box", depth=False)
    content = json.loads((folder / "transforms.json").read_text())
    content["frames"] = content["frames"][: len(content["frames"]) // 2 * 2]
    for i, frame in enumerate(content["frames"]):
        sign = 1.0 if i % 2 == 0 else -1.0
        frame["transform_matrix"] = [[sign, 0, 0, i], [0, sign, 0, i % 3], [0, 0, 1, 0], [0, 0, 0, 1]]
    (folder / "transforms.json").write_text(json.dumps(content))
    parser = FewViewDataParserConfig(data=folder, orientation_method=method).setup()
    poses = torch.cat([parser.get_dataparser_outputs(split).cameras.camera_to_worlds for split in ("train", "test")])
    assert poses.isfinite().all()
    assert (poses[:, 2, 2] == 1.0).all()
    assert capsys.readouterr().out.count("up vectors cancel out") == 1
