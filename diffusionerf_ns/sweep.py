"""Plane-sweep stereo: depth of each image, kept where another image confirms it.

Every pixel of a view is tried at a number of depths, and the depth at which the other views look most alike wins
(Collins 1996; Yang and Pollefeys 2003), with a say of the pixels around (`semi_global`). It is silent without texture.

What is swept is a guess of depth times a factor. With a guess of one throughout, these are planes that face the camera.
With depth that was completed from an earlier sweep they have the shape of the scene: windows on floors and tables are
not sheared, and as fewer depths are tried, of which most are wrong for a reason, weaker texture decides between them.

Notation
    z       planar depth in the reference view, scene units
    g       the guess of z, scene units; 0 where there is none
    q       factor: z = g / q; swept uniformly
    ncc     normalised cross-correlation of two 5 x 5 windows, in [-1, 1], see `correlation`
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffusionerf_ns import correlation, semi_global
from diffusionerf_ns.cross_check import confirmed, contradicted
from diffusionerf_ns.views import View

MAX_PLANES = 128  # depths of a sweep
FEWEST_PLANES = 8  # with less, two images say next to nothing of depth
TOLERANCE = 0.03  # relative difference of depth up to which two views agree
SEEN_THROUGH = 0.05  # relative difference of depth from which a view that sees farther contradicts


@dataclass(frozen=True)
class Thresholds:
    """What a winning depth must have to be believed."""

    min_ncc: float
    margin: float
    """By which its aggregated cost must be below that of all depths that are not its neighbours."""
    texture: float
    """Variance of grey values, in [0, 1], of windows with much less of which the correlation says nothing."""


AMONG_ALL_DEPTHS = Thresholds(min_ncc=0.7, margin=0.1, texture=3e-5)
ABOUT_A_GUESS = Thresholds(min_ncc=0.5, margin=0.03, texture=5e-6)


@torch.no_grad()
def agreed_depth(
    views: Sequence[View],
    nearest: Sequence[Sequence[int]],
    ranges: Sequence[tuple[float, float]],
    step: float,
    guesses: Sequence[Float[Tensor, "_h _w"]] | None = None,
    known: Sequence[Float[Tensor, "_h _w"]] | None = None,
) -> list[Float[Tensor, "_h _w"]]:
    """Planar depth of each view, 0 where no other view confirms it.

    Args:
        views: all views.
        nearest: for each, the others that it is matched with.
        ranges: near and far end of the depths that are swept in each, scene units, or in shares of the guess.
        step: between two depths of the sweep, in pixels that a point moves in the farthest of the other views; with
            guesses, a point at their median.
        guesses: of planar depth of each view, 0 where there is none; None: depths themselves are swept.
        known: planar depth of each view that an earlier sweep found and that stands, 0 where it found none. It says as
            much of the other views as what is found.
    """
    depths = []
    for index, others in enumerate(nearest):
        guess = torch.ones_like(views[index].grey[0, 0]) if guesses is None else guesses[index]
        thresholds = AMONG_ALL_DEPTHS if guesses is None else ABOUT_A_GUESS
        found = _sweep(views[index], [views[other] for other in others], guess, *ranges[index], step, thresholds)
        depths.append(found if known is None else torch.where(known[index] > 0, known[index], found))
    agreed = [
        torch.where(confirmed(index, views, others, depths, TOLERANCE), depths[index], 0.0)
        for index, others in enumerate(nearest)
    ]
    kept = [
        torch.where(contradicted(index, views, others, agreed, SEEN_THROUGH), 0.0, agreed[index])
        for index, others in enumerate(nearest)
    ]
    return kept if known is None else [torch.where(before > 0, before, now) for before, now in zip(known, kept)]


def _sweep(
    reference: View,
    others: Sequence[View],
    guess: Float[Tensor, "h w"],
    near: float,
    far: float,
    step: float,
    thresholds: Thresholds,
) -> Float[Tensor, "h w"]:
    """Winning depth of one view, 0 where no depth stands out."""
    nothing = torch.zeros_like(guess)
    if not bool((guess > 0).any()):
        return nothing
    baseline = max(float((view.position - reference.position).norm()) for view in others)
    moved = (1.0 / near - 1.0 / far) * baseline * float(reference.focal[0]) / float(guess[guess > 0].median())
    # More depths than the images can tell apart would make every winner its own neighbours' rival.
    planes = min(math.ceil(moved / step), MAX_PLANES)
    if planes < FEWEST_PLANES:
        return nothing
    q = torch.linspace(1.0 / near, 1.0 / far, planes)
    ncc = _likeness(reference, others, reference.directions() * guess[..., None], q, thresholds.texture)
    score = -semi_global.aggregate(1.0 - ncc, reference.grey[0, 0])
    top, winner = score.max(dim=0)
    neighbours = (torch.arange(planes)[:, None, None] - winner).abs() <= 3
    rival = score.masked_fill(neighbours, -torch.inf).max(dim=0).values
    sure = (ncc.gather(0, winner[None])[0] > thresholds.min_ncc) & (top - rival > thresholds.margin)
    sure &= (winner > 0) & (winner < planes - 1) & (guess > 0)
    refined = q[0] + (q[1] - q[0]) * (winner + _parabola(score, winner))
    return torch.where(sure, guess / refined, nothing)


def _likeness(
    reference: View,
    others: Sequence[View],
    offsets: Float[Tensor, "h w 3"],
    q: Float[Tensor, " planes"],
    texture: float,
) -> Float[Tensor, "planes h w"]:
    """ncc of each pixel, its surface at the view's position + ``offsets`` / q, with the view that is most alike."""
    moments = correlation.window_moments(reference.grey)
    scores = []
    for factor in q:
        points = reference.position + offsets / factor
        best = torch.full_like(reference.grey, -1.0)
        for view in others:
            grid, _ = view.project(points)
            warped = F.grid_sample(view.grey, grid[None], align_corners=False)
            inside = (grid.abs() < 1.0).all(-1)[None, None]
            ncc = correlation.normalised_cross_correlation(reference.grey, moments, warped, texture)
            # The best view, not the mean: with wide baselines many points are hidden in one of the others.
            best = torch.maximum(best, torch.where(inside, ncc, torch.zeros_like(ncc)))
        scores.append(best[0, 0])
    return torch.stack(scores)


def _parabola(score: Float[Tensor, "planes h w"], winner: Tensor) -> Float[Tensor, "h w"]:
    """Offset in planes of the peak of the parabola through the winner and its neighbours, in [-0.5, 0.5]."""
    last = score.shape[0] - 1
    below, at, above = (score.gather(0, (winner + k).clamp(0, last)[None])[0] for k in (-1, 0, 1))
    return (0.5 * (below - above) / (below - 2.0 * at + above).clamp_max(-1e-6)).clamp(-0.5, 0.5)
