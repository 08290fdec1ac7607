"""Depth between the pixels whose depth is known: single wrong ones taken out, the rest completed.

A prior may bring a network for it (`ddm_training.completion`); without one depth is interpolated along the image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddm_training import membrane
from ddm_training.completion import FOLDER, DepthCompleter, load_completer
from diffusionerf_ns.prior import find_prior
from diffusionerf_ns.views import MatchedView

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0))  # rows and columns from a pixel to one beside it
SAME_SURFACE = 0.02  # relative difference of depth
LEAST_PIXELS = 30  # of a patch of surface that is believed

ImageCompleter = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rgb [h, w, 3] in [0, 1], planar depth [h, w], 0 where unknown but not everywhere) -> depth of all pixels and the
relative error to expect of it, both [h, w]; the error is infinite where it is not known."""


@dataclass(frozen=True)
class Completed:
    """Depth of all pixels of an image; 0 throughout where nothing is matched."""

    depth: Float[Tensor, "h w"]
    """Planar, scene units."""
    error: Float[Tensor, "h w"]
    """Relative error to expect of it; infinite where it is not known."""
    alone: Float[Tensor, "h w"]
    """The same by this image alone: what two images say without knowing of each other means more."""

    @classmethod
    def by_itself(cls, depth: Float[Tensor, "h w"], error: Float[Tensor, "h w"]) -> "Completed":
        """Of an image that was completed alone."""
        return cls(depth, error, alone=depth)

    @classmethod
    def unknown(cls, view: MatchedView) -> "Completed":
        """Of a view of which nothing is matched."""
        return cls.by_itself(view.depth, torch.full_like(view.depth, torch.inf))


Completer = Callable[[Sequence[MatchedView]], list[Completed]]
"""The views of a capture -> depth of all pixels of each, and the error to expect of it."""


@dataclass(frozen=True)
class DepthMaps:
    """Depth of images of any sizes, looked up by pixel."""

    values: Float[Tensor, " pixels"]
    """All maps, row by row, one after the other; 0 where unknown."""
    confirmed: Bool[Tensor, " pixels"]
    """Where another image's depth says the same, also where each is completed alone."""
    error: Float[Tensor, " pixels"]
    """Relative error to expect of ``values``; infinite where it is not known."""
    shapes: Int[Tensor, "images 2"]
    """Height and width of each map."""
    starts: Int[Tensor, " images"]
    """Where in ``values`` each map begins."""

    @classmethod
    def of(
        cls,
        maps: Sequence[Float[Tensor, "_h _w"]],
        confirmed: Sequence[Bool[Tensor, "_h _w"]],
        error: Sequence[Float[Tensor, "_h _w"]],
    ) -> "DepthMaps":
        """From one map an image of depth, of where it is confirmed, and of the error to expect."""
        sizes = torch.tensor([depth.numel() for depth in maps])
        shapes = torch.tensor([depth.shape for depth in maps])
        values, sure, off = (torch.cat([x.flatten() for x in parts]) for parts in (maps, confirmed, error))
        return cls(values, sure, off, shapes, sizes.cumsum(0) - sizes)

    def to(self, device: torch.device | str) -> "DepthMaps":
        """The same on another device."""
        return DepthMaps(*(getattr(self, field.name).to(device) for field in fields(self)))

    def at(
        self, pixels: Int[Tensor, "k 3"], sizes: Int[Tensor, "images 2"]
    ) -> tuple[Float[Tensor, " k"], Bool[Tensor, " k"], Float[Tensor, " k"]]:
        """At pixels of images, which may be larger or smaller than the maps: depth, whether it is confirmed, and error.

        Args:
            pixels: image, row and column.
            sizes: height and width of each image.
        """
        image = pixels[:, 0]
        shape = self.shapes[image]
        row, column = ((pixels[:, 1:] + 0.5) * shape / sizes[image]).long().unbind(-1)
        place = self.starts[image] + row * shape[:, 1] + column
        return self.values[place], self.confirmed[place], self.error[place]


def without_speckle(depth: Float[Tensor, "h w"], least: int = LEAST_PIXELS) -> Float[Tensor, "h w"]:
    """Depth without its small islands: connected pixels of one surface that are fewer than ``least``. 0 is unknown.

    Wrong matches agree by chance and with few neighbours; right ones come in patches.
    """
    from scipy.sparse import coo_matrix  # here: nerfstudio loads this module in each of its commands
    from scipy.sparse.csgraph import connected_components

    values = depth.numpy()
    ids = np.arange(values.size).reshape(values.shape)
    links = []
    for down, right in NEIGHBOURS:
        a, b = _shifted(values, down, right)
        same = (a > 0) & (b > 0) & (np.abs(a - b) < SAME_SURFACE * np.minimum(a, b))
        links.append(np.stack([ids_[same] for ids_ in _shifted(ids, down, right)]))
    first, second = np.concatenate(links, axis=1)
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(values.size, values.size))
    island = connected_components(graph, directed=False)[1]
    size = np.bincount(island)[island].reshape(values.shape)
    return torch.from_numpy(np.where(size >= least, values, 0.0).astype(np.float32))


def by_membrane(
    rgb: Float[Tensor, "h w 3"], depth: Float[Tensor, "h w"]
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """The `ImageCompleter` without a network: interpolation along the image. How far it is off, it does not tell."""
    filled = torch.from_numpy(membrane.interpolate(rgb.numpy(), depth.numpy()))
    return filled, torch.full_like(filled, torch.inf)


def alone(complete: ImageCompleter) -> Completer:
    """The `Completer` that completes each view by itself."""

    def complete_all(views: Sequence[MatchedView]) -> list[Completed]:
        return [
            Completed.by_itself(*complete(view.rgb, view.depth)) if view.is_matched else Completed.unknown(view)
            for view in views
        ]

    return complete_all


BY_MEMBRANE = alone(by_membrane)
"""The `Completer` without a network."""


def find_network(prior: str, revision: str | None = None) -> DepthCompleter | None:
    """The network of a prior that completes depth; None where it has none.

    Args:
        prior: a built-in name, a prior folder, or a Hugging Face hub id.
        revision: of a hub id.

    Raises:
        InputError: no such prior, or a network that cannot be read.
    """
    folder = find_prior(prior, revision) / FOLDER
    return load_completer(folder) if folder.is_dir() else None


def _shifted(x: np.ndarray, down: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """An array without the pixels that have no neighbour in that direction, and those neighbours."""
    height, width = x.shape[:2]
    left = max(-right, 0)
    here = x[: height - down, left : width - max(right, 0)]
    return here, x[down:, left + right : width - max(right, 0) + right]
