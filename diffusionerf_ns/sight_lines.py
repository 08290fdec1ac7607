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
FEWEST = 500  # matched pixels with lines: with less, the same few would be looked at all the time
SAME_SIDE = 0.7  # cosine of the angle between two cameras, seen from a surface, up to which lines begin between them
SAME_SURFACE = 0.05  # relative difference of depth up to which another view sees the same surface
SAMPLES, FIRST, LAST = 18, 0.2, 0.8  # points of a line, as shares of its length, that must be clear
CLEARANCE = 0.1  # of the depth of what is known there, by which they must be before it, in all images from that side
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
    """Lines of sight, drawn at random; none where there would be few.

    Args:
        views: all views.
        nearest: for each, the others that it was matched with.
        matched: planar depth of each view where it is matched, 0 elsewhere. Matches are counted view by view, row by
            row.
        completed: planar depth of all pixels of each view, 0 where it is unknown.
    """
    most = max(len(others) for others in nearest)
    positions = torch.stack([view.position for view in views])
    points, seen_by = [], []
    for index, others in enumerate(nearest):
        there = matched[index] > 0
        surface = (views[index].position + views[index].directions() * matched[index][..., None])[there]
        also = torch.full((len(surface), 1 + most), index, dtype=torch.int32)
        for place, (z, seen) in enumerate(seen_from(index, views, others, matched[index], completed)):
            same = ((seen > 0) & ((seen - z).abs() < SAME_SURFACE * z))[there]
            same &= _cosine(surface, positions[index], positions[others[place]]) > SAME_SIDE
            also[same, 1 + place] = others[place]
        points.append(surface)
        seen_by.append(also)
    surface, cameras = torch.cat(points), torch.cat(seen_by)
    several = torch.nonzero((cameras != cameras[:, :1]).any(dim=1))[:, 0]
    nothing = SightLines(several[:0], surface[:0])
    if len(several) == 0:
        return nothing
    numbers = torch.Generator().manual_seed(0)  # of their own: the training's are as without
    match = several[torch.randint(len(several), (CANDIDATES,), generator=numbers)]
    end, chosen = surface[match], cameras[match].long()
    # Evenly over the hull of the cameras: normalised exponentials are Dirichlet's distribution with parameters of 1.
    share = torch.empty(chosen.shape).exponential_(generator=numbers)
    share[:, 1:] *= chosen[:, 1:] != chosen[:, :1]
    origin = ((share / share.sum(dim=1, keepdim=True))[..., None] * positions[chosen]).sum(dim=1)
    free = torch.ones(CANDIDATES, dtype=torch.bool)
    for index, view in enumerate(views):
        # Cameras on the other side see the back of what is there.
        other_side = _cosine(end, positions[chosen[:, 0]], positions[index]) <= 0.0
        free &= other_side | _is_before(origin, end, view, _known(matched[index], completed[index]))
    lines = SightLines(match[free], origin[free])
    return lines if len(lines.match.unique()) >= FEWEST else nothing


def _cosine(at: Float[Tensor, "n 3"], a: Float[Tensor, "*a 3"], b: Float[Tensor, "*b 3"]) -> Float[Tensor, " n"]:
    """Of the angle between the directions from a point to two others."""
    return F.cosine_similarity(a - at, b - at, dim=-1)


def _is_before(
    origin: Float[Tensor, "n 3"], end: Float[Tensor, "n 3"], view: View, known: Float[Tensor, "h w"]
) -> Bool[Tensor, " n"]:
    """Whether all points of a line that a view shows are before what is known there."""
    share = torch.linspace(FIRST, LAST, SAMPLES)[:, None, None]
    grid, z = view.project(origin + share * (end - origin))
    there = F.grid_sample(known[None, None], grid[None], mode="nearest", align_corners=False)[0, 0]
    return ~((there > 0) & (z > (1.0 - CLEARANCE) * there)).any(dim=0)


def _known(matched: Float[Tensor, "h w"], completed: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """The nearest depth known at or around each pixel, 0 where none is."""
    radius = max(round(AROUND * matched.shape[1]), 1)
    near = [
        -F.max_pool2d(-torch.where(depth > 0, depth, torch.inf)[None], 2 * r + 1, stride=1, padding=r)[0]
        for depth, r in ((matched, radius), (completed, 1))
    ]
    nearest = torch.minimum(*near)
    return torch.where(nearest.isfinite(), nearest, 0.0)
