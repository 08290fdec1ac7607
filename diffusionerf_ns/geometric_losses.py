"""The loss terms of geometry, weighted: the paper's, and those of what stereo knows. The maths is in `regularizers`."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.rays import RaySamples
from torch import Tensor

from diffusionerf_ns import regularizers, schedules
from diffusionerf_ns.model_config import DiffusioNeRFModelConfig
from diffusionerf_ns.stereo_rays import StereoBatch
from diffusionerf_ns.visibility import TrainingFrusta


def geometric_losses(
    config: DiffusioNeRFModelConfig,
    outputs: dict[str, Any],
    *,
    step: int,
    total_steps: int,
    bounds: Float[Tensor, "2"],
    frusta: TrainingFrusta | None,
    pixel_rays: int,
    first_patch_ray: int | None,
    opaque: Bool[Tensor, " rays"] | None,
    log: dict[str, Any],
) -> dict[str, Tensor]:
    """Frustum, foreground and distortion terms on all rays.

    A term whose weight is 0 is not computed, nor is the frustum term where it asks for nothing.

    Args:
        config: weights and schedules.
        outputs: of the model for a ray bundle.
        step: of the run.
        total_steps: of the run.
        bounds: where rays begin and end, scene units.
        frusta: of the training cameras; None where they are unknown.
        pixel_rays: number of rays through pixels of training images, which come first.
        first_patch_ray: from which on rays are those of patches; None without patches.
        opaque: rays that are known to meet a surface, where some meet none; None: all do.
        log: gets the unweighted terms.
    """
    weights, edges = _weights_and_edges(outputs)
    losses: dict[str, Tensor] = {}

    boost = schedules.boost(step, steps=config.frustum_boost_steps, after=config.frustum_after)
    views = 0 if frusta is None else min(config.frustum_views, len(frusta))
    first = 0 if views > 1 else first_patch_ray  # of the rays of which something is asked; None: of none
    if config.frustum_weight * boost > 0.0 and frusta is not None and first is not None:
        required = torch.zeros(weights.shape[0], dtype=torch.int64, device=weights.device)
        required[:pixel_rays] = views if views > 1 else 0
        if first_patch_ray is not None:
            required[first_patch_ray:] = 1
        samples: RaySamples = outputs["ray_samples_list"][-1]
        seen = torch.zeros(weights.shape, dtype=torch.int64, device=weights.device)
        seen[first:] = frusta.count(samples.frustums[first:].get_positions().detach(), near=bounds[0])
        log["frustum"] = regularizers.frustum(weights, seen, required)
        losses["frustum_loss"] = config.frustum_weight * boost * log["frustum"]

    if config.foreground_weight > 0.0:
        log["foreground"] = regularizers.foreground(weights, opaque)
        losses["foreground_loss"] = config.foreground_weight * log["foreground"]

    ramp = schedules.ramp(step, total_steps, start=config.distortion_start, end=config.distortion_full)
    if config.distortion_weight * ramp > 0.0:
        log["distortion"] = regularizers.distortion(weights, edges, outputs["expected_depth"][:, 0], far=bounds[1])
        losses["distortion_loss"] = config.distortion_weight * ramp * log["distortion"]
    return losses


def stereo_losses(
    config: DiffusioNeRFModelConfig, outputs: dict[str, Any], stereo: StereoBatch, log: dict[str, Any]
) -> dict[str, Tensor]:
    """What weights cost where stereo knows that no surface is; a term whose weight is 0 is not computed.

    Args:
        config: weights and margins.
        outputs: of the model for a ray bundle.
        stereo: what stereo knows of the bundle's rays.
        log: gets the unweighted terms.
    """
    weights, edges = _weights_and_edges(outputs)
    losses: dict[str, Tensor] = {}
    if config.stereo_depth_weight > 0.0:
        log["stereo_depth"] = regularizers.known_depth(weights[stereo.rays], edges[stereo.rays], stereo.distance)
        losses["stereo_depth_loss"] = config.stereo_depth_weight * log["stereo_depth"]
    if config.completed_depth_weight > 0.0:
        n = len(stereo.completed)
        margin = torch.where(stereo.confirmed, config.confirmed_depth_margin, config.completed_depth_margin)
        margin = margin.minimum(config.completed_error_factor * stereo.error)
        told = stereo.error.isfinite()
        trust = torch.where(told, (config.completed_sure_error / stereo.error).clamp_max(1.0), 1.0)
        log["completed_depth"] = regularizers.coarse_depth(weights[:n], edges[:n], stereo.completed, margin, trust)
        losses["completed_depth_loss"] = config.completed_depth_weight * log["completed_depth"]
    return losses


def _weights_and_edges(outputs: dict[str, Any]) -> tuple[Float[Tensor, "rays samples"], Float[Tensor, "rays edges"]]:
    """Weights of the field's samples, and the edges of their intervals in scene units."""
    frustums = outputs["ray_samples_list"][-1].frustums
    edges = torch.cat([frustums.starts[..., 0], frustums.ends[:, -1:, 0]], dim=-1)
    return outputs["weights_list"][-1][..., 0], edges


def normals_losses(config: DiffusioNeRFModelConfig, outputs: dict[str, Any]) -> dict[str, Tensor]:
    """nerfacto's terms of normals, with its weights; none where ``predict_normals`` is off."""
    if not config.predict_normals:
        return {}
    return {
        "orientation_loss": config.orientation_loss_mult * outputs["rendered_orientation_loss"].mean(),
        "pred_normal_loss": config.pred_normal_loss_mult * outputs["rendered_pred_normal_loss"].mean(),
    }
