"""The prior at the end of rendering: one step of denoising takes the grain out of a rendered view.

A NeRF of few views and few samples renders grain: noise of a few percent that changes from pixel to pixel. A diffusion
model was trained on just this, a clean patch plus noise, and its clean estimate is the view without. Single-step
diffusion fixes rendered views in the same place in Difix3D+ (Wu et al., CVPR 2025).

How much of it is grain and how much is texture, the photographs tell: a view is refined until it has as much fine
detail as they have. Where the photographs are full of texture, nothing is taken from the view.

Notation
    x      the view as the prior sees it, RGBD in [-1, 1]      [4, h, w]
    tau    noise level; sigma(tau) is about that of strong grain
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ddm_training import rgbd
from diffusionerf_ns.prior import PatchPrior

TILE, OVERLAP = 512, 32  # pixels: larger views are done in tiles, so that memory does not grow with the view
MULTIPLE = 8  # of a side, for the network's levels


def fine_detail(rgb: Float[Tensor, "h w 3"]) -> float:
    """Deviation of what changes from pixel to pixel: median of the diagonal Haar coefficients / .6745.

    For independent noise it is the noise's deviation, nearly whatever the image (Donoho and Johnstone 1994).
    """
    height, width = rgb.shape[0] // 2 * 2, rgb.shape[1] // 2 * 2
    if height == 0 or width == 0:
        return 0.0
    a, b, c, d = (rgb[i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))
    return float((0.5 * (a - b - c + d)).abs().median()) / 0.6745


def refined_view(
    rgb: Float[Tensor, "h w 3"], z: Float[Tensor, "h w"], prior: PatchPrior, tau: float, detail: float
) -> Float[Tensor, "h w 3"]:
    """Colours of a view with no more fine detail than ``detail``, as far as the prior's clean estimate leads there.

    Args:
        rgb: rendered colours in [0, 1].
        z: planar depth in metres.
        prior: on the device of ``rgb``.
        tau: noise level of the clean estimate.
        detail: `fine_detail` of the photographs.
    """
    has = fine_detail(rgb)
    if has <= detail:
        return rgb
    clean = refined_colours(rgb, z, prior, tau)
    share = (has - detail) / max(has - fine_detail(clean), 1e-9)
    return torch.lerp(rgb, clean, min(share, 1.0)) if share > 0.0 else rgb


@torch.no_grad()
def refined_colours(
    rgb: Float[Tensor, "h w 3"], z: Float[Tensor, "h w"], prior: PatchPrior, tau: float
) -> Float[Tensor, "h w 3"]:
    """Colours of the prior's clean estimate of a view, in [0, 1].

    The networks are convolutional, so a tile is one input, many times larger than a training patch and without seams.

    Args:
        rgb: rendered colours in [0, 1].
        z: planar depth in metres.
        prior: on the device of ``rgb``.
        tau: noise level.
    """
    x = rgbd.encode(rgb.permute(2, 0, 1), z, prior.spec.near)
    height, width = x.shape[1:]
    refined = torch.empty_like(x[:3])
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            bottom, right = min(top + TILE, height), min(left + TILE, width)
            v, u = max(top - OVERLAP, 0), max(left - OVERLAP, 0)
            part = x[:, v : bottom + OVERLAP, u : right + OVERLAP]
            clean = prior.clean_estimate(_padded(part)[None], tau)[0, :3]
            refined[:, top:bottom, left:right] = clean[:, top - v : bottom - v, left - u : right - u]
    return (0.5 * (refined + 1.0)).clamp(0.0, 1.0).permute(1, 2, 0)


def _padded(x: Float[Tensor, "c h w"]) -> Float[Tensor, "c i j"]:
    """Repeat the last row and column until both sides are multiples of 8, and no smaller than a patch of 16."""
    height, width = x.shape[1:]
    more = [max(-side % MULTIPLE, 2 * MULTIPLE - side) for side in (height, width)]
    return F.pad(x[None], (0, more[1], 0, more[0]), mode="replicate")[0]
