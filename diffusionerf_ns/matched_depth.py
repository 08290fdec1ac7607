"""What stereo knows of the training images, and the rays to the surfaces that it found."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from diffusionerf_ns.completion import DepthMaps
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
    """Lines of sight to their surfaces from between the cameras; None where none were looked for."""

    def __len__(self) -> int:
        return len(self.depth)

    def near_far(self) -> tuple[float, float]:
        """Quantiles .02 and .98 of depth, scene units."""
        near, far = np.quantile(self.depth.numpy(), [0.02, 0.98])
        return float(near), float(far)

    def median_disparity(self) -> float:
        """1 / median depth, in 1 / scene units."""
        return float(1.0 / self.depth.median())

    def rays(self, cameras: Cameras, chosen: Int[Tensor, " k"]) -> tuple[RayBundle, Float[Tensor, " k"]]:
        """Rays through some of the pixels, and the distance along each to its surface in scene units."""
        bundle = cameras.generate_rays(
            camera_indices=self.view[chosen][:, None].to(cameras.device),
            coords=self.pixel[chosen].flip(-1).to(cameras.device),
        )
        bundle.metadata = {"directions_norm": bundle.metadata["directions_norm"]}
        return bundle, self.depth[chosen].to(cameras.device) * bundle.metadata["directions_norm"][:, 0]

    def draw(self, cameras: Cameras, count: int, between: float) -> tuple[RayBundle, Float[Tensor, " count"]]:
        """Random rays to matched surfaces, and the distance along each to its surface in scene units.

        Args:
            cameras: of the images.
            count: number of rays.
            between: share of them that begin between the cameras, if there are such lines of sight; they come last, and
                their planar depth is that of their pixel's camera.
        """
        lines = None if self.lines is None or len(self.lines) == 0 else self.lines
        first = count if lines is None else count - round(between * count)
        chosen = torch.randint(len(self), (first,))
        if lines is None or first == count:
            return self.rays(cameras, chosen)
        line = torch.randint(len(lines), (count - first,))
        chosen = torch.cat([chosen, lines.match[line]])
        bundle, distance = self.rays(cameras, chosen)
        origin = lines.origin[line].to(cameras.device)
        offset = (bundle.origins + bundle.directions * distance[:, None])[first:] - origin
        distance[first:] = offset.norm(dim=-1)
        bundle.origins[first:], bundle.directions[first:] = origin, offset / distance[first:, None]
        axes = -cameras.camera_to_worlds[self.view[chosen[first:]].to(cameras.device)][:, :, 2]
        cosine = (bundle.directions[first:] * axes).sum(dim=-1, keepdim=True)
        bundle.metadata["directions_norm"][first:] = 1.0 / cosine.clamp_min(1e-3)
        return bundle, distance

    def content_cube(self, cameras: Cameras, share: float = 0.8) -> tuple[tuple[float, float, float], float]:
        """Centre and half side, scene units, of the cube about the median point that holds ``share`` of the points."""
        chosen = torch.linspace(0, len(self) - 1, min(len(self), 20_000)).long()
        bundle, distance = self.rays(cameras, chosen)
        points = bundle.origins + bundle.directions * distance[:, None]
        centre = points.median(dim=0).values
        radius = (points - centre).abs().amax(dim=1).quantile(share)
        return (float(centre[0]), float(centre[1]), float(centre[2])), max(float(radius), 1e-6)
