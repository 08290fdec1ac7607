"""Where points lie in the images of cameras, lens included, and how many training frusta see a point."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.camera_utils import radial_and_tangential_undistort
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor, nn


def are_perspective(cameras: Cameras) -> bool:
    """Whether all cameras are of nerfstudio's perspective type."""
    return bool((cameras.camera_type == CameraType.PERSPECTIVE.value).all())


def largest_slant(cameras: Cameras) -> float:
    """Largest distance along a ray per planar depth, which is in a corner of an image; 1 of other than perspective
    cameras."""
    corners = []
    for index in range(len(cameras)):
        width, height = float(cameras.width[index]), float(cameras.height[index])
        pixels = torch.tensor([[v, u] for v in (0.5, height - 0.5) for u in (0.5, width - 0.5)])
        rays = cameras.generate_rays(torch.full((4, 1), index), pixels.to(cameras.device))
        corners.append(rays.metadata["directions_norm"])
    return float(torch.cat(corners).max())


class Projections(nn.Module):
    """Projections of points into images, one a camera.

    Args:
        cameras: OpenGL convention (looking along -z), in scene units. Where one of them is not
            perspective, all count as pinhole cameras without a lens.
    """

    rotation: Float[Tensor, "cameras 3 3"]
    position: Float[Tensor, "cameras 3"]
    focal: Float[Tensor, "cameras 2"]
    centre: Float[Tensor, "cameras 2"]
    size: Float[Tensor, "cameras 2"]
    lens: Float[Tensor, "cameras 6"] | None
    reach: Float[Tensor, " cameras"]

    def __init__(self, cameras: Cameras) -> None:
        super().__init__()
        pose = cameras.camera_to_worlds.reshape(-1, 3, 4).float()
        pair = lambda x, y: torch.cat([x.reshape(-1, 1), y.reshape(-1, 1)], dim=1).float()  # noqa: E731
        lens = cameras.distortion_params if are_perspective(cameras) else None
        lens = None if lens is None or not bool(lens.any()) else lens.reshape(-1, 6).float()
        reach = [math.inf] * len(pose) if lens is None else [max_undistorted_radius(row) for row in lens]
        buffers = {
            "rotation": pose[:, :, :3],
            "position": pose[:, :, 3],
            "focal": pair(cameras.fx, cameras.fy),
            "centre": pair(cameras.cx, cameras.cy),
            "size": pair(cameras.width, cameras.height),
            "lens": lens,
            "reach": torch.tensor(reach, device=pose.device),
        }
        for name, value in buffers.items():
            # Rebuilt from the data set with every start: nothing to keep in a checkpoint. A copy of its cameras.
            copy = None if value is None else value.contiguous().clone()
            self.register_buffer(name, copy, persistent=False)

    def __len__(self) -> int:
        return len(self.position)

    @torch.no_grad()
    def forward(
        self, index: int, points: Float[Tensor, "*batch 3"]
    ) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
        """Project points into the image of a camera.

        Args:
            index: of the camera.
            points: scene units.

        Returns:
            pixel (u, v), the centre of the first at (.5, .5); planar depth, scene units; and whether the point is ahead
            and in the image. Pixels of points that are not ahead mean nothing.
        """
        lens = None if self.lens is None else self.lens[index]
        slope, z, shown = seen_slope(points, self.position[index], self.rotation[index], lens, self.reach[index])
        pixel = slope * self.focal[index] + self.centre[index]
        return pixel, z, shown & ((pixel >= 0) & (pixel <= self.size[index])).all(dim=-1)


def seen_slope(
    points: Float[Tensor, "*batch 3"],
    position: Float[Tensor, "3"],
    rotation: Float[Tensor, "3 3"],
    lens: Float[Tensor, "6"] | None,
    reach: Float[Tensor, ""] | float,
) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
    """Where a camera's lens puts points.

    Args:
        points: in the world.
        position: of the camera.
        rotation: camera to world, looking along -z.
        lens: see `distort`; None: none.
        reach: `max_undistorted_radius` of it.

    Returns:
        x / z and y / z (y down) in the image, planar depth z, and whether the point is ahead and the lens shows it.
    """
    local = (points - position) @ rotation
    z = -local[..., 2]
    slope = torch.stack([local[..., 0], -local[..., 1]], dim=-1) / z.clamp_min(1e-9)[..., None]
    shown = z > 0
    if lens is not None:
        shown = shown & (slope.norm(dim=-1) <= reach)
        slope = distort(slope, lens)
    return slope, z, shown


def distort(slope: Float[Tensor, "*batch 2"], lens: Float[Tensor, "6"]) -> Float[Tensor, "*batch 2"]:
    """x / z and y / z (y down) as a lens bends them: nerfstudio's k1, k2, k3, k4, p1, p2 (OpenCV's model)."""
    k1, k2, k3, k4, p1, p2 = lens.unbind()
    x, y = slope.unbind(dim=-1)
    square = x.square() + y.square()
    radial = 1.0 + square * (k1 + square * (k2 + square * (k3 + square * k4)))
    return torch.stack(
        [
            radial * x + 2.0 * p1 * x * y + p2 * (square + 2.0 * x.square()),
            radial * y + 2.0 * p2 * x * y + p1 * (square + 2.0 * y.square()),
        ],
        dim=-1,
    )


def undistort(bent: Float[Tensor, "*batch 2"], lens: Float[Tensor, "6"]) -> Float[Tensor, "*batch 2"]:
    """The inverse of `distort`, by the steps with which nerfstudio makes rays: a pixel has the ray that is rendered."""
    return radial_and_tangential_undistort(bent, lens)


def max_undistorted_radius(lens: Float[Tensor, "6"]) -> float:
    """The slope, as a distance from the axis, up to which a lens moves points outwards; beyond, it folds them back.

    Its tangential terms, which are small, are left out.
    """
    # d/dr of r (1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8), in r^2, highest power first.
    factors = [(2 * i + 1) * k for i, k in enumerate([1.0, *lens[:4].tolist()])]
    roots = np.roots(factors[::-1])
    turns = roots.real[(np.abs(roots.imag) < 1e-9) & (roots.real > 0.0)]
    return float(turns.min()) ** 0.5 if len(turns) else math.inf


class TrainingFrusta(Projections):
    """The view frusta of training cameras.

    Args:
        cameras: the training cameras, see `Projections`.
    """

    @torch.no_grad()
    def count(self, points: Float[Tensor, "*batch 3"], *, near: Float[Tensor, ""] | float) -> Int[Tensor, "*batch"]:
        """Number of frusta that hold each point.

        Args:
            points: scene units.
            near: points closer to a camera than this (planar depth, scene units) count as unseen by it.
        """
        # One camera at a time: memory stays that of the points, and there are few cameras.
        total = torch.zeros(points.shape[:-1], dtype=torch.int64, device=points.device)
        for index in range(len(self)):
            _, z, inside = self(index, points)
            total += inside & (z >= near)
        return total
