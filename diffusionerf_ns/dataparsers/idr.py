"""Captures in IDR's layout, which NeuS and others write too: a folder with `image`, `mask` and `cameras.npz`.

The cameras are also found as `cameras_sphere.npz`. Copies of DTU's scans come in this layout as well, see `dtu`; here
is what both need of it, and the parser of captures that follow no protocol.
"""

import re
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.base import (
    Capture,
    FewViewBaseParser,
    automatic_factor,
    whole_factor,
)
from diffusionerf_ns.dataparsers.images import absolute, check_mask_size, image_size, list_images
from diffusionerf_ns.dataparsers.masks import MaskedFewViewConfig, are_trained_by
from diffusionerf_ns.dataparsers.poses import opengl_from_opencv
from diffusionerf_ns.dataparsers.projections import checked_projection, decompose
from diffusionerf_ns.dataparsers.splits import without_lists

CAMERA_FILES = ("cameras.npz", "cameras_sphere.npz")
OFF_CENTRE = 0.2  # of a side: the principal point lies nearer the middle than that unless images were reduced


@dataclass
class IDRFewViewDataParserConfig(MaskedFewViewConfig):
    """Captures in IDR's layout (image, mask, cameras.npz), as NeuS has them."""

    _target: type = field(default_factory=lambda: IDRFewViewParser)
    """target class to instantiate"""
    mask_folder: Path | None = None
    """Folder of masks (a folder of the capture's name in it, or the masks themselves). Unset: looked for beside the
    images."""


class IDRFewViewParser(FewViewBaseParser):
    """Reads a capture in IDR's layout, any folder name and any number of cameras."""

    config: IDRFewViewDataParserConfig

    def read_capture(self) -> Capture:
        """All cameras that have an image; split by `without_lists`."""
        folder = self.config.data
        path, matrices = world_matrices(folder)
        files = by_camera(folder / "image", path, matrices)
        numbers, images = tuple(files), tuple(files.values())
        pool, test = without_lists(len(images), test_named=self.config.test_ids is not None)
        split = self.choose(len(images), pool, test)
        intrinsics, opencv = decompose(np.stack([matrices[number] for number in numbers]))
        width, height = image_size(images[split.train[0]])
        sizes = np.tile(np.array((width, height), dtype=np.int64), (len(images), 1))
        used = sorted({*split.train, *split.test})
        sizes[used] = [image_size(images[i]) for i in used]
        x, y = intrinsics[:, 2:].mean(axis=0)
        if not all(OFF_CENTRE < place < 1.0 - OFF_CENTRE for place in (x / width, y / height)):
            raise InputError(
                f"{path}: the cameras' principal point is ({x:.0f}, {y:.0f}) in the mean, far from the middle of "
                f"images of {width} x {height} pixels. Use the images that the cameras were made for, not reduced ones."
            )
        factor = whole_factor(self.config.downscale_factor) or automatic_factor(width, height)
        masks = None
        if are_trained_by(folder, "mask", self.config):
            masks = self._masks(path, numbers)
            for i in used:
                check_mask_size(masks[i], (int(sizes[i, 0]) // factor, int(sizes[i, 1]) // factor))
        return Capture(
            source="idr",
            title=f"{absolute(folder).name} ({path.name})",
            names=tuple(image.name for image in images),
            images=images,
            poses=opengl_from_opencv(opencv),
            intrinsics=intrinsics,
            sizes=sizes,
            split=split,
            factor=factor,
            cache=reduced_folder(folder, factor),
            masks=masks,
        )

    def _masks(self, cameras: Path, numbers: tuple[int, ...]) -> tuple[Path, ...]:
        """A mask for each of the cameras of these numbers, by its number or its place as the images have theirs."""
        places = mask_places(self.config.data, self.config.mask_folder)
        folder = next((place for place in places if list_images(place)), None)
        if folder is None:
            raise InputError(f"--masked-training: no masks were found in {places[-1]}; give --mask-folder.")
        masks = by_camera(folder, cameras, numbers)
        if missing := [number for number in numbers if number not in masks]:
            raise InputError(f"{folder}: the masks of cameras {missing} are missing; expected one for each image.")
        return tuple(masks[number] for number in numbers)


def mask_places(folder: Path, given: Path | None) -> list[Path]:
    """Where the masks of a capture may lie, the likeliest first.

    Args:
        folder: of the capture.
        given: folder of masks, of this capture or of several; None: beside the images.
    """
    if given is None:
        return [folder / "mask"]
    name = absolute(folder).name
    return [given / name / "mask", given / name, given / "mask", given]


def reduced_folder(folder: Path, factor: int) -> Path:
    """For copies of the images of a capture, reduced by a factor."""
    return folder / f"image_{factor}"


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
