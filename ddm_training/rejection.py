"""Which frames are not worth training on, and why."""

import errno
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from ddm_training.errors import InputError


class FrameRejected(Exception):
    """A frame is left out; the message is the reason that is counted, so it names no frame."""


@dataclass(frozen=True, kw_only=True)
class RejectionLimits:
    """A frame beyond any of these is left out and counted. The first three are the limits that Marigold's authors
    used on Hypersim, where they keep 54k of 59k training frames."""

    max_invalid: float = 0.03
    """Largest share of pixels without valid depth."""
    min_depth_range: float = 0.5
    """Smallest difference in metres of the farthest and the nearest depth."""
    min_color_range: float = 10.0
    """Smallest difference, of 255, of the brightest and the darkest colour value."""
    max_median_depth: float = 100.0
    """Largest median depth in metres; beyond it the depth is hardly in metres, or hardly indoors."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_invalid <= 1:
            raise InputError(f"max-invalid is a share of the pixels in [0, 1], found {self.max_invalid}.")
        if self.max_median_depth <= 0:
            raise InputError(f"max-median-depth must be positive metres, found {self.max_median_depth}.")


def check_frame(
    color: UInt8[np.ndarray, "h w 3"],
    depth: Float[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
    limits: RejectionLimits,
) -> None:
    """Judge a frame by its sRGB colour, its planar depth in metres and the validity of the depth.

    Raises:
        FrameRejected: the frame is beyond one of the limits; the message is the reason.
    """
    valid = depth[mask]
    if valid.size == 0:
        raise FrameRejected("no valid depth at all")
    if np.median(valid) > limits.max_median_depth:
        raise FrameRejected(f"median depth over {limits.max_median_depth:g} m (wrong units?)")
    if valid.size < (1.0 - limits.max_invalid) * depth.size:
        raise FrameRejected(f"more than {100 * limits.max_invalid:g} % of the pixels without depth")
    if float(valid.max()) - float(valid.min()) < limits.min_depth_range:
        raise FrameRejected(f"depth range under {limits.min_depth_range:g} m")
    if int(color.max()) - int(color.min()) < limits.min_color_range:
        raise FrameRejected(f"colour range under {limits.min_color_range:g} of 255")


IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises of an image that is truncated, has a broken or a made-up header, or is no image."""

MACHINE_ERRORS = frozenset(
    {errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)  # of a file that may well be whole


def no_file(what: str) -> str:
    """The reason of a frame that lacks a file."""
    return f"no {what} file"


def is_no_file(reason: str) -> bool:
    """Whether a reason is one of `no_file`, which a later download may take away."""
    return reason.startswith("no ") and reason.endswith(" file")


def rejected_file(what: str, error: Exception) -> Exception:
    """The exception for a file that could not be read: `FrameRejected` where the file is to blame; the error itself
    where the machine is (a lost network disk, no permission), since every frame would be rejected then."""
    if isinstance(error, FileNotFoundError):
        return FrameRejected(no_file(what))
    if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
        return error
    return FrameRejected(f"{what} file damaged")
