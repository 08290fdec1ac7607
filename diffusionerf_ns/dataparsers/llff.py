"""LLFF captures: `poses_bounds.npy` and `images` or `images_K`.

`poses_bounds.npy` is [n, 17]: a 3 x 5 matrix whose columns are down, right, backwards, centre and
[height, width, focal], then near and far. Rows belong to the images sorted by name.
"""

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
from diffusionerf_ns.dataparsers.images import CACHE_FILE, image_size, list_images
from diffusionerf_ns.dataparsers.masks import MaskedFewViewConfig, find_masks
from diffusionerf_ns.dataparsers.poses import opengl_from_llff
from diffusionerf_ns.dataparsers.splits import hold_out

POSES_FILE = "poses_bounds.npy"
PROTOCOL_FACTOR = 8


@dataclass
class LLFFFewViewDataParserConfig(MaskedFewViewConfig):
    """LLFF captures (poses_bounds.npy), split as RegNeRF's protocol splits them."""

    _target: type = field(default_factory=lambda: LLFFFewViewParser)
    """target class to instantiate"""


class LLFFFewViewParser(FewViewBaseParser):
    """Reads an LLFF folder. Scene units: largest camera coordinate of all images is 1 (see `poses.normalise`)."""

    config: LLFFFewViewDataParserConfig

    def read_capture(self) -> Capture:
        """All images of the folder; every 8th is held out, training images are spread evenly over the rest."""
        data = self.config.data
        table = read_poses_bounds(data / POSES_FILE)
        matrices = table[:, :15].reshape(-1, 3, 5)
        images, factor, cache = find_images(data, whole_factor(self.config.downscale_factor))
        if len(images) != len(table):
            raise InputError(
                f"{data}: {POSES_FILE} has {len(table)} rows, but {images[0].parent.name} holds {len(images)} images "
                f"({images[0].name} to {images[-1].name}). Rows and images sorted by name must match one to one."
            )
        originals = list_images(data / "images")  # whose names masks have; those of images_8 are often others
        names = [p.name for p in (originals if len(originals) == len(images) else images)]
        height, width, focal = matrices[:, :, 4].T
        pool, test = hold_out(len(images))
        split = self.choose(len(images), pool, test)
        return Capture(
            source="llff",
            title=f"{data.resolve().name} (LLFF)",
            names=tuple(p.name for p in images),
            images=tuple(images),
            poses=opengl_from_llff(matrices[:, :, :4]),
            intrinsics=np.stack([focal, focal, width / 2, height / 2], axis=1),
            sizes=np.stack([width, height], axis=1).round().astype(np.int64),
            split=split,
            factor=factor,
            cache=cache,
            bounds=table[:, 15:17],
            masks=find_masks(names, {*split.train, *split.test}, data, self.config),
            protocol="llff-regnerf",
        )


def read_poses_bounds(path: Path) -> Float[np.ndarray, "n 17"]:
    """Read and check `poses_bounds.npy`.

    Raises:
        InputError: missing, damaged, of another shape, or with sizes, focal lengths or bounds that are not positive.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: an LLFF folder holds {POSES_FILE} and images or images_K.")
    try:
        table = np.load(path, allow_pickle=False).astype(np.float64)
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if table.ndim != 2 or table.shape[1] != 17 or not len(table):
        raise InputError(f"{path} has shape {table.shape}; expected [n, 17], a row of 15 pose and 2 bound numbers.")
    finite = np.isfinite(table).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{path}: rows {np.flatnonzero(~finite).tolist()} hold NaN or infinite numbers (rows are images sorted by "
            "name). Run the pose estimation again, or remove these rows and their images."
        )
    if (table[:, [4, 9, 14]] <= 0).any():
        raise InputError(f"{path}: image height, width and focal length (column 5 of the poses) must be positive.")
    near, far = table[:, 15], table[:, 16]
    if (wrong := (near <= 0) | (near >= far)).any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(f"{path}: row {row} has near {near[row]} and far {far[row]}; expected 0 < near < far.")
    return table


def find_images(data: Path, factor: int | None) -> tuple[list[Path], int, Path]:
    """The images to use, what they are still to be reduced by, and the folder for the reduced copies.

    With a ``factor`` K: `images_K`, else the smallest reduction of `images` or of an `images_k` whose k divides K.
    Without: `images_8` (the protocol's size), else the largest whose longer side is at most 1008 pixels, else the
    largest there is, reduced to that.

    Raises:
        InputError: no folder of images, or none that the factor can be reached from.
    """
    folders = {k: files for k, folder in image_folders(data).items() if (files := list_images(folder))}
    if not folders:
        raise InputError(f"{data} holds {POSES_FILE}, but no images: expected a folder images or images_K with images.")
    if factor is None:
        factor = _default_factor(folders)
    if factor in folders:
        return folders[factor], 1, data / f"images_{factor}"
    start = max((k for k in folders if factor % k == 0), default=None)
    if start is None:
        have = ", ".join("images" if k == 1 else f"images_{k}" for k in sorted(folders))
        raise InputError(
            f"{data}: --downscale-factor {factor} needs images_{factor}, images, or an images_K whose K divides "
            f"{factor}; found {have}."
        )
    return folders[start], factor // start, data / f"images_{factor}"


def image_folders(data: Path) -> dict[int, Path]:
    """`images` (1) and `images_K` (K) of a folder; copies that this program has made do not count."""
    folders = {1: data / "images"} if (data / "images").is_dir() else {}
    for folder in data.glob("images_*"):
        digits = folder.name.removeprefix("images_")
        if folder.is_dir() and digits.isdecimal() and int(digits) > 1 and not (folder / CACHE_FILE).is_file():
            folders[int(digits)] = folder
    return folders


def _default_factor(folders: dict[int, list[Path]]) -> int:
    if PROTOCOL_FACTOR in folders:
        return PROTOCOL_FACTOR
    for k in sorted(folders):
        if automatic_factor(*image_size(folders[k][0])) == 1:
            return k
    largest = min(folders)
    return largest * automatic_factor(*image_size(folders[largest][0]))
