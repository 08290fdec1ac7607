"""The terms that DiffusioNeRF adds to the photometric loss: pure functions, tensors in, tensors out.

Notation
    w      rendering weight of a sample along its ray              [rays, samples], >= 0, sum <= 1
    t      distance along the ray, of interval edges t[i], t[i+1]  [rays, samples + 1], scene units
    n      number of training frusta that see a sample             [rays, samples], integers
    x      RGBD patch as the prior sees it                         [patches, 4, P, P], in [-1, 1]
    s      score of the prior, grad log p(x)                       as x
    z      planar depth in metres                                  [patches, P, P]

The geometric terms are means over rays (the paper sums over its 1,024), so their weights do not change with the number
of rays. Two things differ: the score's loss is a sum over the pixels of a patch; and the frustum term, where only patch
rays are asked, is their sum divided by all rays of the step.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def score_pseudo_loss(x: Float[Tensor, "b 4 p p"], weighted_score: Float[Tensor, "b 4 p p"]) -> Float[Tensor, ""]:
    """L = -sum(weighted_score * x) / b with the score held constant, so that dL/dx = -weighted_score / b exactly.

    The value means nothing; only its gradient does (paper eq. 7).
    """
    return -(weighted_score.detach() * x).sum() / x.shape[0]


def weigh_score(
    score: Float[Tensor, "b 4 p p"],
    z: Float[Tensor, "b p p"],
    *,
    depth_weight: float,
    rgb_weight: float,
    rgb_norm: float | None,
    max_depth: float,
) -> Float[Tensor, "b 4 p p"]:
    """The weights of the authors' code, applied to a score.

    Args:
        score: as the prior gives it.
        z: planar depth in metres; the depth channel is multiplied by it, since inverse depth starves far surfaces.
        depth_weight: weight of the depth channel.
        rgb_weight: weight of the colour channels.
        rgb_norm: the colour score of each patch is rescaled to this L2 norm; None leaves it as it is.
        max_depth: z is held below this, metres: beyond it the encoding is flat and the product only noise.
    """
    depth = depth_weight * score[:, 3:] * z.detach().clamp_max(max_depth).unsqueeze(1)
    if rgb_weight == 0.0:
        return torch.cat([torch.zeros_like(score[:, :3]), depth], dim=1)
    rgb = score[:, :3]
    if rgb_norm is not None:
        rgb = rgb * (rgb_norm / rgb.flatten(1).norm(dim=1).clamp_min(1e-8))[:, None, None, None]
    return torch.cat([rgb_weight * rgb, depth], dim=1)


def chroma(difference: Float[Tensor, "rays 3"]) -> Float[Tensor, ""]:
    """Mean square of what is not grey in the difference of rendered and true colours."""
    return (difference - difference.mean(dim=-1, keepdim=True)).square().mean()


def foreground(w: Float[Tensor, "rays samples"], opaque: Bool[Tensor, " rays"] | None = None) -> Float[Tensor, ""]:
    """Mean over rays of (1 - sum_i w_i)^2: every ray must meet a surface (paper eq. 4).

    Args:
        w: weights.
        opaque: rays of which it is asked; None: all.
    """
    missed = (1.0 - w.sum(-1)).square()
    return missed.mean() if opaque is None else (missed * opaque).sum() / opaque.sum().clamp_min(1)


def frustum(
    w: Float[Tensor, "rays samples"], n: Int[Tensor, "rays samples"], required: Int[Tensor, " rays"] | int
) -> Float[Tensor, ""]:
    """Mean over rays of sum_i w_i max(required - n_i, 0): density that too few training views see costs.

    Authors' code: ``required`` is 2 on the pixel rays of training views (here as configured) and 1 on patch rays, which
    look elsewhere. The paper's text (eq. 3) has the indicator n <= 1 instead of the difference.
    """
    need = required[:, None] if isinstance(required, Tensor) else required
    return (w * (need - n).clamp_min(0).to(w.dtype)).sum(-1).mean()


def distortion_per_ray(w: Float[Tensor, "rays samples"], t: Float[Tensor, "rays edges"]) -> Float[Tensor, " rays"]:
    """sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 (t_{i+1} - t_i), m the midpoints (mip-NeRF 360 eq. 15).

    In linear time: the midpoints are sorted, so sum_ij w_i w_j |m_i - m_j| = 2 sum_i w_i (m_i W_i - M_i) with the
    prefix sums W_i = sum_{j<i} w_j, M_i = sum_{j<i} w_j m_j. The authors' code drops the second term by accident.
    """
    m = 0.5 * (t[:, 1:] + t[:, :-1])
    wm = w * m
    before = w.cumsum(-1) - w
    before_m = wm.cumsum(-1) - wm
    between = 2.0 * (wm * before - w * before_m).sum(-1)
    within = (w.square() * (t[:, 1:] - t[:, :-1])).sum(-1) / 3.0
    return between + within


def distortion(
    w: Float[Tensor, "rays samples"],
    t: Float[Tensor, "rays edges"],
    expected_depth: Float[Tensor, " rays"],
    far: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """Mean over rays of the distortion divided by the ray's (constant) expected depth: free of scene units.

    Args:
        w: weights.
        t: interval edges, scene units.
        expected_depth: distance along the ray, scene units.
        far: edges are held below this: behind the scene's far bound intervals grow without limit and a trace of weight
            there would outweigh everything else.
    """
    return (distortion_per_ray(w, t.clamp_max(far)) / expected_depth.detach().clamp_min(1e-6)).mean()


def whole_weights(w: Float[Tensor, "rays samples"]) -> Float[Tensor, "rays samples"]:
    """Weights that sum to 1: the light that no sample stops is taken to come from the last one.

    Without it a ray that meets nothing at all would cost nothing in `known_depth` and `coarse_depth`.
    """
    return torch.cat([w[:, :-1], w[:, -1:] + 1.0 - w.sum(-1, keepdim=True)], dim=-1)


def known_depth(
    w: Float[Tensor, "rays samples"], t: Float[Tensor, "rays edges"], known: Float[Tensor, " rays"]
) -> Float[Tensor, ""]:
    """Mean over rays of sum_i w_i |log(m_i / known)|, m the midpoints: weight anywhere but at the surface costs.

    The mean depth would not do: fog before the surface and a wall far behind it can have the right one. Free of scene
    units; of logarithms, so that a wrong match and light that reaches the ray's end weigh little.

    Args:
        w: weights; what they lack of 1 lies at the ray's end.
        t: interval edges, > 0.
        known: distance along the ray to the surface, in the units of ``t``.
    """
    return (whole_weights(w) * _log_ratio(t, known).abs()).sum(-1).mean()


def coarse_depth(
    w: Float[Tensor, "rays samples"],
    t: Float[Tensor, "rays edges"],
    coarse: Float[Tensor, " rays"],
    margin: Float[Tensor, " rays"],
    trust: Float[Tensor, " rays"] | float = 1.0,
) -> Float[Tensor, ""]:
    """The same where the surface is known roughly: weight costs as far as log(m_i / coarse) leaves a range about 0.

    That range is log(1 - margin) before the surface and log(1 + 1.5 margin) behind it.

    Args:
        w: weights; what they lack of 1 lies at the ray's end.
        t: interval edges, > 0.
        coarse: distance along the ray to about where the surface is, in the units of ``t``; 0 where unknown, which
            costs nothing.
        margin: relative error that costs nothing, in [0, 1).
        trust: factor of each ray's cost.
    """
    error = _log_ratio(t, torch.where(coarse > 0, coarse, 1.0))
    before, behind = (1.0 - margin).log()[:, None], (1.0 + 1.5 * margin).log()[:, None]
    cost = (whole_weights(w) * ((before - error).clamp_min(0.0) + (error - behind).clamp_min(0.0))).sum(-1)
    return torch.where(coarse > 0, trust * cost, 0.0).mean()


def _log_ratio(t: Float[Tensor, "rays edges"], known: Float[Tensor, " rays"]) -> Float[Tensor, "rays samples"]:
    """log(m / known) of the midpoints m."""
    return (0.5 * (t[:, 1:] + t[:, :-1]) / known[:, None]).log()
