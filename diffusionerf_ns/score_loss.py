"""The score term: what the prior wants of rendered patches, as a loss. The maths is in `regularizers`."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.rays import RaySamples
from torch import Tensor

from ddm_training import rgbd
from diffusionerf_ns import regularizers
from diffusionerf_ns.contract import PatchBatch
from diffusionerf_ns.model_config import DiffusioNeRFModelConfig
from diffusionerf_ns.prior import PatchPrior


@dataclass(frozen=True)
class JudgedPatch:
    """A patch that the prior judged in training; tensors as the score term left them."""

    x: Float[Tensor, "4 p p"]
    """As the prior sees it."""
    score: Float[Tensor, "4 p p"]
    tau: float
    """Noise level of the step."""
    origin: Float[Tensor, "3"]
    """Centre of its camera, scene units."""
    corners: Float[Tensor, "4 3"]
    """Directions of its corner rays: upper left, upper right, lower left, lower right."""

    @classmethod
    def of(
        cls,
        samples: RaySamples,
        batch: PatchBatch,
        x: Float[Tensor, "b 4 p p"],
        score: Float[Tensor, "b 4 p p"],
        tau: float,
    ) -> "JudgedPatch":
        """The first patch of a step; every step pays for this, so nothing is copied or waited for.

        Args:
            samples: of the step's rays.
            batch: which of them are the patches'.
            x: the patches as the prior sees them.
            score: theirs.
            tau: noise level of the step.
        """
        p, first = batch.size, batch.first_ray
        corners = [first, first + p - 1, first + p * (p - 1), first + p * p - 1]
        frustums = samples.frustums
        directions = torch.stack([frustums.directions[ray, 0] for ray in corners])
        origin = frustums.origins[first, 0]
        # A camera optimiser's rays have a gradient, and would keep all of the step.
        return cls(x=x[0], score=score[0], tau=tau, origin=origin.detach(), corners=directions.detach())


def score_loss(
    config: DiffusioNeRFModelConfig,
    outputs: dict[str, Any],
    patches: PatchBatch,
    prior: PatchPrior,
    *,
    tau: float,
    factor: float,
    log: dict[str, Any],
) -> tuple[Float[Tensor, ""], JudgedPatch]:
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
    last = JudgedPatch.of(outputs["ray_samples_list"][-1], patches, x.detach(), score, tau)
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
