"""Depth between the pixels whose depth is known: inverse depth as a membrane that gives way where colours change.

Levin et al. 2004 spread colours along grey values in this way. The first guess of `completion`'s network, and what
there is without one.

`interpolate` solves one image exactly; `interpolate_batch` approximates many at once, on any device, for training.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import solveh_banded
from torch import Tensor
from torch.nn import functional as F

COLOUR_SIGMA = 0.02  # difference of colours, in [0, 1], across which depth may change
WEAKEST_LINK = 1e-3  # between pixels of different colours
ITERATIONS = 32  # of `interpolate_batch`; leave 1.3 % of error or more in one pixel of a hundred, 20 leave 4 %
SWEEPS = 4  # on each level, for the first guess of the iterations
DENSE = 64  # pixels of the coarsest system, which is solved exactly
DAMPING = 0.9  # of a Jacobi sweep
OVERSHOOT = 1.7  # blocks that are constant make the coarse systems too stiff by about this factor


def interpolate(rgb: Float[np.ndarray, "h w 3"], depth: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Depth of all pixels from those that are known.

    The inverse depth x that minimises sum over neighbours of w_ij (x_i - x_j)^2 plus sum over known pixels of
    (x_i - 1 / depth_i)^2, with w_ij = exp(-|c_i - c_j|^2 / (2 sigma^2)) + `WEAKEST_LINK` of the colours c.

    Args:
        rgb: in [0, 1].
        depth: planar, 0 where unknown; some of it must be known.

    Returns:
        Planar depth in the same units, close to ``depth`` where that is known and nowhere beyond the farthest of it.
    """
    if depth.shape[0] > depth.shape[1]:  # the band of the system is as wide as the columns are long
        return interpolate(rgb.transpose(1, 0, 2), depth.T).T
    colours, known = rgb.transpose(1, 0, 2).astype(np.float64), depth.T > 0
    inverse = np.divide(1.0, depth.T, where=known, out=np.zeros(known.shape))
    width, height = known.shape
    right, down = (
        np.exp(-(np.diff(colours, axis=axis) ** 2).sum(-1) / (2.0 * COLOUR_SIGMA**2)) + WEAKEST_LINK for axis in (0, 1)
    )
    diagonal = known.astype(np.float64)
    diagonal[1:] += right
    diagonal[:-1] += right
    diagonal[:, 1:] += down
    diagonal[:, :-1] += down
    band = np.zeros((height + 1, width, height))
    band[0] = diagonal
    band[1, :, :-1] -= down
    band[height, :-1] -= right
    band, target = band.reshape(height + 1, -1), (known * inverse).ravel()
    x = solveh_banded(band, target, lower=True, overwrite_ab=True, overwrite_b=True, check_finite=False)
    return (1.0 / x.reshape(width, height).clip(min=inverse[known].min())).T.astype(np.float32)


@dataclass(frozen=True)
class _Level:
    """The membrane's linear system on one grid: diagonal x - right and down neighbours, each times its link."""

    diagonal: Float[Tensor, "b h w"]
    right: Float[Tensor, "b h _w"]
    down: Float[Tensor, "b _h w"]
    inverse: Float[Tensor, "b h w"]
    """`DAMPING` / diagonal; 0 where there is no pixel."""

    @classmethod
    def of(
        cls, right: Float[Tensor, "b h _w"], down: Float[Tensor, "b _h w"], data: Float[Tensor, "b h w"]
    ) -> "_Level":
        """From the links and the weights of the data."""
        diagonal = data.clone()
        diagonal[..., :-1] += right
        diagonal[..., 1:] += right
        diagonal[..., :-1, :] += down
        diagonal[..., 1:, :] += down
        inverse = torch.where(diagonal > 0, DAMPING / diagonal.clamp_min(1e-12), 0.0)
        return cls(diagonal, right, down, inverse)

    def residual(self, x: Float[Tensor, "b h w"], target: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
        """target - A x."""
        rest = torch.addcmul(target, self.diagonal, x, value=-1.0)
        rest[..., :-1].addcmul_(self.right, x[..., 1:])
        rest[..., 1:].addcmul_(self.right, x[..., :-1])
        rest[..., :-1, :].addcmul_(self.down, x[..., 1:, :])
        rest[..., 1:, :].addcmul_(self.down, x[..., :-1, :])
        return rest

    def sweep(self, x: Float[Tensor, "b h w"], target: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
        """One damped Jacobi step."""
        return torch.addcmul(x, self.inverse, self.residual(x, target))


def _even(x: Float[Tensor, "b h w"]) -> Float[Tensor, "b _h _w"]:
    """Sides of an even number of pixels, with zeros beyond."""
    return F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)) if x.shape[-1] % 2 or x.shape[-2] % 2 else x


def _coarser(x: Float[Tensor, "b h w"]) -> Float[Tensor, "b _h _w"]:
    return F.avg_pool2d(_even(x), 2)


def _finer(x: Float[Tensor, "b h w"], like: Float[Tensor, "b _h _w"]) -> Float[Tensor, "b _h _w"]:
    fine = F.interpolate(x[:, None], scale_factor=2.0, mode="nearest")[:, 0]
    return fine[..., : like.shape[-2], : like.shape[-1]]


def _pyramid(
    right: Float[Tensor, "b h _w"], down: Float[Tensor, "b _h w"], data: Float[Tensor, "b h w"]
) -> list[_Level]:
    """The system for images that are constant in blocks of 1, 2, 4, ... pixels of a side, a quarter of it each time."""
    levels = [_Level.of(right, down, data)]
    while data[0].numel() > DENSE and min(data.shape[1:]) > 2:
        across, along = right[..., 1::2], down[..., 1::2, :]  # those between blocks
        right = 0.5 * F.avg_pool2d(F.pad(across, (0, 0, 0, across.shape[-2] % 2)), (2, 1))
        down = 0.5 * F.avg_pool2d(F.pad(along, (0, along.shape[-1] % 2)), (1, 2))
        data = _coarser(data)
        levels.append(_Level.of(right, down, data))
    return levels


def _dense_inverse(level: _Level) -> Float[Tensor, "b n n"]:
    """A^-1 of a small system; the pixels beyond an odd side, which are tied to nothing, stay 0."""
    diagonal, down = level.diagonal.flatten(1), level.down.flatten(1)
    nothing = (diagonal == 0).to(diagonal)
    right = F.pad(level.right, (0, 1)).flatten(1)[:, :-1]
    links = torch.diag_embed(right, 1) + torch.diag_embed(down, level.diagonal.shape[2])
    matrix = torch.diag_embed(diagonal + nothing) - links - links.mT
    return torch.linalg.inv_ex(matrix)[0] - torch.diag_embed(nothing)


def _cycle(levels: list[_Level], coarsest: Float[Tensor, "b n n"], target: Float[Tensor, "b h w"]) -> Tensor:
    """About A^-1 target [b, h, w]: a symmetric multigrid cycle, which preconditions the conjugate gradients."""
    if len(levels) == 1:
        return (coarsest @ target.flatten(1)[..., None]).view_as(target)
    level = levels[0]
    x = level.inverse * target
    rest = _cycle(levels[1:], coarsest, _coarser(level.residual(x, target)))
    return level.sweep(torch.add(x, _finer(rest, x), alpha=OVERSHOOT), target)


def _dot(a: Float[Tensor, "b h w"], b: Float[Tensor, "b h w"]) -> Float[Tensor, "b 1 1"]:
    return (a * b).sum(dim=(1, 2), keepdim=True)


def interpolate_batch(rgb: Float[Tensor, "b 3 h w"], depth: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """What `interpolate` gives for each image, nearly: `ITERATIONS` of conjugate gradients, without a word to the host.

    Args:
        rgb: in [0, 1].
        depth: planar, 0 where unknown.

    Returns:
        Planar depth in the same units, within 1.5 % of `interpolate`'s in 99 of 100 pixels of made-up matches; 1 all
        over an image of which nothing is known.
    """
    known = depth > 0
    some = known.flatten(1).any(dim=1)[:, None, None]
    data = torch.where(some, known.to(depth), 1.0)  # without any the system has no solution
    target = torch.where(known, 1.0 / depth.clamp_min(1e-12), 0.0)
    right, down = (
        torch.exp(-rgb.diff(dim=axis).square().sum(1) / (2.0 * COLOUR_SIGMA**2)) + WEAKEST_LINK for axis in (3, 2)
    )
    levels = _pyramid(right, down, data)
    targets = [target]
    for _ in levels[1:]:
        targets.append(_coarser(targets[-1]))
    coarsest = _dense_inverse(levels[-1])
    x = _cycle(levels[-1:], coarsest, targets[-1])
    for level, fine in zip(levels[-2::-1], targets[-2::-1]):
        x = _finer(x, fine)
        for _ in range(SWEEPS):
            x = level.sweep(x, fine)

    rest = levels[0].residual(x, target)
    step = ahead = _cycle(levels, coarsest, rest)
    power, nought = _dot(rest, ahead), torch.zeros_like(rest)
    for _ in range(ITERATIONS):
        back = levels[0].residual(step, nought)  # - A step
        length = power / (-_dot(step, back)).clamp_min(1e-30)
        x, rest = torch.addcmul(x, length, step), torch.addcmul(rest, length, back)
        ahead = _cycle(levels, coarsest, rest)
        before, power = power, _dot(rest, ahead)
        step = torch.addcmul(ahead, power / before.clamp_min(1e-30), step)
    farthest = torch.where(known, target, torch.inf).amin(dim=(1, 2), keepdim=True)
    return torch.where(some, 1.0 / torch.maximum(x, farthest), 1.0)
