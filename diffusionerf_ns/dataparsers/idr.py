"""Files of IDR's layout, which NeuS and others write too: a scan's folder with `image`, `mask` and `cameras.npz`."""

import re
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.images import list_images
from diffusionerf_ns.dataparsers.projections import checked_projection

CAMERA_FILES = ("cameras.npz", "cameras_sphere.npz")


def camera_file(folder: Path) -> Path | None:
    """`cameras.npz` or `cameras_sphere.npz`, which have the same `world_mat`; None where neither is there."""
    return next((folder / name for name in CAMERA_FILES if (folder / name).is_file()), None)


def world_matrices(folder: Path) -> tuple[Path, dict[int, Float[np.ndarray, "3 4"]]]:
    """The file of the cameras, and number -> projection of all that it has, sorted by number.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = camera_file(folder)
    if path is None:
        raise InputError(f"{folder}: the calibration {CAMERA_FILES[0]} is missing; expected it beside image and mask.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = [key for key in archive.files if re.fullmatch(r"world_mat_[0-9]+", key)]
            table = {int(key[10:]): archive[key][:3] for key in keys}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    return path, {i: checked_projection(table[i], f"{path}, world_mat_{i}") for i in sorted(table)}


def by_camera(folder: Path, cameras: Path, numbers: Collection[int]) -> dict[int, Path]:
    """Number of a camera -> its file of those in a folder: by the number in the name, else by the order of the names.

    Args:
        folder: of images or of masks.
        cameras: file of the cameras, for messages.
        numbers: of the cameras, ascending.

    Raises:
        InputError: the files are neither numbered as the cameras are, nor as many.
    """
    files = list_images(folder)
    named = {int(file.stem): file for file in files if re.fullmatch("[0-9]+", file.stem)}
    if len(named) == len(files) and named.keys() <= set(numbers):
        return dict(sorted(named.items()))
    if len(files) == len(numbers):
        return dict(zip(numbers, files))
    raise InputError(
        f"{folder} has {len(files)} files and {cameras.name} {len(numbers)} cameras: which belong together cannot be "
        "told. Name each file by the number of its world_mat (000.png and so on), or have as many of both."
    )
