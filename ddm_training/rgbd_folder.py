"""An RGBD folder: colour images, 16-bit depth images of the same names, and one 3 x 3 matrix of intrinsics."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from ddm_training.errors import InputError
from ddm_training.rejection import IMAGE_ERRORS, FrameRejected, rejected_file

COLOR_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".ppm")
DEPTH_SUFFIXES = (".png", ".tif", ".tiff", ".pgm")
Intrinsics = tuple[float, float, float, float]


@dataclass(frozen=True)
class Pair:
    """Colour and depth file of one frame."""

    name: str
    color: Path
    depth: Path


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which "frame10" follows "frame9"."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def list_pairs(color_dir: Path, depth_dir: Path) -> tuple[list[Pair], dict[str, int]]:
    """Pairs of equal file stem in natural order, and the number of files without a partner by reason.

    Raises:
        InputError: a folder is missing, or there is no pair at all.
    """
    found: list[dict[str, Path]] = []
    for folder, suffixes in ((color_dir, COLOR_SUFFIXES), (depth_dir, DEPTH_SUFFIXES)):
        if not folder.is_dir():
            raise InputError(
                f"{folder} is not a folder. Expected colour images in `--color-dir` and depth images of the same names "
                "in `--depth-dir`, both relative to `--data`."
            )
        found.append({p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes})
    color, depth = found
    names = sorted(color.keys() & depth.keys(), key=natural_key)
    if not names:
        raise InputError(
            f"no pair of equal name in {color_dir} ({len(color)} colour images, e.g. {next(iter(color), None)!r}) "
            f"and {depth_dir} ({len(depth)} depth images, e.g. {next(iter(depth), None)!r})."
        )
    missing = {"no depth file": len(color) - len(names), "no colour file": len(depth) - len(names)}
    return [Pair(name, color[name], depth[name]) for name in names], {k: n for k, n in missing.items() if n}


def read_intrinsics(path: Path, width: int, height: int, *, pixel_centre: float) -> Intrinsics:
    """fx, fy, cx, cy in pixels of a 3 x 3 text matrix, moved to "the centre of the first pixel is (0.5, 0.5)".

    Args:
        path: text file, nine numbers.
        width, height: size of the images, which the matrix must fit.
        pixel_centre: coordinate of the centre of the first pixel in the file's convention: 0 as in OpenCV, or 0.5.

    Raises:
        InputError: unreadable, no pinhole matrix, or clearly made for images of another size.
    """
    try:
        matrix = np.loadtxt(path, delimiter="," if "," in path.read_text() else None)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a matrix of intrinsics ({error}); expected 3 x 3 numbers."
        ) from error
    if matrix.shape != (3, 3):
        raise InputError(f"{path} holds a matrix of shape {matrix.shape}; expected 3 x 3.")
    fx, fy, cx, cy = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
    expected = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    if not np.isfinite(matrix).all() or fx <= 0 or fy <= 0 or not np.allclose(matrix, expected):
        raise InputError(f"{path} is no pinhole matrix [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]: {matrix.tolist()}.")
    if not (0.25 * width < cx < 0.75 * width and 0.25 * height < cy < 0.75 * height):
        raise InputError(
            f"{path} has its principal point at ({cx:.1f}, {cy:.1f}), far from the centre of the {width} x {height} "
            "images: it was made for images of another size. Scale it to the size of the images."
        )
    offset = 0.5 - pixel_centre
    return float(fx), float(fy), float(cx + offset), float(cy + offset)


def image_size(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Width and height of the first colour image that can be read.

    Raises:
        InputError: none can be read.
    """
    for pair in pairs:
        try:
            with Image.open(pair.color) as image:
                return image.size
        except IMAGE_ERRORS:
            continue
    raise InputError(f"none of the {len(pairs)} colour images of {pairs[0].color.parent} can be read.")


def read_pair(
    pair: Pair, width: int, height: int, *, metres_per_unit: float
) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Colour, planar depth in metres (float32) and its validity (a raw value of 0 or 65535 says "none").

    Raises:
        FrameRejected: a file is damaged, of another size, or no 16-bit depth.
    """
    color, raw = _read_image(pair.color, "colour"), _read_image(pair.depth, "depth")
    if color.size != (width, height):
        raise FrameRejected("colour image of another size than the first")
    if raw.size != color.size:
        raise FrameRejected("depth and colour of different sizes")
    if not raw.mode.startswith("I"):  # PIL reads 16-bit grey as I;16, I;16B or I
        raise FrameRejected(f"depth is not 16-bit grey (PIL mode {raw.mode})")
    units = np.asarray(raw).astype(np.int32)
    depth = units.astype(np.float32) * np.float32(metres_per_unit)
    return np.asarray(color.convert("RGB")), depth, (units > 0) & (units < 65535)


def _read_image(path: Path, what: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except IMAGE_ERRORS as error:
        raise rejected_file(what, error) from error
