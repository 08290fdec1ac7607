"""Where the scene lies along the rays, and how many metres a scene unit is.

Notation
    near, far   distances that bracket the scene's surfaces, scene units
    s           metric scale, metres per scene unit
    q           a quantile of disparity 1/z over the prior's training patches, 1/metres
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.model_components.scene_colliders import SceneCollider

from ddm_training.errors import InputError
from ddm_training.rgbd import RgbdSpec


@dataclass(frozen=True)
class StereoBounds:
    """Where stereo of the training images finds the scene."""

    near: float
    """Planar depth of the nearest surfaces (2 % quantile, or of a small object well before it), scene units."""
    far: float
    """Planar depth of the farthest (98 %), scene units."""
    median_disparity: float
    """1 / median planar depth, 1 / scene units."""
    centre: tuple[float, float, float]
    """Of the cube that holds most of the surfaces, scene units."""
    radius: float
    """Half a side of that cube, scene units."""


class BoundsCollider(SceneCollider):
    """Clips all rays to [near, far], in training and after it; views nearer to the scene begin nearer, see `bound`.

    nerfstudio's own collider moves the near plane to 0 after training. With few views nothing ever trained the space in
    front of the near plane, and its initial fog would be rendered.

    Args:
        near: scene units.
        far: scene units.
    """

    bounds: torch.Tensor

    def __init__(self, near: float, far: float) -> None:
        super().__init__()
        # In checkpoints: the bounds may come from the training images, which rendering a finished run need not load.
        self.register_buffer("bounds", torch.tensor([near, far], dtype=torch.float32))

    def set_nears_and_fars(self, ray_bundle: RayBundle) -> RayBundle:
        """Give every ray the same near and far."""
        return self.bound(ray_bundle)

    def bound(self, ray_bundle: RayBundle, nearer: float = 1.0) -> RayBundle:
        """Give every ray the bounds; those that a crop box has clipped keep within, those that miss it have no length.

        Args:
            ray_bundle: of training images or of a view.
            nearer: of a view that is nearer to the scene than any training image, its distance by theirs, which near
                is multiplied by: it would else begin behind what it looks at.
        """
        near, far = self.bounds.to(ray_bundle.origins).unbind()
        near = nearer * near
        if ray_bundle.nears is None or ray_bundle.fars is None:
            ones = torch.ones_like(ray_bundle.origins[..., :1])
            ray_bundle.nears, ray_bundle.fars = ones * near, ones * far
        else:
            ray_bundle.nears = ray_bundle.nears.clamp(near, far)
            ray_bundle.fars = torch.maximum(ray_bundle.fars.clamp(max=far), ray_bundle.nears)
        return ray_bundle


def first_metric_scale(
    near: float | None, far: float | None, found: StereoBounds | None, spec: Callable[[], RgbdSpec]
) -> float:
    """s as far as it is known before training: by stereo, else by the capture's bounds; NaN where there are neither.

    Args:
        near: of the capture, scene units.
        far: of the capture, scene units.
        found: by stereo; None without it.
        spec: the prior's. NaN is returned where it raises `InputError`: evaluating and rendering do without a prior,
            and training loads it before the first step, and stops there.
    """
    if found is None and (near is None or far is None):
        return math.nan
    try:
        prior = spec()
    except InputError:
        return math.nan
    if found is not None:
        return metric_scale_from_disparity(found.median_disparity, prior)
    assert near is not None
    assert far is not None
    return metric_scale_from_bounds(near, far, prior)


def metric_scale_from_bounds(near: float, far: float, spec: RgbdSpec) -> float:
    """s such that the scene's span of depth lies where most of the prior's training depth does.

    In log depth, the middle of [near, far] is put on the middle of the prior's 5 % to 95 % range of disparity:
    s sqrt(near far) = 1 / sqrt(q05 q95). Far is held below 20 near first: a patch of sky or a far wall seen through a
    window moves the far bound by orders of magnitude and the surfaces in front of it not at all.

    Raises:
        InputError: not 0 < near < far.
    """
    if not 0.0 < near < far < math.inf:
        raise InputError(
            f"the scene's bounds must satisfy 0 < near < far, found near {near:g} and far {far:g}: correct them in the "
            "capture, or give the scale with --pipeline.model.metric-scale."
        )
    middle = math.sqrt(near * min(far, 20.0 * near))
    return 1.0 / (middle * math.sqrt(_quantile(spec, "0.05", 0.15) * _quantile(spec, "0.95", 1.2)))


def metric_scale_from_disparity(median_disparity: float, spec: RgbdSpec) -> float:
    """s that gives the scene's median disparity (1 / scene units) the prior's median: s = median_disparity / q50."""
    return median_disparity / _quantile(spec, "0.50", 0.4)


def _quantile(spec: RgbdSpec, name: str, otherwise: float) -> float:
    """A disparity quantile of the prior; the typical value of indoor scenes where its folder does not tell."""
    return spec.disparity_quantiles.get(name, otherwise)
