"""The score term: what the prior wants of rendered patches, as a loss. The maths is in `regularizers`."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ddm_training import rgbd
from diffusionerf_ns import regularizers
from diffusionerf_ns.datamanager import PatchBatch
from diffusionerf_ns.model_config import DiffusioNeRFModelConfig
from diffusionerf_ns.prior import PatchPrior
from diffusionerf_ns.viewer import LastPatch


def score_loss(
    config: DiffusioNeRFModelConfig,
    outputs: dict[str, Any],
    patches: PatchBatch,
    prior: PatchPrior,
    *,
    tau: float,
    factor: float,
    log: dict[str, Any],
) -> tuple[Float[Tensor, ""], LastPatch]:
    """The pseudo-loss whose gradient with respect to the patches is minus the weighted score.

    Args:
        config: how the score is scaled, and the weights of colour and depth.
        outputs: of the model for a ray bundle.
        patches: which rays of the bundle are patches.
        prior: that judges them.
        tau: noise level of the step.
        factor: weight of the term at the step.
        log: gets the root mean square of both scores, and tau.

    Returns:
        The loss, and the first patch with its score, for the viewer.
    """
    x, z = encode_patches(outputs, patches, prior.spec.near)
    score = prior.score(x, tau, replay=True)
    if config.score_scaling == "variance":
        factor *= prior.sigma(tau) ** 2 / patches.size**2
    weighted = regularizers.weigh_score(
        score,
        z,
        depth_weight=factor * config.score_depth_weight,
        rgb_weight=factor * config.score_rgb_weight,
        rgb_norm=config.score_rgb_norm,
        max_depth=config.score_max_depth,
    )
    log["score_depth_rms"] = score[:, 3].square().mean().sqrt()
    log["score_rgb_rms"] = score[:, :3].square().mean().sqrt()
    log["tau"] = torch.tensor(tau)
    last = LastPatch.of(outputs["ray_samples_list"][-1], patches, x.detach(), score, tau)
    return regularizers.score_pseudo_loss(x, weighted), last


def encode_patches(
    outputs: dict[str, Any], patches: PatchBatch, near: float
) -> tuple[Float[Tensor, "b 4 p p"], Float[Tensor, "b p p"]]:
    """The patches as the prior sees them, and their planar depth in metres.

    Args:
        outputs: of the model for a ray bundle.
        patches: which rays of the bundle are patches, and those colours of training images that replace rendered ones:
            no gradient reaches the NeRF's colours then.
        near: the prior's nearest depth, metres.
    """
    shape = (len(patches), patches.size, patches.size)
    z = outputs["planar_depth"][patches.first_ray :, 0].reshape(shape)
    rgb = outputs["rgb"][patches.first_ray :].reshape(*shape, 3).permute(0, 3, 1, 2)
    known = [None if c is None else c.permute(2, 0, 1) for c in patches.rgb]
    rgb = torch.stack([rendered if c is None else c.to(rendered) for rendered, c in zip(rgb, known)])
    return rgbd.encode(rgb, z, near), z
