"""Normalisation of scenes: poses stay rigid whatever the cameras, and whichever way they are oriented."""

import numpy as np
import pytest
import torch

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
