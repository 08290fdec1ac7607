"""Objects that were cut out of their photographs: images whose background is one flat colour.

Where such a background is left as it is, it is a wall of that colour that may stand anywhere, also before the object.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, UInt8

OPAQUE = 128  # alpha from which on a pixel is not empty
TOLERANCE = 2  # of 255, within which a flat colour is
LEAST_OF_EDGE = 0.9  # of the pixels along the edges of every image; an overexposed white table had up to .64
LEAST_OF_IMAGE = 0.1  # of every image: less is a rim, as undistorting photographs leaves
MOST_OF_BOX = 0.95  # of the rectangle about what is left, in some image: a picture in a frame fills it
HALO, NEAR = 8, 24  # pixels around the object, a block of JPEG, in which the colour may be off by so many of 255


def flat_background(
    images: Iterable[UInt8[np.ndarray, "_h _w 3"]],
) -> tuple[UInt8[np.ndarray, "3"], list[Bool[np.ndarray, "_h _w"]]] | None:
    """The one colour that is around the object in all images, and where it is in each; None where there is none."""
    colour, parts, framed = None, [], True
    for image in images:
        edge = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
        if colour is None:
            colour = np.median(edge, axis=0).round().astype(np.uint8)
        if _off(edge, colour, TOLERANCE).mean() > 1.0 - LEAST_OF_EDGE:
            return None
        empty = background(image, colour)
        if empty.mean() < LEAST_OF_IMAGE:
            return None
        framed &= _share_of_box(~empty) > MOST_OF_BOX
        parts.append(empty)
    return None if colour is None or framed else (colour, parts)


def background(image: UInt8[np.ndarray, "h w 3"], colour: UInt8[np.ndarray, "3"]) -> Bool[np.ndarray, "h w"]:
    """Pixels of that colour which are connected with the edge of the image by others, and what JPEG made of them."""
    from scipy.ndimage import binary_dilation, label  # here: nerfstudio loads this module in each of its commands

    flat = np.pad(~_off(image, colour, TOLERANCE), 1, constant_values=True)
    parts = label(flat)[0]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
    outside = (parts == parts[0, 0])[1:-1, 1:-1]
    return binary_dilation(outside, iterations=HALO, mask=outside | ~_off(image, colour, NEAR))


def _off(pixels: UInt8[np.ndarray, "*n 3"], colour: UInt8[np.ndarray, "3"], tolerance: int) -> Bool[np.ndarray, "*n"]:
    """Where a channel differs from the colour's by more."""
    return (np.abs(pixels.astype(np.int16) - colour.astype(np.int16)) > tolerance).any(axis=-1)


def _share_of_box(inside: Bool[np.ndarray, "h w"]) -> float:
    """Of the smallest rectangle that holds all pixels that are inside; 1 of none."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if len(rows) == 0:
        return 1.0
    return float(inside.sum()) / float((rows[-1] + 1 - rows[0]) * (columns[-1] + 1 - columns[0]))
