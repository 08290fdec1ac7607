"""Camera poses: conversions to OpenGL axes, and the normalisation of a scene.

Notation
    c2w    camera to world, OpenGL axes: columns right, up, back, centre      [n, 3, 4]
    s      scene units per unit of the capture
    T      rotation and shift that turn capture coordinates into oriented ones  [3, 4]
    scene coordinates of a point x: s (T x)
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.camera_utils import auto_orient_and_center_poses
from torch import Tensor

from ddm_training.errors import InputError

FAR_OFF = 1000.0  # times the cameras' spread from the origin: there float32 would round them
LEAST_MEAN_UP = 1e-3  # length of the mean of the cameras' unit up vectors: with less they cancel out

OrientationMethod = Literal["pca", "up", "vertical", "none"]
CenterMethod = Literal["poses", "focus", "none"]


@dataclass(frozen=True, kw_only=True)
class Normalised:
    """Poses in scene coordinates and how they came about."""

    poses: Float[Tensor, "n 3 4"]
    transform: Float[Tensor, "3 4"]
    scale: float
    orientation: OrientationMethod
    """What it was oriented by in the end."""


def opengl_from_llff(poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "n 3 4"]:
    """LLFF's columns (down, right, back, centre) -> (right, up, back, centre)."""
    return np.stack([poses[..., 1], -poses[..., 0], poses[..., 2], poses[..., 3]], axis=-1)


def opengl_from_opencv(poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "n 3 4"]:
    """Columns (right, down, forward, centre) of COLMAP and OpenCV -> (right, up, back, centre)."""
    return poses * np.array([1.0, -1.0, -1.0, 1.0])


def check_poses(poses: Float[np.ndarray, "n 3 4"], names: tuple[str, ...], source: str) -> None:
    """Every pose must be finite and its left block a rotation.

    Raises:
        InputError: names the images whose poses are not.
    """
    if bad := [name for pose, name in zip(poses, names) if not np.isfinite(pose).all()]:
        raise InputError(
            f"{source}: the poses of {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''} hold NaN or infinite "
            "numbers. Run the pose estimation again, or remove these images and their poses."
        )
    rotations = poses[:, :, :3]
    error = np.abs(np.swapaxes(rotations, 1, 2) @ rotations - np.eye(3)).max(axis=(1, 2))
    wrong = (error > 1e-2) | (np.linalg.det(rotations) < 0)
    if wrong.any():
        bad = [name for name, flag in zip(names, wrong) if flag]
        raise InputError(
            f"{source}: the poses of {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''} are not rotations "
            f"(columns not orthonormal to 1e-2, or mirrored). Expected camera-to-world matrices of rigid motions."
        )


def normalise(
    poses: Float[np.ndarray, "n 3 4"],
    *,
    orientation_method: OrientationMethod = "up",
    center_method: CenterMethod = "poses",
    auto_scale: bool = True,
    scale_factor: float = 1.0,
    unit: float | None = None,
) -> Normalised:
    """Orient, centre and scale a scene as nerfstudio does: mean camera at 0, mean up vector along z.

    All cameras of a capture go in, not only those chosen: so the same scene has the same coordinates whatever views
    are trained on, and test cameras line up.

    Cameras whose up vectors cancel out have no mean one: their scene is left as it lies, as by "none".

    Args:
        poses: OpenGL c2w in units of the capture.
        auto_scale: make ``unit`` 1 in the scene; without it the capture's units stay.
        unit: a length in units of the capture; by default the largest absolute camera coordinate after orienting.
        scale_factor: multiplies the scale.
    """
    # Positions on the earth (UTM) are millions of metres, of which float32 keeps halves: take most away before.
    middle = poses[:, :, 3].mean(axis=0)
    if center_method == "none" or np.abs(middle).max() < FAR_OFF * np.abs(poses[:, :, 3] - middle).max():
        middle = np.zeros(3)
    poses = np.concatenate([poses[:, :, :3], poses[:, :, 3:] - middle[:, None]], axis=2)
    square = np.concatenate([poses, np.tile([[[0.0, 0.0, 0.0, 1.0]]], (len(poses), 1, 1))], axis=1)
    square = torch.from_numpy(square.astype(np.float32))
    if orientation_method in ("up", "vertical") and np.linalg.norm(poses[:, :3, 1].mean(axis=0)) < LEAST_MEAN_UP:
        orientation_method = "none"  # nerfstudio would divide by it
    # Of "pca" nerfstudio mirrors two cameras where it turns the scene over: its transform is right, its poses are not.
    # Its "vertical" reads three singular values: of one or two cameras there are as many only if they come again.
    counted = square if len(square) >= 3 else square.repeat(3, 1, 1)
    _, transform = auto_orient_and_center_poses(counted, method=orientation_method, center_method=center_method)
    oriented = transform @ square
    scale = float(scale_factor)
    if auto_scale:
        length = float(oriented[:, :3, 3].abs().max()) if unit is None else unit
        if length > 0:  # one camera only, or all at one place: there is no length to go by
            scale /= length
    oriented[:, :, 3] *= scale
    transform = transform[:3].clone()
    transform[:, 3] -= (transform[:, :3].double() @ torch.from_numpy(middle)).to(transform)
    return Normalised(poses=oriented, transform=transform, scale=scale, orientation=orientation_method)


def compose(first: Float[Tensor, "3 4"], then: Float[Tensor, "3 4"]) -> Float[Tensor, "3 4"]:
    """The affine map ``then`` after ``first``."""
    rotation = then[:, :3] @ first[:, :3]
    return torch.cat([rotation, then[:, :3] @ first[:, 3:] + then[:, 3:]], dim=1)
