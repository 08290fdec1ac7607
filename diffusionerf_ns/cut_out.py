"""Objects that were cut out of their photographs: images whose background is one flat colour.

Where such a background is left as it is, it is a wall of that colour that may stand anywhere, also before the object.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, UInt8

TOLERANCE = 2  # of 255: what JPEG leaves of a flat colour keeps within
LEAST_OF_EDGE = 0.9  # of the pixels along the edges of every image; an overexposed white table had up to .64


def flat_background(images: Iterable[UInt8[np.ndarray, "_h _w 3"]]) -> UInt8[np.ndarray, "3"] | None:
    """The colour that nearly all pixels along the edges of all images have; None where there is none."""
    colour = None
    for image in images:
        edge = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
        if colour is None:
            colour = np.median(edge, axis=0).round().astype(np.uint8)
        if _has_colour(edge, colour).mean() < LEAST_OF_EDGE:
            return None
    return colour


def background(image: UInt8[np.ndarray, "h w 3"], colour: UInt8[np.ndarray, "3"]) -> Bool[np.ndarray, "h w"]:
    """Pixels of that colour which are connected with the edge of the image by others."""
    from scipy.ndimage import label  # here: nerfstudio loads this module in each of its commands

    flat = np.pad(_has_colour(image, colour), 1, constant_values=True)
    parts = label(flat)[0]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
    return (parts == parts[0, 0])[1:-1, 1:-1]


def _has_colour(pixels: UInt8[np.ndarray, "*n 3"], colour: UInt8[np.ndarray, "3"]) -> Bool[np.ndarray, "*n"]:
    return (np.abs(pixels.astype(np.int16) - colour.astype(np.int16)) <= TOLERANCE).all(axis=-1)
