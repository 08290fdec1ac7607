"""Depth between the pixels whose depth is known: single wrong ones taken out, the rest interpolated along the image."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0))  # rows and columns from a pixel to one beside it
SAME_SURFACE = 0.02  # relative difference of depth
LEAST_PIXELS = 30  # of a patch of surface that is believed
COLOUR_SIGMA = 0.02  # difference of colours, in [0, 1], across which depth may change
WEAKEST_LINK = 1e-3  # between pixels of different colours


@dataclass(frozen=True)
class DepthMaps:
    """Depth of images of any sizes, looked up by pixel."""

    values: Float[Tensor, " pixels"]
    """All maps, row by row, one after the other; 0 where unknown."""
    confirmed: Bool[Tensor, " pixels"]
    """Where another image's depth says the same."""
    shapes: Int[Tensor, "images 2"]
    """Height and width of each map."""
    starts: Int[Tensor, " images"]
    """Where in ``values`` each map begins."""

    @classmethod
    def of(cls, maps: Sequence[Float[Tensor, "_h _w"]], confirmed: Sequence[Bool[Tensor, "_h _w"]]) -> "DepthMaps":
        """From one map of depth an image and one of where it is confirmed."""
        sizes = torch.tensor([depth.numel() for depth in maps])
        shapes = torch.tensor([depth.shape for depth in maps])
        values, confirmed_values = (torch.cat([x.flatten() for x in parts]) for parts in (maps, confirmed))
        return cls(values, confirmed_values, shapes, sizes.cumsum(0) - sizes)

    def to(self, device: torch.device | str) -> "DepthMaps":
        """The same on another device."""
        return DepthMaps(*(getattr(self, field.name).to(device) for field in fields(self)))

    def at(
        self, pixels: Int[Tensor, "k 3"], sizes: Int[Tensor, "images 2"]
    ) -> tuple[Float[Tensor, " k"], Bool[Tensor, " k"]]:
        """Depth at pixels of images, which may be larger or smaller than the maps, and whether it is confirmed.

        Args:
            pixels: image, row and column.
            sizes: height and width of each image.
        """
        image = pixels[:, 0]
        shape = self.shapes[image]
        row, column = ((pixels[:, 1:] + 0.5) * shape / sizes[image]).long().unbind(-1)
        place = self.starts[image] + row * shape[:, 1] + column
        return self.values[place], self.confirmed[place]


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


def interpolate(rgb: Float[Tensor, "h w 3"], depth: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """Depth of all pixels from those that are known: inverse depth as a membrane that gives way where colours change.

    Args:
        rgb: in [0, 1].
        depth: planar, 0 where unknown; some of it must be known.

    Returns:
        Planar depth in the same units, close to ``depth`` where that is known. Levin et al. 2004 interpolate colours
        along grey values in this way.
    """
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.linalg import spsolve

    colours, known = rgb.numpy(), depth.numpy() > 0
    inverse = np.divide(1.0, depth.numpy(), where=known, out=np.zeros(known.shape))
    ids, count = np.arange(known.size).reshape(known.shape), known.size
    links, weights = [], []
    for down, right in ((0, 1), (1, 0)):
        a, b = _shifted(colours, down, right)
        weight = np.exp(-((a - b) ** 2).sum(-1) / (2.0 * COLOUR_SIGMA**2)) + WEAKEST_LINK
        links.append(np.stack([part.ravel() for part in _shifted(ids, down, right)]))
        weights.append(weight.ravel())
    (first, second), weight = np.concatenate(links, axis=1), np.concatenate(weights)
    adjacency = coo_matrix((weight, (first, second)), shape=(count, count)).tocsr()
    adjacency = adjacency + adjacency.T
    trust = known.ravel().astype(np.float64)
    laplacian = diags(np.asarray(adjacency.sum(axis=1)).ravel() + trust) - adjacency
    filled = np.asarray(spsolve(laplacian.tocsc(), trust * inverse.ravel())).reshape(known.shape)
    return torch.from_numpy((1.0 / filled.clip(min=inverse[known].min())).astype(np.float32))


def _shifted(x: np.ndarray, down: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """An array without the pixels that have no neighbour in that direction, and those neighbours."""
    height, width = x.shape[:2]
    left = max(-right, 0)
    here = x[: height - down, left : width - max(right, 0)]
    return here, x[down:, left + right : width - max(right, 0) + right]
