"""What training images show, by the depth of their views: what they do not show of a view is filled from around.

Where the field was never looked at, its colours are chance, as loud as they come. The smoothest colours that go on from
what is known around are wrong by less, and do not catch the eye.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor
from torch.nn import functional as F

from diffusionerf_ns.visibility import Projections, are_perspective

MAX_VIEWS = 32  # more training views leave little unseen, and their depth would take long
WIDTH = 128  # pixels of the training views' depth, at most
BEHIND = 0.05  # relative difference of depth from which a point is hidden
NEAREST = 0.02  # quantile of distance that counts as a view's nearest surface, as for the bounds in training
POINTS = 20_000  # of all training views, among which a view's nearest are looked for
FAR = 0.9  # of the rays' end, from which a training view shows no surface but what is behind all
MAX_PIXELS = 320 * 240  # of a view that is filled as it is; larger ones are filled as if they were that large


def small_cameras(cameras: Cameras) -> Cameras:
    """The same views at most `WIDTH` pixels wide."""
    scale = (WIDTH / cameras.width.float()).clamp_max(1.0)
    return Cameras(
        cameras.camera_to_worlds,
        *(getattr(cameras, name) * scale for name in ("fx", "fy", "cx", "cy")),
        *((length * scale).round().long().clamp_min(1) for length in (cameras.width, cameras.height)),
        distortion_params=cameras.distortion_params,
    )


@dataclass(frozen=True)
class ShownSurfaces:
    """The surfaces that the training images show."""

    cameras: Cameras
    """Of the training images, perspective."""
    depth: Sequence[Float[Tensor, "_h _w"]]
    """Planar depth of each of these views, scene units; infinite where they meet nothing."""

    @cached_property
    def _farthest(self) -> list[Float[Tensor, "_h _w"]]:
        """Of the 3 x 3 pixels about each pixel of each view, the largest depth."""
        return [F.max_pool2d(depth[None, None], 3, stride=1, padding=1)[0, 0] for depth in self.depth]

    @cached_property
    def _projections(self) -> Projections:
        return Projections(self.cameras)

    @cached_property
    def _points(self) -> Float[Tensor, "k 3"]:
        """Some of them, in the world."""
        points = []
        for index, depth in enumerate(self.depth):
            rays = self.cameras.generate_rays(camera_indices=index, keep_shape=True)
            distance = depth[..., None] * rays.metadata["directions_norm"]
            points.append((rays.origins + rays.directions * distance)[depth.isfinite()])
        together = torch.cat(points)
        return together[:: max(len(together) // POINTS, 1)]  # enough for a quantile of every frame of a viewer

    @cached_property
    def _closest(self) -> float:
        """The smallest `_distance` of a training view."""
        return min(self._distance(self._projections, index) for index in range(len(self._projections)))

    def _distance(self, projections: Projections, index: int) -> float:
        """From the camera to the surfaces in its image: the quantile `NEAREST`, scene units; infinite of none."""
        _, _, inside = projections(index, self._points)
        distance = (self._points[inside] - projections.position[index]).norm(dim=-1)
        return float(np.quantile(distance.cpu().numpy(), NEAREST)) if len(distance) else math.inf

    @torch.no_grad()
    def nearer(self, camera: Cameras) -> float:
        """The distance of a camera to the surfaces in its image by the smallest of a training view, at most 1.

        Of cameras that are not perspective, which look to all sides, it is 1.
        """
        if not math.isfinite(self._closest) or not are_perspective(camera):
            return 1.0
        return min(self._distance(Projections(camera.to(self.cameras.device)), 0) / self._closest, 1.0)

    @torch.no_grad()
    def hide(self, points: Float[Tensor, "n 3"]) -> Bool[Tensor, " n"]:
        """Whether no training image shows a point; False of points that are not finite.

        An image shows a point that is within it and not behind all of the 3 x 3 pixels about it, `BEHIND` let pass.
        """
        finite = points.isfinite().all(dim=-1)
        points = torch.where(finite[:, None], points, 0.0)
        shown = torch.zeros_like(finite)
        for index, farthest in enumerate(self._farthest):
            pixel, z, inside = self._projections(index, points)
            height, width = farthest.shape
            column, row = pixel.nan_to_num().floor().unbind(dim=-1)
            there = farthest[row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()]
            shown |= inside & (z < there * (1.0 + BEHIND))
        return finite & ~shown


def fill(
    rgb: Float[Tensor, "h w 3"], unseen: Bool[Tensor, "h w"], empty: Bool[Tensor, "h w"] | None = None
) -> Float[Tensor, "h w 3"]:
    """Colours of a view with those of unseen pixels spread from the pixels around.

    Args:
        rgb: colours of the view.
        unseen: pixels to fill; those that nothing known is connected to stay as they are.
        empty: pixels that show a background: they stay, and nothing is spread from or across them. None: none do.
    """
    seen = ~unseen if empty is None else ~(unseen | empty)
    if not bool(unseen.any()) or not bool(seen.any()):
        return rgb
    scale = min((MAX_PIXELS / unseen.numel()) ** 0.5, 1.0)
    size = tuple(max(round(length * scale), 1) for length in unseen.shape)
    seen = seen[None, None].to(rgb)
    known = F.interpolate(seen, size=size, mode="area")
    small = F.interpolate(rgb.permute(2, 0, 1)[None] * seen, size=size, mode="area") / known.clamp_min(1e-6)
    hole, apart = (known[0, 0] <= 0.0).cpu().numpy(), None
    if empty is not None:
        there = F.interpolate((~empty)[None, None].to(rgb), size=size, mode="area")[0, 0] > 0.0
        apart = _apart(there.cpu().numpy(), hole)
        hole &= ~apart
    values = fill_harmonic(small[0].permute(1, 2, 0).cpu().double().numpy(), hole, apart)
    large = F.interpolate(torch.from_numpy(values).to(rgb).permute(2, 0, 1)[None], size=unseen.shape, mode="bilinear")
    filled = large[0].permute(1, 2, 0)
    if apart is not None:  # there, values are 0
        share = F.interpolate(torch.from_numpy(~apart)[None, None].to(rgb), size=unseen.shape, mode="bilinear")[0, 0]
        filled, unseen = filled / share.clamp_min(1e-6)[..., None], unseen & (share > 0.0)
    return torch.where(unseen[..., None], filled, rgb)


def _apart(there: Bool[np.ndarray, "h w"], hole: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels that are not connected, by pixels that are there, to any outside the hole."""
    from scipy.ndimage import label

    parts = np.zeros(there.shape, dtype=np.int32)  # 0 where nothing is
    label(there, output=parts)
    return ~np.isin(parts, parts[there & ~hole])


def fill_harmonic(
    x: Float[np.ndarray, "h w c"], hole: Bool[np.ndarray, "h w"], apart: Bool[np.ndarray, "h w"] | None = None
) -> Float[np.ndarray, "h w c"]:
    """``x`` with its hole filled by the solution of Laplace's equation: each pixel is the mean of its neighbours.

    Args:
        x: values; those in the hole are ignored.
        hole: some pixels, not all.
        apart: pixels outside the hole that count as nobody's neighbours; each part of the hole has others. None: none.
    """
    from scipy.sparse import coo_matrix, diags  # here: nerfstudio loads this module in each of its commands
    from scipy.sparse.linalg import spsolve

    if not hole.any():
        return x
    apart = np.zeros_like(hole) if apart is None else apart
    values, unknown = x.reshape(-1, x.shape[-1]).copy(), hole.ravel()
    count = int(unknown.sum())
    place = np.cumsum(unknown) - 1  # of an unknown pixel among the equations
    grid = np.arange(hole.size).reshape(hole.shape)
    links = np.concatenate(
        [np.stack([a.ravel(), b.ravel()]) for a, b in ((grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:]))], axis=1
    )
    pixel, neighbour = np.concatenate([links, links[::-1]], axis=1)
    linked = unknown[pixel] & ~apart.ravel()[neighbour]
    pixel, neighbour = pixel[linked], neighbour[linked]
    row, free = place[pixel], unknown[neighbour]
    between = coo_matrix((np.ones(free.sum()), (row[free], place[neighbour[free]])), shape=(count, count))
    known = coo_matrix((np.ones((~free).sum()), (row[~free], neighbour[~free])), shape=(count, hole.size))
    matrix = diags(np.bincount(row, minlength=count).astype(np.float64)) - between
    values[unknown] = spsolve(matrix.tocsc(), known.tocsr() @ np.where(unknown[:, None], 0.0, values)).reshape(
        count, -1
    )
    return values.reshape(x.shape)
