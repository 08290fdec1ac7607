"""What no training image shows of a view: found by the depth of the training views, and filled from around.

Where the field was never looked at, its colours are chance, as loud as they come. The smoothest colours that go on from
what is known around are wrong by less, and do not catch the eye.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor
from torch.nn import functional as F

MAX_VIEWS = 32  # more training views leave little unseen, and their depth would take long
WIDTH = 128  # pixels of the training views' depth, at most
BEHIND = 0.05  # relative difference of depth from which a point is hidden
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
    def _borders(self) -> list[tuple[Float[Tensor, "2"], Float[Tensor, "2"]]]:
        return [_slopes(self.cameras[index : index + 1]) for index in range(len(self.depth))]

    @torch.no_grad()
    def hide(self, points: Float[Tensor, "n 3"]) -> Bool[Tensor, " n"]:
        """Whether no training image shows a point; False of points that are not finite.

        An image shows a point that is within it and not behind all of the 3 x 3 pixels about it, `BEHIND` let pass.
        """
        finite = points.isfinite().all(dim=-1)
        points = torch.where(finite[:, None], points, 0.0)
        shown = torch.zeros_like(finite)
        for index, (farthest, (low, high)) in enumerate(zip(self._farthest, self._borders)):
            camera = self.cameras[index : index + 1]
            pose = camera.camera_to_worlds[0]
            local = (points - pose[:, 3]) @ pose[:, :3]
            z = -local[:, 2]
            ahead = z.clamp_min(1e-6)[:, None]
            slope = torch.stack([local[:, 0], -local[:, 1]], dim=-1) / ahead
            inside = (z > 0) & ((slope >= low) & (slope <= high)).all(dim=-1)
            if camera.distortion_params is not None:
                slope = distort(slope, camera.distortion_params[0])
            focal, centre = (torch.cat(pair, dim=-1) for pair in ((camera.fx, camera.fy), (camera.cx, camera.cy)))
            column, row = (slope * focal + centre).floor().unbind(dim=-1)
            height, width = farthest.shape
            inside &= (column >= 0) & (column < width) & (row >= 0) & (row < height)
            there = farthest[row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()]
            shown |= inside & (z < there * (1.0 + BEHIND))
        return finite & ~shown


def distort(slope: Float[Tensor, "n 2"], parameters: Float[Tensor, "6"]) -> Float[Tensor, "n 2"]:
    """x / z and y / z (y down) as the lens bends them: nerfstudio's k1, k2, k3, k4, p1, p2 (OpenCV's model)."""
    k1, k2, k3, k4, p1, p2 = parameters.tolist()
    x, y = slope.unbind(dim=-1)
    square = x.square() + y.square()
    radial = 1.0 + square * (k1 + square * (k2 + square * (k3 + square * k4)))
    return torch.stack(
        [
            radial * x + 2.0 * p1 * x * y + p2 * (square + 2.0 * x.square()),
            radial * y + 2.0 * p2 * x * y + p1 * (square + 2.0 * y.square()),
        ],
        dim=-1,
    )


def _slopes(camera: Cameras) -> tuple[Float[Tensor, "2"], Float[Tensor, "2"]]:
    """Least and largest x / z and y / z (y down) of a camera's border; beyond, a lens's polynomial means nothing."""
    steps = torch.linspace(0.0, 1.0, 9)
    sides = [torch.stack([edge, steps], -1) for edge in (torch.zeros(9), torch.ones(9))]
    share = torch.cat([*sides, *(side.flip(-1) for side in sides)]).to(camera.device)
    border = share * torch.cat([camera.height, camera.width], dim=-1)
    directions = camera.generate_rays(camera_indices=0, coords=border).directions @ camera.camera_to_worlds[0, :, :3]
    slope = torch.stack([directions[:, 0], -directions[:, 1]], dim=-1) / -directions[:, 2:]
    return slope.amin(dim=0) - 1e-4, slope.amax(dim=0) + 1e-4


def fill(rgb: Float[Tensor, "h w 3"], unseen: Bool[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    """Colours of a view with those of unseen pixels spread from the pixels around; as they are if all are unseen."""
    if not bool(unseen.any()) or bool(unseen.all()):
        return rgb
    scale = min((MAX_PIXELS / unseen.numel()) ** 0.5, 1.0)
    size = tuple(max(round(length * scale), 1) for length in unseen.shape)
    seen = (~unseen)[None, None].to(rgb)
    known = F.interpolate(seen, size=size, mode="area")
    small = F.interpolate(rgb.permute(2, 0, 1)[None] * seen, size=size, mode="area") / known.clamp_min(1e-6)
    values = spread(small[0].permute(1, 2, 0).cpu().double().numpy(), (known[0, 0] <= 0.0).cpu().numpy())
    large = F.interpolate(torch.from_numpy(values).to(rgb).permute(2, 0, 1)[None], size=unseen.shape, mode="bilinear")
    filled = large[0].permute(1, 2, 0)
    return torch.where(unseen[..., None], filled, rgb)


def spread(x: Float[np.ndarray, "h w c"], hole: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w c"]:
    """``x`` with its hole filled by the solution of Laplace's equation: each pixel is the mean of its neighbours.

    Args:
        x: values; those in the hole are ignored.
        hole: some pixels, not all.
    """
    from scipy.sparse import coo_matrix, diags  # here: nerfstudio loads this module in each of its commands
    from scipy.sparse.linalg import spsolve

    if not hole.any():
        return x
    values, unknown = x.reshape(-1, x.shape[-1]).copy(), hole.ravel()
    count = int(unknown.sum())
    place = np.cumsum(unknown) - 1  # of an unknown pixel among the equations
    grid = np.arange(hole.size).reshape(hole.shape)
    links = np.concatenate(
        [np.stack([a.ravel(), b.ravel()]) for a, b in ((grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:]))], axis=1
    )
    pixel, neighbour = np.concatenate([links, links[::-1]], axis=1)
    pixel, neighbour = pixel[unknown[pixel]], neighbour[unknown[pixel]]
    row, free = place[pixel], unknown[neighbour]
    between = coo_matrix((np.ones(free.sum()), (row[free], place[neighbour[free]])), shape=(count, count))
    known = coo_matrix((np.ones((~free).sum()), (row[~free], neighbour[~free])), shape=(count, hole.size))
    matrix = diags(np.bincount(row, minlength=count).astype(np.float64)) - between
    values[unknown] = spsolve(matrix.tocsc(), known.tocsr() @ np.where(unknown[:, None], 0.0, values)).reshape(
        count, -1
    )
    return values.reshape(x.shape)
