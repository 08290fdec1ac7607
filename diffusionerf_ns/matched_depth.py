"""What stereo knows of the training images, and the rays to the surfaces that it found."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from diffusionerf_ns.completion import DepthMaps
from diffusionerf_ns.patches import concatenate_rays
from diffusionerf_ns.sight_lines import SightLines


@dataclass(frozen=True)
class MatchedDepth:
    """Pixels of the training images whose depth several views agree on."""

    view: Int[Tensor, " n"]
    """Index of the image."""
    pixel: Float[Tensor, "n 2"]
    """Continuous (u, v) in the image, the centre of its first pixel at (0.5, 0.5)."""
    depth: Float[Tensor, " n"]
    """Planar depth, scene units."""
    completed: DepthMaps | None = None
    """Planar depth of all pixels of each image, completed where it is not matched, scene units; 0 where another
    image contradicts it, outside masks, and in images of which nothing is matched."""

    lines: SightLines | None = None
    """Lines of sight to their surfaces from between the cameras; None where nothing is matched."""

    def __len__(self) -> int:
        return len(self.depth)

    def near_far(self) -> tuple[float, float]:
        """Quantiles .02 and .98 of depth, scene units."""
        near, far = np.quantile(self.depth.numpy(), [0.02, 0.98])
        return float(near), float(far)

    def median_disparity(self) -> float:
        """1 / median depth, in 1 / scene units."""
        return float(1.0 / self.depth.median())

    def rays(
        self, cameras: Cameras, chosen: Int[Tensor, " k"], origins: Float[Tensor, "k 3"] | None = None
    ) -> tuple[RayBundle, Float[Tensor, " k"]]:
        """Rays to the surfaces that some of the pixels show.

        Args:
            cameras: of the images.
            chosen: indices of pixels.
            origins: where the rays begin, scene units; None: at the cameras.

        Returns:
            rays, and the distance along each to its surface in scene units.
        """
        view = self.view[chosen].to(cameras.device)
        bundle = cameras.generate_rays(
            camera_indices=view[:, None], coords=self.pixel[chosen].flip(-1).to(cameras.device)
        )
        norm = bundle.metadata["directions_norm"]
        distance = self.depth[chosen].to(cameras.device) * norm[:, 0]
        if origins is not None:
            offset = bundle.origins + bundle.directions * distance[:, None] - origins
            distance = offset.norm(dim=-1)
            bundle.origins, bundle.directions = origins, offset / distance[:, None]
            axes = -cameras.camera_to_worlds[view][:, :, 2]
            norm = 1.0 / (bundle.directions * axes).sum(dim=-1, keepdim=True)
        bundle.metadata = {"directions_norm": norm}
        return bundle, distance

    def draw(self, cameras: Cameras, count: int, between: float) -> tuple[RayBundle, Float[Tensor, " count"]]:
        """Random rays to matched surfaces, see `rays`.

        Args:
            cameras: of the images.
            count: number of rays.
            between: share of them that begin between the cameras, where there are such lines of sight.
        """
        from_between = 0 if self.lines is None or len(self.lines) == 0 else round(between * count)
        chosen = torch.randint(len(self), (count - from_between,))
        bundle, distance = self.rays(cameras, chosen)
        if self.lines is None or from_between == 0:
            return bundle, distance
        line = torch.randint(len(self.lines), (from_between,))
        others, more = self.rays(cameras, self.lines.match[line], self.lines.origin[line].to(cameras.device))
        return concatenate_rays([bundle, others]), torch.cat([distance, more])

    def content_cube(self, cameras: Cameras, share: float = 0.8) -> tuple[tuple[float, float, float], float]:
        """Centre and half side, scene units, of the cube about the median point that holds ``share`` of the points."""
        chosen = torch.linspace(0, len(self) - 1, min(len(self), 20_000)).long()
        bundle, distance = self.rays(cameras, chosen)
        points = bundle.origins + bundle.directions * distance[:, None]
        centre = points.median(dim=0).values
        radius = (points - centre).abs().amax(dim=1).quantile(share)
        return (float(centre[0]), float(centre[1]), float(centre[2])), max(float(radius), 1e-6)
