"""What the depth of one view says about that of another: the same surface, or that it sees through it.

A surface that lies behind what another view sees may be hidden there: that says nothing.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from diffusionerf_ns.views import View

COMPLETED_TOLERANCE = 0.05  # relative difference of completed depth up to which two views agree
COMPLETED_SEEN_THROUGH = 0.1  # from which a view that sees farther contradicts


def confirmed(
    index: int,
    views: Sequence[View],
    others: Sequence[int],
    depths: Sequence[Float[Tensor, "_h _w"]],
    tolerance: float,
) -> Bool[Tensor, "h w"]:
    """Where some other view has the same surface, up to a relative difference of depth.

    Args:
        index: of the view in question.
        views: all views.
        others: those that it is compared with.
        depths: planar depth of each view, scene units; 0 where unknown.
        tolerance: that difference.
    """
    same = torch.zeros_like(depths[index], dtype=torch.bool)
    for z, seen in _seen(index, views, others, depths):
        same |= (seen > 0) & ((seen - z).abs() < tolerance * z)
    return same


def contradicted(
    index: int,
    views: Sequence[View],
    others: Sequence[int],
    depths: Sequence[Float[Tensor, "_h _w"]],
    seen_through: float,
) -> Bool[Tensor, "h w"]:
    """Where some other view sees through a surface to one that is farther away by that relative difference.

    Args:
        index, views, others, depths: as of `confirmed`.
        seen_through: that difference.
    """
    against = torch.zeros_like(depths[index], dtype=torch.bool)
    for z, seen in _seen(index, views, others, depths):
        against |= (seen > 0) & (seen - z > seen_through * z)
    return against


def check_completed(
    views: Sequence[View], nearest: Sequence[Sequence[int]], completed: Sequence[Float[Tensor, "_h _w"]]
) -> tuple[list[Float[Tensor, "_h _w"]], list[Bool[Tensor, "_h _w"]]]:
    """Completed depth without what another view contradicts, and where another view confirms it.

    Views that are completed alone are mostly right where two say the same (`docs/findings.md`, fifth round).

    Args:
        views: all views.
        nearest: for each, the others that it is compared with.
        completed: planar depth of each view, scene units; 0 where unknown.

    Returns:
        For each view the depth that is left, 0 where unknown or contradicted, and where it is confirmed.
    """
    kept, sure = [], []
    for index, others in enumerate(nearest):
        against = contradicted(index, views, others, completed, COMPLETED_SEEN_THROUGH)
        kept.append(torch.where(against, 0.0, completed[index]))
        sure.append(confirmed(index, views, others, completed, COMPLETED_TOLERANCE) & ~against)
    return kept, sure


def _seen(
    index: int, views: Sequence[View], others: Sequence[int], depths: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each of the other views: depth there of the surfaces that a view found, and of what it found itself there."""
    reference = views[index]
    points = reference.position + reference.directions() * depths[index][..., None]
    for other in others:
        grid, z = views[other].project(points)
        yield z, F.grid_sample(depths[other][None, None], grid[None], mode="nearest", align_corners=False)[0, 0]
