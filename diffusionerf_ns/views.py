"""Training images at a working size, as stereo and the completion of depth see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor
from torch.nn import functional as F

from diffusionerf_ns.visibility import max_undistorted_radius, seen_slope, undistort


@dataclass(frozen=True)
class View:
    """A camera and its grey image at the working size, as bent by the lens as the photograph."""

    grey: Float[Tensor, "1 1 h w"]
    focal: Float[Tensor, "2"]
    centre: Float[Tensor, "2"]
    rotation: Float[Tensor, "3 3"]
    position: Float[Tensor, "3"]
    lens: Float[Tensor, "6"] | None = None
    """Distortion, as of `distort`; None: none."""

    @classmethod
    def taken_by(cls, cameras: Cameras, index: int, image: UInt8[np.ndarray, "h w 3"], working_width: int) -> "View":
        """An image (RGB) of a camera, made smaller by area averages where it is wider than the working width."""
        grey = torch.from_numpy(image).float().mean(-1)[None, None] / 255.0
        height, width = grey.shape[-2:]
        scale = min(1.0, working_width / width)
        size = (round(height * scale), round(width * scale))
        small = F.interpolate(grey, size=size, mode="area") if scale < 1.0 else grey
        ratio = torch.tensor([size[1] / width, size[0] / height])
        camera = cameras[index].to("cpu")
        pose = camera.camera_to_worlds.reshape(3, 4).float()
        lens = camera.distortion_params
        return cls(
            small,
            torch.tensor([float(camera.fx), float(camera.fy)]) * ratio,
            torch.tensor([float(camera.cx), float(camera.cy)]) * ratio,
            pose[:, :3],
            pose[:, 3],
            None if lens is None or not bool(lens.any()) else lens.reshape(6).float(),
        )

    @cached_property
    def _reach(self) -> float:
        return float("inf") if self.lens is None else max_undistorted_radius(self.lens)

    def directions(self, size: tuple[int, int] | None = None) -> Float[Tensor, "_h _w 3"]:
        """World directions with planar depth 1, of all pixels.

        Args:
            size: height and width of the image in other pixels than the working size's.
        """
        height, width = self.grey.shape[-2:]
        rows, columns = size or (height, width)
        v, u = torch.meshgrid(
            (torch.arange(rows) + 0.5) * (height / rows),
            (torch.arange(columns) + 0.5) * (width / columns),
            indexing="ij",
        )
        x, y = (u - self.centre[0]) / self.focal[0], (v - self.centre[1]) / self.focal[1]
        if self.lens is not None:
            x, y = undistort(torch.stack([x, y], dim=-1), self.lens).unbind(dim=-1)
        return torch.stack([x, -y, -torch.ones_like(x)], dim=-1) @ self.rotation.T

    def project(self, points: Float[Tensor, "*batch 3"]) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch"]]:
        """Position for `grid_sample`, outside of the image for points that it cannot show, and planar depth."""
        slope, z, shown = seen_slope(points, self.position, self.rotation, self.lens, self._reach)
        size = torch.tensor([self.grey.shape[-1], self.grey.shape[-2]], dtype=torch.float32)
        grid = 2.0 * (slope * self.focal + self.centre) / size - 1.0
        return torch.where(shown[..., None], grid, torch.full_like(grid, 2.0)), z


@dataclass(frozen=True, kw_only=True)
class MatchedView:
    """A view, and what stereo knows of it."""

    view: View
    rgb: Float[Tensor, "h w 3"]
    """In [0, 1], at the working size."""
    depth: Float[Tensor, "h w"]
    """Planar, scene units; 0 where it is not matched."""
    mask: Bool[Tensor, "h w"] | None = None
    """Pixels that belong to the scene; None: all."""
    nearest: Sequence[int] = ()
    """Indices of the views that it is compared with."""

    @property
    def is_matched(self) -> bool:
        """Whether any pixel is."""
        return bool((self.depth > 0).any())
