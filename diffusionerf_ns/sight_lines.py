"""Lines of sight from between the cameras to matched surfaces, along which nothing is known to stand.

What several cameras see with nothing before it is mostly seen from between them as well. Where a floater stands in the
way there, no training image shows it, and no other term costs it anything. But a thin thing, such as the back of a
chair, may stand between two cameras' lines of sight to a wall: lines that come near anything known are left out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffusionerf_ns.working_view import View, seen_from

CANDIDATES = 40_000  # lines that are tried
SAME_SIDE = 0.7  # least cosine between the directions in which two cameras lie from a surface
SAME_SURFACE = 0.05  # relative difference of depth up to which another view sees the same surface
SAMPLES, FIRST, LAST = 18, 0.2, 0.8  # points of a line, as shares of its length, that must be clear
CLEARANCE = 0.1  # of the depth of what is known there, by which they must be before it, in all images
AROUND = 0.04  # of the width of the image: what is matched that near counts as there


@dataclass(frozen=True)
class SightLines:
    """See the module."""

    match: Int[Tensor, " n"]
    """Index of the matched pixel at whose surface a line ends."""
    origin: Float[Tensor, "n 3"]
    """Where it begins, scene units."""

    def __len__(self) -> int:
        return len(self.match)


def find(
    views: list[View],
    nearest: list[list[int]],
    matched: list[Float[Tensor, "_h _w"]],
    completed: list[Float[Tensor, "_h _w"]],
) -> SightLines:
    """Random lines of sight.

    Args:
        views: all views.
        nearest: for each, the others that it was matched with.
        matched: planar depth of each view where it is matched, 0 elsewhere. Matches are counted view by view, row by
            row.
        completed: planar depth of all pixels of each view, 0 where it is unknown.
    """
    most = max(len(others) for others in nearest)
    points, seen_by = [], []
    for index, others in enumerate(nearest):
        there = matched[index] > 0
        points.append((views[index].position + views[index].directions() * matched[index][..., None])[there])
        also = torch.full((len(points[-1]), 1 + most), index)
        for place, (z, seen) in enumerate(seen_from(index, views, others, matched[index], completed)):
            same = ((seen > 0) & ((seen - z).abs() < SAME_SURFACE * z))[there]
            also[same, 1 + place] = others[place]
        seen_by.append(also)
    surface, cameras = torch.cat(points), torch.cat(seen_by)
    centres = torch.stack([view.position for view in views])[cameras]
    towards = F.normalize(centres - surface[:, None], dim=-1)
    counts = (cameras != cameras[:, :1]) & ((towards * towards[:, :1]).sum(dim=-1) > SAME_SIDE)
    several = torch.nonzero(counts.any(dim=1))[:, 0]
    counts[:, 0] = True
    if len(several) == 0:
        return SightLines(several, surface[several])
    match = several[torch.randint(len(several), (CANDIDATES,))]
    # Evenly over the hull of the cameras: normalised exponentials are Dirichlet's distribution with parameters of 1.
    share = torch.empty(CANDIDATES, 1 + most).exponential_() * counts[match]
    origin = ((share / share.sum(dim=1, keepdim=True))[..., None] * centres[match]).sum(dim=1)
    free = _are_free(origin, surface[match], views, [_known(m, c) for m, c in zip(matched, completed)])
    return SightLines(match[free], origin[free])


def _are_free(
    origin: Float[Tensor, "n 3"], end: Float[Tensor, "n 3"], views: list[View], known: list[Float[Tensor, "_h _w"]]
) -> Bool[Tensor, " n"]:
    """Whether the line is before all that is known, in all images that show it."""
    share = torch.linspace(FIRST, LAST, SAMPLES)[:, None, None]
    points = origin + share * (end - origin)
    free = torch.ones(len(origin), dtype=torch.bool)
    for view, depth in zip(views, known):
        grid, z = view.project(points)
        there = F.grid_sample(depth[None, None], grid[None], mode="nearest", align_corners=False)[0, 0]
        free &= ~((there > 0) & (z > (1.0 - CLEARANCE) * there)).any(dim=0)
    return free


def _known(matched: Float[Tensor, "h w"], completed: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """The nearest depth known at or around each pixel, 0 where none is."""
    radius = max(round(AROUND * matched.shape[1]), 1)
    near = [
        -F.max_pool2d(-torch.where(depth > 0, depth, torch.inf)[None], 2 * r + 1, stride=1, padding=r)[0]
        for depth, r in ((matched, radius), (completed, 1))
    ]
    nearest = torch.minimum(*near)
    return torch.where(nearest.isfinite(), nearest, 0.0)
