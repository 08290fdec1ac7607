"""What stereo knows of the rays of a training step."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from diffusionerf_ns.completion import DepthMaps
from diffusionerf_ns.patches import concatenate_rays
from diffusionerf_ns.stereo import MatchedDepth

RAYS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class StereoBatch:
    """What stereo knows of the rays of a bundle."""

    rays: slice
    """Where in the bundle the rays through matched pixels are."""
    distance: Float[Tensor, " rays"]
    """Distance along each of them to its surface, scene units."""
    completed: Float[Tensor, " pixel_rays"]
    """Distance along each pixel ray to about where its surface is, scene units; 0 where even that is unknown."""
    confirmed: Bool[Tensor, " pixel_rays"]
    """Which of these distances another image confirms, also where each is completed alone."""
    error: Float[Tensor, " pixel_rays"]
    """Relative error to expect of these distances; infinite where it is not known."""


class StereoRays:
    """Draws rays through matched pixels, and looks up completed depth along pixel rays.

    The rays through matched pixels are made once: a step takes some of them.

    Args:
        matched: pixels whose depth is known; at least one.
        completed: of all pixels.
        cameras: of the training images.
        rays_per_batch: how many rays through matched pixels a step has, where it wants any.
        device: of the rays.
    """

    def __init__(
        self,
        matched: MatchedDepth,
        completed: DepthMaps,
        cameras: Cameras,
        rays_per_batch: int,
        device: torch.device | str,
    ) -> None:
        self.matched = matched
        self.completed = completed.to(device)
        self._image_sizes = torch.cat([cameras.height, cameras.width], dim=-1).to(device)
        self._rays_per_batch = rays_per_batch
        parts = [matched.rays(cameras, chosen) for chosen in torch.arange(len(matched)).split(RAYS_AT_ONCE)]
        self._rays = concatenate_rays([rays for rays, _ in parts]).to(device)
        self._distance = torch.cat([distance for _, distance in parts]).to(device)

    def draw(
        self, rays: RayBundle, indices: Int[Tensor, "pixel_rays 3"], *, matched_rays: bool
    ) -> tuple[RayBundle | None, StereoBatch]:
        """Rays through matched pixels to put behind the pixel rays, if any, and what is known of both.

        Args:
            rays: the pixel rays.
            indices: image, row and column of the pixel of each.
            matched_rays: whether rays through matched pixels are wanted.
        """
        bundle, distance = None, self._distance[:0]
        if matched_rays:
            chosen = torch.randint(len(self.matched), (self._rays_per_batch,)).to(distance.device)
            bundle, distance = self._rays[chosen], self._distance[chosen]
        depth, confirmed, error = self.completed.at(indices.to(distance.device), self._image_sizes)
        batch = StereoBatch(
            rays=slice(len(rays), len(rays) + len(distance)),
            distance=distance,
            completed=depth * rays.metadata["directions_norm"][:, 0],
            confirmed=confirmed,
            error=error,
        )
        return bundle, batch
