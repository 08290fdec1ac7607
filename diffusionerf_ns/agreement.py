"""Depth completed for the images of a capture together: none may show a surface before what another one sees.

A network completes each image by what it knows of the world, and where it is wrong, images mostly contradict one
another: one sees through a wall that another one has. So a copy of the network is trained for a moment on the capture
itself, to contradict itself less and to change as little as it can. (Test-time training; Luo et al. 2020, "Consistent
Video Depth Estimation", train a network on a video so that points keep their place.) As it is the network that
changes, and not the depth of single pixels, walls move as a whole.

That a surface lies *behind* what another image sees asks for nothing: it may be hidden there.

Notation
    log_z    logarithm of planar depth, scene units, as the copy completes it                   [h, w] of each image
    first    the same as the network completes each image alone                                [h, w]
    b        expected |error| of ``first`` as the network tells it, and `MORE_B`                [h, w]
    r        of a point of one image, seen from another: log of its depth there, less log_z of what is seen there; the
             point is before what is seen if it is negative

h and w are those of the few pixels that the network sees.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.nn import functional as F

from ddm_training.completion import CompletionInput, DepthCompleter
from diffusionerf_ns.completion import Completed, alone
from diffusionerf_ns.views import MatchedView

LEARNING_RATE = 1e-4
MAX_VIEWS = 12  # with more, most is matched, and the time would grow with them
TOLERANCE = 0.02  # of r, up to which two depths are one
MOST = 1.0  # of r: what is farther apart is no worse
MORE_B = 0.02  # added to the error that the network tells
ANCHOR_WEIGHT = 0.15
WRONG_MATCH = 0.2  # difference in log depth from a match, from which on more costs no more


@dataclass
class _Image:
    """A view as the network sees it."""

    source: MatchedView
    given: CompletionInput
    first: Float[Tensor, "h w"]
    log_b: Float[Tensor, "h w"]
    b: Float[Tensor, "h w"] = field(init=False)
    matched: Bool[Tensor, "h w"] = field(init=False)
    log_matched: Float[Tensor, "h w"] = field(init=False)
    directions: Float[Tensor, "h w 3"] = field(init=False)
    mask: Float[Tensor, "h w"] = field(init=False)

    def __post_init__(self) -> None:
        known = self.given.known[0]
        size = (known.shape[0], known.shape[1])
        self.b = self.log_b.exp() + MORE_B
        self.matched = known > 0
        self.log_matched = torch.where(self.matched, known.clamp_min(1e-12).log(), 0.0)
        self.directions = self.source.view.directions(size)
        mask = self.source.mask
        self.mask = torch.ones(size) if mask is None else F.adaptive_avg_pool2d(mask[None].float(), size)[0]


def can_complete_together(count: int, steps: int) -> bool:
    """Whether so many views are completed together, as far as their number and that of the steps decide it."""
    return steps > 0 and count <= MAX_VIEWS


def complete_together(network: DepthCompleter, views: Sequence[MatchedView], steps: int) -> list[Completed]:
    """Depth of all pixels of each view, and the relative error to expect: a `completion.Completer`.

    Args:
        network: that completes an image; it is left as it is.
        views: of a capture. More than `MAX_VIEWS` are completed each alone.
        steps: of the training; 0 completes each view alone.

    Returns:
        One for each view, in its pixels; the error is at least what the depth was changed by.
    """
    places = [place for place, view in enumerate(views) if view.is_matched]
    compared = any(other in places for place in places for other in views[place].nearest)
    if not compared or not can_complete_together(len(views), steps):
        return alone(network.complete)(views)
    images: dict[int, _Image] = {}
    for place in places:
        given = network.see(views[place].rgb, views[place].depth)
        with torch.no_grad():
            first, log_b = network(*given)
        images[place] = _Image(views[place], given, first[0], log_b[0])
    trained = _train(copy.deepcopy(network), images, steps)
    completed = [
        _completed(network, trained, images[k]) if k in images else Completed.unknown(view)
        for k, view in enumerate(views)
    ]
    if not all(bool(c.depth.isfinite().all()) for c in completed):
        CONSOLE.print("[yellow]The images' depth could not be brought to agree (not finite): each is completed alone.")
        return alone(network.complete)(views)
    return completed


@torch.no_grad()
def _completed(network: DepthCompleter, trained: DepthCompleter, image: _Image) -> Completed:
    """What both make of an image: by as much as it was changed, the new depth may at least be wrong."""
    size = (image.source.depth.shape[0], image.source.depth.shape[1])
    log_z, _ = trained(*image.given)
    depth, error = network.enlarge(log_z, image.log_b[None], size)
    first, _ = network.enlarge(image.first[None], image.log_b[None], size)
    return Completed(depth, error.maximum((depth / first).log().abs()), alone=first)


@torch.enable_grad()
def _train(network: DepthCompleter, images: dict[int, _Image], steps: int) -> DepthCompleter:
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        log_z = {place: network(*image.given)[0][0] for place, image in images.items()}
        loss = disagreement(images, log_z) + torch.stack([_change(images[k], log_z[k]) for k in images]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False)


def _change(image: _Image, log_z: Float[Tensor, "h w"]) -> Float[Tensor, ""]:
    """How far depth is from its first estimate and from the matches, in errors to expect; mean over the pixels."""
    change = ANCHOR_WEIGHT * (log_z - image.first).abs()
    missed = torch.where(image.matched, (log_z - image.log_matched).abs().clamp_max(WRONG_MATCH), 0.0)
    return ((change + missed) / image.b).mean()


def disagreement(images: dict[int, _Image], log_z: dict[int, Float[Tensor, "_h _w"]]) -> Float[Tensor, ""]:
    """How far surfaces stand before what other images see, in errors to expect; mean over pixels and pairs.

    Of two depths that contradict each other, each gives way by its share of the error to expect of both; matches do
    not give way.

    Args:
        images: by their place in the capture; some of them must be compared with one another.
        log_z: of each, in the pixels that the network sees.
    """
    log_z = {k: torch.where(images[k].matched, images[k].log_matched, z) for k, z in log_z.items()}
    parts = []
    for place, image in images.items():
        for other in image.source.nearest:
            if other not in images:
                continue
            points = image.source.view.position + image.directions * log_z[place].exp()[..., None]
            grid, z = images[other].source.view.project(points)
            seen, b, mask = _look_up([log_z[other], images[other].b, images[other].mask], grid.detach())
            here = z.clamp_min(1e-6).log()
            share = image.b / (image.b + b)
            violation = share * _before(here - seen.detach()) + (1.0 - share) * _before(here.detach() - seen)
            inside = (grid.abs() < 1.0).all(dim=-1) * image.mask * mask
            parts.append((violation * inside / (image.b + b)).mean())
    return torch.stack(parts).mean()


def _before(r: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    return (-r - TOLERANCE).clamp(0.0, MOST)


def _look_up(maps: Sequence[Float[Tensor, "_h _w"]], grid: Float[Tensor, "h w 2"]) -> Float[Tensor, "maps h w"]:
    """Values of an image's maps at positions of `grid_sample`."""
    return F.grid_sample(torch.stack(list(maps))[None], grid[None], padding_mode="border", align_corners=False)[0]
