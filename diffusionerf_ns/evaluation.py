"""What `ns-eval` and TensorBoard say of a test view: metrics by the capture's protocol, depth where it is known."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusionerf_ns import metrics
from diffusionerf_ns.lpips import LpipsNetworks


def judge_view(
    outputs: dict[str, Any],
    true: Float[Tensor, "h w 3"],
    z: Float[Tensor, "h w"] | None,
    batch: dict[str, Any],
    networks: LpipsNetworks,
    *,
    protocol: metrics.ProtocolName,
    colour_corrected: bool,
) -> dict[str, float]:
    """Metrics of one test image.

    Args:
        outputs: of the model for the view.
        true: colours in [0, 1].
        z: planar median depth, metres, judged where the batch has true depth, which data sets give inside of masks that
            are trained by and where images are not transparent; None: it is not judged.
        batch: the data set's item: "mask" and "depth_image" where the capture has them.
        networks: for LPIPS.
        protocol: that names the metrics, e.g. "llff-regnerf/psnr"; plain "psnr", "ssim" and "lpips" are nerfstudio's.
        colour_corrected: whether "cc_psnr" and so on are wanted too, after `metrics.colour_correct`.
    """
    mask = batch["mask"][..., 0] if "mask" in batch else None
    pred = outputs["rgb"]
    values = metrics.evaluate_view(protocol, pred, true, mask, networks, colour_corrected=colour_corrected)
    if z is not None and metrics.has_known_depth(true_z := batch["depth_image"][..., 0]):
        values |= metrics.evaluate_depth(z, true_z.to(z))
    if "rgb_rendered" in outputs:
        hidden = outputs.get("unseen", torch.zeros_like(pred[..., :1]))[..., 0] > 0.0
        values["refined"] = float(not torch.equal(outputs["rgb_rendered"][~hidden], pred[~hidden]))
        values["unseen"] = float(hidden.float().mean())
    return values
