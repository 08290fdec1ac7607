"""Named protocols of evaluation: what exactly PSNR, SSIM, LPIPS and "Average" mean in a table.

Notation
    rgb     image with colours in [0, 1]        [h, w, 3]; colours outside are held in the range first
    mask    pixels of the object                [h, w] bool
    z       depth of any kind and unit          [h, w], > 0

A number means something only beside the name of its protocol:

| | `llff-regnerf` | `dtu-regnerf` | `nerfstudio` |
|---|---|---|---|
| PSNR | all pixels | pixels of the mask | all pixels |
| SSIM | 7 x 7 uniform window, data range 1 | the same, on white | torchmetrics' defaults (below) |
| LPIPS | VGG (`lpips_vgg`), AlexNet (`lpips_alex`) | the same, on white | AlexNet (`lpips`) |
| Average | `average` with LPIPS-VGG, `average_alex` | the same | none |

"On white": both images are white outside the mask. torchmetrics' SSIM has an 11 x 11 Gaussian window and, as nerfacto
calls it, the larger value range of the two images as its data range.

RegNeRF's released numbers (Niemeyer et al., CVPR 2022) have an SSIM inflated by a data range of 2; ours is what it
should have been. The DiffusioNeRF paper first printed LPIPS-AlexNet by mistake; LPIPS-VGG is the main one.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ddm_training.errors import InputError
from diffusionerf_ns.lpips import Backbone, LpipsNetworks

ProtocolName = Literal["llff-regnerf", "dtu-regnerf", "nerfstudio"]
Image: TypeAlias = Float[Tensor, "h w 3"]

WINDOW = 7
K1, K2 = 0.01, 0.03  # stabilisers of SSIM, in units of the data range (Wang et al., IEEE TIP 2004)
DELTA = 1.25
CORRECTION_ROUNDS = 5  # fits of colours, each over the pixels that the one before has not clipped
CLIPPED = 0.5 / 255  # from the ends of the range: half a grey value of a photograph


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How one image is judged."""

    name: ProtocolName
    """The name to say beside every number."""
    psnr: Callable[[Image, Image], float]
    """Peak signal-to-noise ratio of whole images; a masked protocol takes `masked_psnr` in its place."""
    ssim: Callable[[Image, Image], float]
    """Structural similarity of whole images."""
    lpips: dict[str, Backbone]
    """LPIPS by the name it has in the results."""
    averages: dict[str, str]
    """For each Average its name and the name of the LPIPS in it."""
    masked: bool
    """PSNR over the mask alone; SSIM and LPIPS on white outside it."""


def evaluate_image(
    protocol: ProtocolName,
    rgb_pred: Float[Tensor, "h w 3"],
    rgb_true: Float[Tensor, "h_true w_true 3"],
    mask: Bool[Tensor, "h_mask w_mask"] | None = None,
    lpips: LpipsNetworks | None = None,
) -> dict[str, float]:
    """All metrics of one image under a protocol.

    Args:
        protocol: name of the protocol.
        rgb_pred: rendered image, colours in [0, 1].
        rgb_true: true image of the same size.
        mask: True on the object. Needed by the masked protocol; the others judge whole images by definition.
        lpips: the networks; without them, or where their weights are not to be had, LPIPS and Average are left out.

    Returns:
        Values by name: `psnr` in dB, `ssim`, and as far as they can be had those LPIPS and Averages that the table at
        the top names. Equal images have a PSNR of infinity; a render that is not finite gives NaN.

    Raises:
        InputError: the sizes differ, an image is smaller than the window of SSIM, or the mask is missing or empty.
    """
    rules = PROTOCOLS[protocol]
    _check_sizes(rules, rgb_pred, rgb_true, mask)
    # fp64 on the CPU: SSIM subtracts large equal numbers, and not every accelerator has fp64.
    pred, true = (rgb.detach().cpu().double().clamp(0.0, 1.0) for rgb in (rgb_pred, rgb_true))
    if rules.masked and mask is not None:
        inside = mask.detach().cpu()
        psnr = masked_psnr(pred, true, inside)
        pred, true = on_white(pred, inside), on_white(true, inside)
    else:
        psnr = rules.psnr(pred, true)
    values = {"psnr": psnr, "ssim": rules.ssim(pred, true)}
    if lpips is None:
        return values
    for name, backbone in rules.lpips.items():
        if (distance := lpips.distance(backbone, pred, true)) is not None:
            values[name] = distance
    for name, of in rules.averages.items():
        if of in values:
            values[name] = average_error(values["psnr"], values["ssim"], values[of])
    return values


def evaluate_view(
    protocol: ProtocolName,
    rgb_pred: Float[Tensor, "h w 3"],
    rgb_true: Float[Tensor, "h_true w_true 3"],
    mask: Bool[Tensor, "h_mask w_mask"] | None = None,
    lpips: LpipsNetworks | None = None,
    *,
    colour_corrected: bool = False,
) -> dict[str, float]:
    """nerfstudio's own metrics by their plain names, and the protocol's as "llff-regnerf/psnr"; see `evaluate_image`.

    Where an image has a mask that is not black, and the protocol judges whole images, "masked_psnr" is that inside of
    it: what is outside was not trained on. The masked protocol is left out for an image without a mask.
    ``colour_corrected`` adds nerfstudio's metrics of `colour_correct`'s render as "cc_psnr", "cc_ssim" and "cc_lpips",
    as its splatfacto calls them.
    """
    values = evaluate_image("nerfstudio", rgb_pred, rgb_true, lpips=lpips)
    if colour_corrected:
        corrected = evaluate_image("nerfstudio", colour_correct(rgb_pred, rgb_true), rgb_true, lpips=lpips)
        values |= {f"cc_{name}": value for name, value in corrected.items()}
    if mask is not None and not PROTOCOLS[protocol].masked and bool(mask.any()):
        pred, true = (rgb.detach().cpu().double().clamp(0.0, 1.0) for rgb in (rgb_pred, rgb_true))
        values["masked_psnr"] = masked_psnr(pred, true, mask.detach().cpu())
    if protocol == "nerfstudio" or (PROTOCOLS[protocol].masked and mask is None):
        return values
    judged = evaluate_image(protocol, rgb_pred, rgb_true, mask, lpips)
    return values | {f"{protocol}/{name}": value for name, value in judged.items()}


def colour_correct(rgb_pred: Image, rgb_true: Image) -> Image:
    """The render with the exposure and white balance of the photograph, by a quadratic fit of its colours.

    For captures whose exposure changes: a test image's own is nothing that the training images tell, and PSNR counts
    little else there. The fit sees the true image, so it must not be compared with numbers without it.

    The fit is that of multinerf and of nerfstudio's `color_correct` (each channel from all channels, their products and
    1, over the pixels that are not clipped, again with those that are not clipped then), but takes renders and
    photographs that determine no fit: of one colour, without a channel, clipped everywhere.

    Args:
        rgb_pred: rendered image, colours in [0, 1]. One that is not finite is given back as it is.
        rgb_true: true image.
    """
    if not bool(rgb_pred.isfinite().all()):
        return rgb_pred
    pred, true = (rgb.detach().cpu().double().clamp(0.0, 1.0).reshape(-1, 3) for rgb in (rgb_pred, rgb_true))
    never_clipped = _unclipped(pred) & _unclipped(true)
    for _ in range(CORRECTION_ROUNDS):
        counted = never_clipped & _unclipped(pred)
        r, g, b = pred.unbind(dim=-1)
        terms = torch.stack([r * r, r * g, r * b, g * g, g * b, b * b, r, g, b, torch.ones_like(r)], dim=-1)
        fitted = []
        for c in range(3):
            counts = counted[:, c]
            if not bool(counts.any()):
                fitted.append(pred[:, c])
                continue
            # The least solution where there are many.
            fit = torch.linalg.lstsq(terms[counts], true[counts, c : c + 1], rcond=1e-12, driver="gelsd").solution
            fitted.append((terms @ fit)[:, 0].clamp(0.0, 1.0))
        pred = torch.stack(fitted, dim=-1)
    return pred.reshape(rgb_pred.shape).to(rgb_pred)


def _unclipped(values: Tensor) -> Tensor:
    return (values >= CLIPPED) & (values <= 1.0 - CLIPPED)


DEPTH_METRICS = tuple(f"depth_{name}{kind}" for kind in ("", "_aligned") for name in ("abs_rel", "rmse", "delta"))
NOT_OF_ALL = (*DEPTH_METRICS, "masked_psnr")
"""Metrics that only images have with something to judge by: true depth, a mask that is not black."""


def has_known_depth(true: Float[Tensor, "h w"]) -> bool:
    """Whether `evaluate_depth` has anything to judge by."""
    return bool((true.isfinite() & (true > 0)).any())


def evaluate_depth(
    pred: Float[Tensor, "h w"],
    true: Float[Tensor, "h_true w_true"],
    mask: Bool[Tensor, "h_mask w_mask"] | None = None,
) -> dict[str, float]:
    """Errors of a depth map where true depth is known, as it is and after median alignment.

    Pixels count where ``mask`` is True and the true depth is finite and positive. Median alignment multiplies the
    prediction by median(true) / median(pred), which takes out the scale that images alone do not give.

    Args:
        pred: predicted depth, of the same kind (planar or along the ray) and unit as ``true``.
        true: true depth; not finite or <= 0 where unknown.
        mask: pixels to count, all without it.

    Returns:
        `depth_abs_rel` = mean |p - z| / z; `depth_rmse` = sqrt(mean (p - z)^2) in the unit of depth; `depth_delta` =
        share of pixels with max(p/z, z/p) < 1.25; and the three with the suffix `_aligned`, which are NaN where the
        median prediction is not positive.

    Raises:
        InputError: the sizes differ, or no pixel counts.
    """
    if pred.shape != true.shape or (mask is not None and mask.shape != true.shape):
        found = [tuple(v.shape) for v in (pred, true, mask) if v is not None]
        raise InputError(f"prediction, true depth and mask must have the same size, found {found}.")
    z = true.detach().cpu().double()
    valid = z.isfinite() & (z > 0)
    if mask is not None:
        valid &= mask.detach().cpu()
    if not valid.any():
        raise InputError("no pixel has a known positive depth inside the mask: there is nothing to evaluate.")
    p, z = pred.detach().cpu().double()[valid], z[valid]
    median = float(p.quantile(0.5))
    scale = float(z.quantile(0.5)) / median if median > 0 else math.nan
    aligned = {f"{name}_aligned": value for name, value in depth_errors(scale * p, z).items()}
    return depth_errors(p, z) | (aligned if math.isfinite(scale) else dict.fromkeys(aligned, math.nan))


def summarise(per_image: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean over images of every metric, in the order in which the names first appear.

    A metric that only some images have (true depth of a few frames) is the mean over those, and that is said once.

    Raises:
        InputError: there are no images.
    """
    if not per_image:
        raise InputError("there are no images to summarise: the test split is empty.")
    names = dict.fromkeys(name for values in per_image for name in values)
    means = {}
    for name in names:
        found = [values[name] for values in per_image if name in values]
        if len(found) < len(per_image):
            warnings.warn(f"{name} is a mean over {len(found)} of {len(per_image)} images only.", stacklevel=2)
        means[name] = math.fsum(found) / len(found) if all(map(math.isfinite, found)) else sum(found) / len(found)
    return means


def psnr(pred: Float[Tensor, "h w 3"], true: Float[Tensor, "h w 3"]) -> float:
    """-10 log10(mean squared error) in dB, for a peak of 1; infinity for equal images."""
    return _decibel((pred - true).square().mean())


def masked_psnr(pred: Float[Tensor, "h w 3"], true: Float[Tensor, "h w 3"], mask: Bool[Tensor, "h w"]) -> float:
    """PSNR over the pixels of the mask only."""
    return _decibel((pred - true)[mask].square().mean())


def ssim(pred: Float[Tensor, "h w 3"], true: Float[Tensor, "h w 3"]) -> float:
    """Structural similarity with a 7 x 7 uniform window and a data range of 1.

    Mean over channels and over windows that lie wholly inside the image, with unbiased covariances: what
    ``skimage.metrics.structural_similarity(pred, true, channel_axis=-1, data_range=1)`` gives.
    """
    x, y = (rgb.permute(2, 0, 1)[None] for rgb in (pred, true))
    unbiased = WINDOW**2 / (WINDOW**2 - 1)

    def mean(a: Tensor) -> Tensor:
        return F.avg_pool2d(a, WINDOW, stride=1)

    mx, my = mean(x), mean(y)
    vx, vy = unbiased * (mean(x * x) - mx * mx), unbiased * (mean(y * y) - my * my)
    cov = unbiased * (mean(x * y) - mx * my)
    luminance = (2 * mx * my + K1**2) / (mx.square() + my.square() + K1**2)
    structure = (2 * cov + K2**2) / (vx + vy + K2**2)
    return float((luminance * structure).mean())


def on_white(rgb: Float[Tensor, "h w 3"], mask: Bool[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    """The image inside the mask, white outside."""
    return torch.where(mask[..., None], rgb, torch.ones_like(rgb))


def average_error(psnr: float, ssim: float, lpips: float) -> float:
    """Geometric mean of 10^(-PSNR/10), sqrt(1 - SSIM) and LPIPS of one image (mip-NeRF, section 4)."""
    return (10 ** (-psnr / 10) * math.sqrt(max(1.0 - ssim, 0.0)) * max(lpips, 0.0)) ** (1 / 3)


def depth_errors(pred: Float[Tensor, " n"], true: Float[Tensor, " n"]) -> dict[str, float]:
    """AbsRel, RMSE and share within a factor of 1.25, of depths of ``n`` pixels; see `evaluate_depth`."""
    ratio = torch.where(pred > 0, torch.maximum(pred / true, true / pred), math.inf)
    return {
        "depth_abs_rel": float(((pred - true).abs() / true).mean()),
        "depth_rmse": float((pred - true).square().mean().sqrt()),
        "depth_delta": float((ratio < DELTA).double().mean()),
    }


def torchmetrics_psnr(pred: Float[Tensor, "h w 3"], true: Float[Tensor, "h w 3"]) -> float:
    """PSNR as nerfacto calls it: torchmetrics with a data range of 1."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(pred, true, data_range=1.0))


def torchmetrics_ssim(pred: Float[Tensor, "h w 3"], true: Float[Tensor, "h w 3"]) -> float:
    """SSIM as nerfacto calls it: torchmetrics' defaults, so the data range is the larger range of the two images."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (rgb.permute(2, 0, 1)[None].float() for rgb in (true, pred))
    value = structural_similarity_index_measure(x, y)
    return float(value if isinstance(value, Tensor) else value[0])


def _decibel(squared_error: Tensor) -> float:
    return float(-10.0 * torch.log10(squared_error))


def _check_sizes(rules: Protocol, pred: Tensor, true: Tensor, mask: Tensor | None) -> None:
    if pred.shape != true.shape:
        raise InputError(
            f"render and true image must have the same size, found {tuple(pred.shape)} and {tuple(true.shape)}."
        )
    if min(pred.shape[:2]) < WINDOW:
        raise InputError(f"images must be {WINDOW} x {WINDOW} pixels or more for SSIM, found {tuple(pred.shape[:2])}.")
    if not rules.masked:
        return
    if mask is None:
        raise InputError(
            f"protocol {rules.name!r} needs an object mask for every test image, and this one has none; use masks, "
            "or another protocol ('llff-regnerf' judges whole images)."
        )
    if mask.shape != true.shape[:2]:
        raise InputError(
            f"the mask must have the size of the image {tuple(true.shape[:2])}, found {tuple(mask.shape)}."
        )
    if not mask.any():
        raise InputError(f"the mask is empty: protocol {rules.name!r} has no pixel to evaluate.")


_REGNERF_LPIPS: dict[str, Backbone] = {"lpips_vgg": "vgg", "lpips_alex": "alex"}
_REGNERF_AVERAGES = {"average": "lpips_vgg", "average_alex": "lpips_alex"}

PROTOCOLS: dict[ProtocolName, Protocol] = {
    "llff-regnerf": Protocol(
        name="llff-regnerf", psnr=psnr, ssim=ssim, lpips=_REGNERF_LPIPS, averages=_REGNERF_AVERAGES, masked=False
    ),
    "dtu-regnerf": Protocol(
        name="dtu-regnerf", psnr=psnr, ssim=ssim, lpips=_REGNERF_LPIPS, averages=_REGNERF_AVERAGES, masked=True
    ),
    "nerfstudio": Protocol(
        name="nerfstudio",
        psnr=torchmetrics_psnr,
        ssim=torchmetrics_ssim,
        lpips={"lpips": "alex"},
        averages={},
        masked=False,
    ),
}
