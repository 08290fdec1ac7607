"""Shrink RGBD frames without making up surfaces between a near and a far one.

Notation
    k      samples per target pixel and axis, ceil(source / target); exact for whole factors
    q      inverse depth 1/z of the k*k samples under a target pixel
    q_m    their median (an actual sample: the lower one of an even number)
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image

from ddm_training.errors import InputError

SAME_SURFACE = 0.05  # relative difference of inverse depth within which samples count as one surface
MAX_STRETCH = 0.01  # relative change of the aspect ratio that is taken for rounding of the size


def check_size(source: tuple[int, int], target: tuple[int, int]) -> None:
    """Whether images of size ``source`` (width, height) can be shrunk to ``target``.

    Raises:
        InputError: the target is larger, or of another shape.
    """
    (w, h), (tw, th) = source, target
    if tw < 1 or th < 1 or tw > w or th > h:
        raise InputError(f"cannot resize {w} x {h} images to {tw} x {th}: the target must not be larger, nor empty.")
    if abs(tw * h / (th * w) - 1.0) > MAX_STRETCH:
        raise InputError(
            f"cannot resize {w} x {h} images to {tw} x {th}: that would stretch them. Keep the aspect ratio, "
            f"e.g. {tw} x {round(tw * h / w)}."
        )


def resize_color(color: UInt8[np.ndarray, "h w 3"], width: int, height: int) -> UInt8[np.ndarray, "th tw 3"]:
    """Area average of sRGB colour.

    The average is of tone-mapped values: that of linear light would let one lamp outshine its neighbourhood.
    """
    if color.shape[:2] == (height, width):
        return color
    return np.asarray(Image.fromarray(color).resize((width, height), Image.Resampling.BOX))


def resize_depth(
    depth: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"], width: int, height: int
) -> tuple[Float[np.ndarray, "th tw"], Bool[np.ndarray, "th tw"]]:
    """1/z = mean of the q within 5 % of q_m: the surface that covers most of a target pixel, and only that.

    Inverse planar depth is linear in the pixel coordinates over a plane, so its mean over a whole pixel is exactly the
    plane at the pixel's centre, which the mean of z is not.

    Args:
        depth: planar depth in metres; the value where ``mask`` is False has no meaning.
        mask: where depth is valid.
        width, height: target size.

    Returns:
        Depth (float32, 0 where invalid) and mask; invalid where more than half of the samples are.
    """
    if depth.shape == (height, width):
        return np.where(mask, depth, 0.0).astype(np.float32), mask
    valid = _samples(mask, width, height)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = _samples(np.where(mask, 1.0 / depth, np.inf).astype(np.float32), width, height)
    inverse.sort(axis=-1)  # invalid ones, +inf, last
    count = valid.sum(axis=-1)
    median_index = np.maximum(count - 1, 0)[:, None] // 2
    median = np.take_along_axis(inverse, median_index, axis=-1)
    with np.errstate(invalid="ignore"):
        same = np.abs(inverse - median) <= SAME_SURFACE * median
    same &= np.isfinite(inverse)
    total = np.where(same, inverse, 0.0).sum(axis=-1)
    keep = 2 * count >= valid.shape[-1]
    result = np.where(keep, same.sum(axis=-1) / np.where(keep, total, 1.0), 0.0)
    return result.astype(np.float32).reshape(height, width), keep.reshape(height, width)


def scale_intrinsics(
    intrinsics: tuple[float, float, float, float], source: tuple[int, int], target: tuple[int, int]
) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy for images resized from ``source`` to ``target`` (width, height); the centre of the first pixel is
    (0.5, 0.5), so a plain factor is exact."""
    fx, fy, cx, cy = intrinsics
    sx, sy = target[0] / source[0], target[1] / source[1]
    return fx * sx, fy * sy, cx * sx, cy * sy


def _samples(array: Shaped[np.ndarray, "h w"], width: int, height: int) -> Shaped[np.ndarray, "p k"]:
    """The samples under each target pixel, [height * width, ky * kx]."""
    (rows, ky), (columns, kx) = _indices(array.shape[0], height), _indices(array.shape[1], width)
    picked = array[rows][:, columns].reshape(height, ky, width, kx)
    return picked.transpose(0, 2, 1, 3).reshape(height * width, ky * kx)


def _indices(source: int, target: int) -> tuple[np.ndarray, int]:
    """Source indices of k samples spread evenly over each of ``target`` pixels."""
    k = math.ceil(source / target)
    return ((np.arange(target * k) + 0.5) * (source / (target * k))).astype(np.int64), k
