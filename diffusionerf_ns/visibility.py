"""Cameras and what lies in their views: how many training frusta see a point."""

import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor, nn


def are_perspective(cameras: Cameras) -> bool:
    """Whether all cameras are of nerfstudio's perspective type."""
    return bool((cameras.camera_type == CameraType.PERSPECTIVE.value).all())


class TrainingFrusta(nn.Module):
    """The view frusta of pinhole training cameras; lens distortion is left out, which moves edges by a few pixels.

    Args:
        cameras: the training cameras, OpenGL convention (looking along -z), in scene units.
        near: points closer to a camera than this (planar depth, scene units) count as unseen by it.
    """

    world_to_camera: Float[Tensor, "cameras 3 4"]
    half_extent: Float[Tensor, "cameras 2 2"]

    def __init__(self, cameras: Cameras, near: float) -> None:
        super().__init__()
        c2w = cameras.camera_to_worlds.reshape(-1, 3, 4).float()
        rotation = c2w[:, :, :3].transpose(1, 2)
        width, height = cameras.width.reshape(-1).float(), cameras.height.reshape(-1).float()
        fx, fy, cx, cy = (v.reshape(-1).float() for v in (cameras.fx, cameras.fy, cameras.cx, cameras.cy))
        # Bounds of x/z and y/z, with y up: rows (left, right) and (bottom, top).
        extent = torch.stack(
            [torch.stack([-cx / fx, (width - cx) / fx], -1), torch.stack([(cy - height) / fy, cy / fy], -1)], 1
        )
        # Rebuilt from the data set with every start: nothing to keep in a checkpoint.
        self.register_buffer("world_to_camera", torch.cat([rotation, -rotation @ c2w[:, :, 3:]], -1), persistent=False)
        self.register_buffer("half_extent", extent, persistent=False)
        self.near = near

    def __len__(self) -> int:
        return self.world_to_camera.shape[0]

    @torch.no_grad()
    def count(self, points: Float[Tensor, "*batch 3"]) -> Int[Tensor, "*batch"]:
        """Number of frusta that hold each point."""
        # One camera at a time: memory stays that of the points, and there are few cameras.
        total = torch.zeros(points.shape[:-1], dtype=torch.int64, device=points.device)
        for matrix, extent in zip(self.world_to_camera, self.half_extent):
            local = points @ matrix[:, :3].T + matrix[:, 3]
            z = -local[..., 2]
            slope = local[..., :2] / z.clamp_min(1e-9)[..., None]
            inside = ((slope >= extent[:, 0]) & (slope <= extent[:, 1])).all(-1)
            total += inside & (z >= self.near)
        return total
