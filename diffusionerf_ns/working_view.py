"""A training image at the size that stereo works with, and what other such images see of its surfaces."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class View:
    """A camera and its grey image at the working size, lens distortion left out."""

    grey: Float[Tensor, "1 1 h w"]
    focal: Float[Tensor, "2"]
    centre: Float[Tensor, "2"]
    rotation: Float[Tensor, "3 3"]
    position: Float[Tensor, "3"]

    def directions(self) -> Float[Tensor, "h w 3"]:
        """World directions of all pixels with planar depth 1."""
        height, width = self.grey.shape[-2:]
        v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        x, y = (u - self.centre[0]) / self.focal[0], (v - self.centre[1]) / self.focal[1]
        return torch.stack([x, -y, -torch.ones_like(x)], dim=-1) @ self.rotation.T

    def project(self, points: Float[Tensor, "*batch 3"]) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch"]]:
        """Position for `grid_sample` and planar depth of world points."""
        local = (points - self.position) @ self.rotation
        z = -local[..., 2]
        slope = torch.stack([local[..., 0], -local[..., 1]], dim=-1) / z.clamp_min(1e-6)[..., None]
        size = torch.tensor([self.grey.shape[-1], self.grey.shape[-2]], dtype=torch.float32)
        grid = 2.0 * (slope * self.focal + self.centre) / size - 1.0
        return torch.where((z > 1e-6)[..., None], grid, torch.full_like(grid, 2.0)), z


def seen_from(
    index: int,
    views: list[View],
    others: list[int],
    depth: Float[Tensor, "h w"],
    depths: list[Float[Tensor, "_h _w"]],
) -> Iterator[tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]]:
    """For each of the other views: depth there of what one view sees at ``depth``, and what ``depths`` has there."""
    reference = views[index]
    points = reference.position + reference.directions() * depth[..., None]
    for other in others:
        grid, z = views[other].project(points)
        yield z, F.grid_sample(depths[other][None, None], grid[None], mode="nearest", align_corners=False)[0, 0]
