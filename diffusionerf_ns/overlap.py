"""Which views stereo compares with one another, and over which depths: for rings, lines, close-ups and distant views.

Notation
    b       distance of two cameras, scene units
    z       planar depth in a view, scene units
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffusionerf_ns.views import View

NEIGHBOURS = 4  # views that a view is compared with, the nearest ones: work stays linear in the number of views
SAME_PLACE = 0.01  # of the largest b: a picture from nearer by looks the same at every depth
LEAST_BASELINE = 0.05  # of the depth: from nearer by a wrong depth looks as good as the right one
LEAST_POINTS = 200  # that lie in a view, to say how deep it is
BEFORE, BEHIND = 0.7, 1.5  # times the nearest and the farthest depth: the room that is left around them
NEAREST = 0.002  # of the pixels, without speckle: an object that so few show counts, if it stands well before the rest


def farthest_point_sampling(positions: Float[Tensor, "n 3"], count: int) -> list[int]:
    """Indices, sorted, of up to ``count`` cameras that are far from one another."""
    if len(positions) <= count:
        return list(range(len(positions)))
    distance = torch.cdist(positions, positions)
    chosen = [int(distance.sum(dim=1).argmax())]
    while len(chosen) < count:
        nearest = distance[:, chosen].amin(dim=1)
        nearest[chosen] = -1.0  # several cameras may stand at one place
        chosen.append(int(nearest.argmax()))
    return sorted(chosen)


def neighbours(distance: Float[Tensor, "n n"], least: Sequence[float]) -> list[list[int]]:
    """For each view the `NEIGHBOURS` nearest ones that are farther than ``least``; else the farthest that there are."""
    found = []
    for index, (row, limit) in enumerate(zip(distance, least)):
        by_distance = [j for j in row.argsort().tolist() if j != index and row[j] > 0]
        far_enough = [j for j in by_distance if row[j] > limit]
        found.append(far_enough[:NEIGHBOURS] or by_distance[: -NEIGHBOURS - 1 : -1])
    return found


def points_of(views: Sequence[View], depths: Sequence[Float[Tensor, "_h _w"]]) -> Float[Tensor, "k 3"]:
    """The surfaces that views found, in the world."""
    return torch.cat(
        [
            view.position + (view.directions() * depth[..., None])[depth > 0]
            for view, depth in zip(views, depths, strict=True)
        ]
    )


def depth_quantiles(
    views: Sequence[View], points: Float[Tensor, "k 3"], quantiles: Sequence[float]
) -> list[list[float] | None]:
    """Of z of those points that lie in each view; None where fewer than `LEAST_POINTS` do."""
    found: list[list[float] | None] = []
    for view in views:
        grid, z = view.project(points)
        inside = z[(grid.abs() < 1.0).all(dim=-1)].numpy()
        found.append(np.quantile(inside, quantiles).tolist() if len(inside) >= LEAST_POINTS else None)
    return found


def near_end(near: float, depth: Float[Tensor, " k"]) -> float:
    """Where depth begins: ``near``, unless some of it lies so much nearer that the room before ``near`` leaves it out.

    A quantile that is safe from wrong depth also leaves out a small object that stands before everything else.

    Args:
        near: a low quantile of depth.
        depth: of all pixels whose depth is known, without speckle.
    """
    nearest = float(np.quantile(depth.numpy(), NEAREST)) if len(depth) else near
    return nearest if nearest < BEFORE * near else near


def widened(near: float, far: float, own: Sequence[Sequence[float] | None]) -> list[tuple[float, float]]:
    """Nearest and farthest depth of each view: of all together, and its own where these leave the room around them.

    Args:
        near, far: of all views together.
        own: of each view its nearest depth first and its farthest last; None where they are not known.
    """
    ranges = []
    for pair in own:
        low, high = (pair[0], pair[-1]) if pair else (near, far)
        begin, end = (near if low >= BEFORE * near else low), (far if high <= BEHIND * far else high)
        ranges.append((begin, end))
    return ranges
