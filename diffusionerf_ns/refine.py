"""The prior at the end of rendering: one step of denoising takes the grain out of a rendered view.

A NeRF of few views and few samples renders grain: noise of a few percent that changes from pixel to pixel. A diffusion
model was trained on just this, a clean patch plus noise, and its clean estimate is the view without. Single-step
diffusion fixes rendered views in the same place in Difix3D+ (Wu et al., CVPR 2025).

How much of it is grain and how much is texture, the photographs tell: a view is refined until it has as much fine
detail as they have at its scale, and no more strongly than it takes: a high noise level takes coarser texture as well.
Where the photographs are full of texture, nothing is taken from the view.

Notation
    x      the view as the prior sees it, RGBD in [-1, 1]      [4, h, w]
    tau    noise level; sigma(tau) is about that of strong grain
    f      focal length in pixels, the scale of an image or a view
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape
from torch import Tensor
from torch.nn import functional as F

from ddm_training import rgbd
from ddm_training.errors import InputError
from diffusionerf_ns.prior import PatchPrior
from diffusionerf_ns.tiles import over_tiles

TILE = 512  # pixels: larger views are done in tiles, so that memory does not grow with the view
OCTAVES = 4  # scales at which the photographs' detail is measured
GENTLER = (1 / 3, 2 / 3)  # of the noise level, tried in turn where all of it takes more than grain


def fine_detail(rgb: Float[Tensor, "h w 3"], inside: Bool[Tensor, "h w"] | None = None) -> float:
    """Deviation of what changes from pixel to pixel: median of the diagonal Haar coefficients / .6745.

    For independent noise it is the noise's deviation, nearly whatever the image (Donoho and Johnstone 1994).

    Args:
        rgb: colours in [0, 1].
        inside: pixels that count; None: all. 0 is returned where there are no four of them together.
    """
    height, width = rgb.shape[0] // 2 * 2, rgb.shape[1] // 2 * 2
    if height == 0 or width == 0:
        return 0.0
    a, b, c, d = (rgb[i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))
    change = (0.5 * (a - b - c + d)).abs()
    if inside is not None:
        whole = torch.stack([inside[i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]).all(dim=0)
        change = change[whole.to(change.device)]
    return float(change.median()) / 0.6745 if change.numel() else 0.0


def detail_by_scale(
    photographs: Iterable[tuple[Float[Tensor, "_h _w 3"], Bool[Tensor, "_h _w"] | None, float]],
) -> list[tuple[float, float]]:
    """Mean focal length and mean `fine_detail` of the photographs at full size, half, a quarter and an eighth.

    Args:
        photographs: colours in [0, 1], pixels that count (None: all) and focal length in pixels.
    """
    rows = []
    for rgb, inside, focal in photographs:
        row = []
        for k in range(OCTAVES):
            if k > 0 and min(rgb.shape[:2]) < 2**k:
                break
            small = F.avg_pool2d(rgb.permute(2, 0, 1)[None], 2**k)[0].permute(1, 2, 0)
            whole = None if inside is None else F.avg_pool2d(inside[None].float(), 2**k)[0] == 1.0
            row.append((focal / 2**k, fine_detail(small, whole)))
        rows.append(row)
    octaves = zip(*rows)  # as many as the smallest photograph has
    return [(sum(f for f, _ in o) / len(o), sum(d for _, d in o) / len(o)) for o in octaves]


def detail_at(details: Sequence[tuple[float, float]], focal: float) -> float:
    """The photographs' detail at the scale nearest to a view's; one that is finer has to do with their full size."""
    return min(details, key=lambda pair: abs(math.log(pair[0] / focal)))[1]


class ViewRefiner:
    """Refines the views of a capture; leaves them as rendered where the prior is missing, which is said once.

    Args:
        prior: loads it, or raises `InputError`; called when the first view is refined.
        details: of the capture's photographs, see `detail_by_scale`.
    """

    def __init__(self, prior: Callable[[], PatchPrior], details: Sequence[tuple[float, float]]) -> None:
        self._prior, self._details = prior, details
        self._missing = False

    def __call__(
        self,
        rgb: Float[Tensor, "h w 3"],
        z: Float[Tensor, "h w"],
        camera: Cameras,
        tau: float,
        inside: Bool[Tensor, "h w"] | None = None,
    ) -> Float[Tensor, "h w 3"]:
        """Colours of a view without their grain; arguments and result as of `refined_view`, ``camera`` the view's."""
        if self._missing:
            return rgb
        try:
            prior = self._prior()
        except InputError as error:
            CONSOLE.print(
                f"[yellow]Views are left as rendered, metrics too: {escape(str(error))} Give the prior back its place, "
                "or set refine_tau to 0 in the run's config.yml."
            )
            self._missing = True
            return rgb
        detail = detail_at(self._details, float(camera.fx.reshape(-1)[0]))
        device = prior.alphas_cumprod.device
        return refined_view(rgb.to(device), z.to(device), prior, tau, detail, inside).to(rgb)


def refined_view(
    rgb: Float[Tensor, "h w 3"],
    z: Float[Tensor, "h w"],
    prior: PatchPrior,
    tau: float,
    detail: float,
    inside: Bool[Tensor, "h w"] | None = None,
) -> Float[Tensor, "h w 3"]:
    """Colours of a view with no more fine detail than ``detail``, as far as the prior's clean estimates lead there.

    Between the two estimates of neighbouring noise levels (the lowest is the view itself) that have more and less.

    Args:
        rgb: rendered colours in [0, 1].
        z: planar depth in metres.
        prior: on the device of ``rgb``.
        tau: highest noise level of a clean estimate.
        detail: `fine_detail` of the photographs.
        inside: pixels of which the view's is measured; None: all.
    """
    has = fine_detail(rgb, inside)
    if has <= detail:
        return rgb
    strongest = refined_colours(rgb, z, prior, tau)
    least = fine_detail(strongest, inside)
    if least >= detail:
        return strongest if least < has else rgb
    result = rgb
    for fraction in GENTLER:
        clean = refined_colours(rgb, z, prior, fraction * tau)
        left = fine_detail(clean, inside)
        if left <= detail:
            return torch.lerp(result, clean, (has - detail) / (has - left))
        if left < has:
            result, has = clean, left
    return torch.lerp(result, strongest, (has - detail) / (has - least))


@torch.no_grad()
def refined_colours(
    rgb: Float[Tensor, "h w 3"], z: Float[Tensor, "h w"], prior: PatchPrior, tau: float
) -> Float[Tensor, "h w 3"]:
    """Colours of the prior's clean estimate of a view, in [0, 1]. Arguments as above.

    A view of up to 512 pixels is one input of a prior that takes any size; others see it patch by patch.
    """
    x = rgbd.encode(rgb.permute(2, 0, 1), z, prior.spec.near)
    size, multiple = (TILE, prior.multiple) if prior.any_size else (prior.spec.patch_size, prior.spec.patch_size)
    size = -(-size // multiple) * multiple
    refined = over_tiles(x, size, multiple, lambda tiles: prior.clean_estimate(tiles, tau)[:, :3])
    return (0.5 * (refined + 1.0)).clamp(0.0, 1.0).permute(1, 2, 0)
