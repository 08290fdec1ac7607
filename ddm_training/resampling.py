"""Windows of stored frames to patches, for whole batches on the device of a training.

Notation
    h, w    stored pixels, at least those of the largest window; smaller ones fill the top left
    P       side of a patch in pixels
    a       where a window's patch begins in it, stored pixels
    s       stored pixels per patch pixel
    z       planar depth in metres; 0 where there is none
"""

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

CONTINUOUS = 1.1  # ratio of inverse depths of neighbouring pixels below which they are taken for one surface


def window_pixels(extent: Int[Tensor, "b 2"], canvas: tuple[int, int]) -> Int[Tensor, "b h w"]:
    """Where each pixel of each window is, in windows that lie row by row and one after the other.

    Args:
        extent: rows and columns of each window.
        canvas: h and w; what is outside of a window repeats its border.
    """
    area = extent.prod(dim=1)
    first = area.cumsum(0) - area
    rows, columns = (
        torch.arange(n, device=extent.device).minimum(extent[:, i, None] - 1) for i, n in enumerate(canvas)
    )
    return first[:, None, None] + rows[:, :, None] * extent[:, 1, None, None] + columns[:, None, :]


def area_weights(
    start: Float[Tensor, " b"], s: Float[Tensor, " b"], count: int, stored: int, extent: Int[Tensor, " b"]
) -> Float[Tensor, "b count stored"]:
    """Resampling matrices of one axis: output j covers [a + j s, a + (j + 1) s] of ``stored`` pixels.

    Area average where s >= 1, linear interpolation where s < 1; at s = 1 the two are the same.

    Args:
        start: a.
        s: stored pixels per output.
        count: outputs.
        stored: pixels.
        extent: pixels from this one on are not of the window.
    """
    pixels = torch.arange(stored, device=s.device, dtype=s.dtype)
    outputs = torch.arange(count, device=s.device, dtype=s.dtype)
    a, step = start[:, None, None], s[:, None, None]
    left = a + step * outputs[:, None]
    area = torch.minimum(left + step, pixels + 1.0) - torch.maximum(left, pixels)
    linear = 1.0 - (pixels + 0.5 - (left + 0.5 * step)).abs()
    weights = torch.where(step >= 1.0, area, linear).clamp_min(0.0) * (pixels < extent[:, None, None])
    return weights / weights.sum(dim=2, keepdim=True)


def resample_color(
    color: UInt8[Tensor, "b h w 3"], wy: Float[Tensor, "b p h"], wx: Float[Tensor, "b p w"]
) -> Float[Tensor, "b 3 p p"]:
    """Apply `area_weights` of both axes; result in [0, 1]."""
    b, h, w, _ = color.shape
    rows = torch.bmm(wy / 255.0, color.reshape(b, h, 3 * w).to(wy.dtype)).unflatten(2, (w, 3))
    return torch.einsum("bywc,bxw->bcyx", rows, wx)


def resample_depth(
    z: Float[Tensor, "b h w"],
    y: Float[Tensor, "b p"],
    x: Float[Tensor, "b p"],
    extent: Int[Tensor, "b 2"],
) -> Float[Tensor, "b p p"]:
    """Depth at points (y, x), pixel centres at .5: no value lies between two surfaces; 0 where there is none.

    Bilinear in inverse depth (exact on planes) where the four neighbours are valid and continuous, else the nearest
    pixel; validity is that of the nearest pixel.
    """
    inverse = torch.where(z > 0, 1.0 / z, torch.nan)
    batch = torch.arange(len(z), device=z.device)[:, None, None]

    def axis(points: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nearest pixel, the pixels on both sides, and the weight of the second."""
        nearest = points.floor().long().clamp_min(0).minimum(last)
        before = (points - 0.5).floor().long().clamp_min(0).minimum((last - 1).clamp_min(0))
        return nearest, before, (before + 1).minimum(last), (points - 0.5 - before).clamp(0.0, 1.0)

    row, y0, y1, v = axis(y, extent[:, :1] - 1)
    column, x0, x1, u = axis(x, extent[:, 1:] - 1)

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return inverse[batch, rows[:, :, None], columns[:, None, :]]

    nearest, u, v = at(row, column), u[:, None, :], v[:, :, None]
    a, b, c, d = at(y0, x0), at(y0, x1), at(y1, x0), at(y1, x1)
    smooth = (a * (1 - u) + b * u) * (1 - v) + (c * (1 - u) + d * u) * v
    corners = torch.stack([a, b, c, d])
    one_surface = corners.amax(dim=0) <= CONTINUOUS * corners.amin(dim=0)  # False where any is NaN
    return (1.0 / torch.where(one_surface, smooth, nearest)).nan_to_num(nan=0.0)


def fill_from_nearby(z: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Invalid depth replaced by a valid one from nearby, in few steps for a whole batch.

    That of a neighbour, twice, which is what made-up matches with their fattened borders need; else one of the smallest
    block of 2, 4, 8, ... pixels of a side that has any.
    """
    z = torch.where(valid, z, 0.0)
    for _ in range(2):
        beside = F.pad(z, (1, 1))
        z = torch.where(z > 0, z, torch.where(beside[..., :-2] > 0, beside[..., :-2], beside[..., 2:]))
        beside = F.pad(z, (0, 0, 1, 1))
        z = torch.where(z > 0, z, torch.where(beside[:, :-2] > 0, beside[:, :-2], beside[:, 2:]))
    known = [z]
    while max(known[-1].shape[1:]) > 1:
        fine = F.pad(known[-1], (0, known[-1].shape[2] % 2, 0, known[-1].shape[1] % 2))
        a, b, c, d = (fine[:, i::2, j::2] for i, j in ((0, 0), (1, 1), (0, 1), (1, 0)))
        known.append(torch.where(a > 0, a, torch.where(b > 0, b, torch.where(c > 0, c, d))))
    filled = known.pop()
    while known:
        fine = known.pop()
        _, height, width = fine.shape
        filled = F.interpolate(filled[:, None], scale_factor=2.0, mode="nearest")[:, 0, :height, :width]
        filled = torch.where(fine > 0, fine, filled)
    return filled
