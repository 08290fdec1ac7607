"""DTU scans in the two layouts that are in use, with RegNeRF's protocol: 9 training views, 25 test views, masks.

Layout "rectified" (RegNeRF)::

    Rectified/scanN/rect_{id + 1:03d}_3_r5000.png      light 3
    Calibration/cal18/pos_{id + 1:03d}.txt             3 x 4 projection for 1600 x 1200 pixels
    idrmasks/scanN/{id:03d}.png  or  idrmasks/scanN/mask/{id:03d}.png

Layout "idr" (IDR, PixelNeRF)::

    scanN/image/{id:06d}.png
    scanN/mask/{id:03d}.png
    scanN/cameras.npz                                  world_mat_{id}, scale_mat_{id}

`world_mat` is the same projection, for the image size of that copy. `scale_mat` only moves and scales the world, which
the normalisation here does for itself, so it is not used: world units stay millimetres and both layouts give the same
cameras.

Somebody's own capture in the second layout (any folder name, any number of cameras) is told from a scan by `is_own`,
and read by `idr`.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.base import Capture, FewViewBaseParser, whole_factor
from diffusionerf_ns.dataparsers.idr import (
    IDRFewViewDataParserConfig,
    IDRFewViewParser,
    camera_file,
    mask_places,
    reduced_folder,
    world_matrices,
)
from diffusionerf_ns.dataparsers.images import absolute, check_mask_size, image_size, list_images
from diffusionerf_ns.dataparsers.poses import opengl_from_opencv
from diffusionerf_ns.dataparsers.projections import checked_projection, decompose

VIEWS = 49  # some scans have 64, but every protocol uses the first 49 only
SCAN_CAMERAS = (VIEWS, 64)
SCAN_NAME = re.compile(r"(?:dtu_?)?scan_?(\d+)")  # NeuS calls its copies dtu_scan24
TRAIN_IDS = (25, 22, 28, 40, 44, 48, 0, 8, 13)
EXCLUDED_IDS = (3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 36, 37, 38, 39)
TEST_IDS = tuple(i for i in range(VIEWS) if i not in TRAIN_IDS + EXCLUDED_IDS)
NEAR_FAR = (0.5, 3.5)  # in units of the largest camera coordinate after recentring (RegNeRF)
FULL_SIZE = (1600, 1200)
PROTOCOL_WIDTH = 400


@dataclass
class DTUFewViewDataParserConfig(IDRFewViewDataParserConfig):
    """DTU scans (RegNeRF's or IDR's layout), split as RegNeRF's protocol splits them; own captures in IDR's layout."""

    _target: type = field(default_factory=lambda: DTUFewViewParser)
    """target class to instantiate"""
    scan: int | None = None
    """Number of the scan, where `--data` is the folder of many."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Where the files of one scan lie."""

    layout: Literal["rectified", "idr"]
    folder: Path
    name: str

    def image(self, index: int) -> Path:
        """The image of an id; of several ways to number IDR's files that which exists."""
        if self.layout == "rectified":
            return self.folder / f"rect_{index + 1:03d}_3_r5000.png"
        names = [self.folder / "image" / f"{index:0{digits}d}.png" for digits in (6, 3)]
        return next((name for name in names if name.is_file()), names[0])


class DTUFewViewParser(FewViewBaseParser):
    """Reads a DTU scan, or somebody's own capture in IDR's layout.

    Scene units of a scan: the largest camera coordinate is 1 in the frame of the mean camera, over all 49 cameras; the
    scene is then turned (not scaled) so that z is up. RegNeRF's near .5 and far 3.5 hold in these units.
    """

    config: DTUFewViewDataParserConfig

    def read_capture(self) -> Capture:
        """Of a scan all 49 cameras: the first views of the protocol's list train, its 25 test views are held out.

        Of an own capture what `IDRFewViewParser` reads.
        """
        scan = find_scan(self.config.data, self.config.scan)
        if not is_own(scan):
            return self._read_scan(scan)
        if len(world_matrices(scan.folder)[1]) in SCAN_CAMERAS:
            CONSOLE.print(
                f"[yellow]{escape(str(scan.folder))} has as many cameras as a scan of DTU's, and another name: it is "
                "read as a capture of its own. For DTU's protocol call the folder scanN."
            )
        return IDRFewViewParser(replace(self.config, data=scan.folder)).read_capture()

    def _read_scan(self, scan: Scan) -> Capture:
        factor = whole_factor(self.config.downscale_factor)
        split = self.choose(VIEWS, TRAIN_IDS, TEST_IDS, how="first")
        if bad := sorted(set(EXCLUDED_IDS) & {*split.train, *split.test}):
            CONSOLE.print(f"[yellow]ids {bad} are never used by the DTU protocol: their exposure is wrong")
        used = sorted({*split.train, *split.test})
        images = tuple(scan.image(i) for i in range(VIEWS))
        if missing := [i for i in used if not images[i].is_file()]:
            there = [i for i in range(VIEWS) if images[i].is_file()]
            raise InputError(
                f"{scan.folder}: images of ids {missing} are missing, {images[missing[0]].name} among them; the ids "
                f"found are {there}. Complete the scan, or choose among these with --train-ids and --test-ids."
            )
        if scan.layout == "rectified":
            projections, size = read_calibration(scan.folder), FULL_SIZE
        else:
            projections = read_idr_cameras(scan.folder)
            size = calibrated_size(projections)
        intrinsics, opencv = decompose(projections)
        unit = largest_coordinate(opencv)
        width, height = image_size(images[used[0]])
        factor = factor or max(1, width // PROTOCOL_WIDTH)
        masks = self._masks(scan, split.test, (width // factor, height // factor))
        train_masks = None
        if self.config.masked_training:
            train_masks = self._masks(scan, tuple(used), (width // factor, height // factor))
            if train_masks is None:
                raise InputError(f"--masked-training: no masks were found for {scan.folder}; give --mask-folder.")
        return Capture(
            source="dtu",
            title=f"{scan.name} (DTU, {scan.layout})",
            names=tuple(path.name for path in images),
            images=images,
            poses=opengl_from_opencv(opencv),
            intrinsics=intrinsics,
            sizes=np.tile(np.array(size, dtype=np.int64), (VIEWS, 1)),
            split=split,
            factor=factor,
            cache=_cache_folder(scan, factor),
            bounds=np.tile(np.array(NEAR_FAR) * unit, (VIEWS, 1)),
            masks=train_masks,
            eval_masks=masks,
            metres=1e-3,
            unit=unit,
            protocol="nerfstudio" if masks is None else "dtu-regnerf",
        )

    def _masks(self, scan: Scan, ids: tuple[int, ...], size: tuple[int, int]) -> tuple[Path, ...] | None:
        """A mask path for each of the 49 ids (checked for ``ids``), or None where there are no masks at all."""
        folder = find_masks(scan, self.config.mask_folder)
        if folder is None:
            CONSOLE.print(
                f"[yellow]no masks were found for {escape(str(scan.folder))}: metrics will be over all pixels, which "
                "the DTU protocol does not do (--mask-folder says where they are)"
            )
            return None
        paths = tuple(folder / f"{i:03d}.png" for i in range(VIEWS))
        if missing := [i for i in ids if not paths[i].is_file()]:
            raise InputError(f"{folder}: masks of ids {missing} are missing, {paths[missing[0]].name} among them.")
        for i in ids:
            check_mask_size(paths[i], size)
        return paths


def is_dtu(data: Path) -> bool:
    """Whether a folder looks like a DTU scan, a folder of scans, or an own capture in IDR's layout."""
    return bool(_scan_here(data) or scans_below(data))


def is_within_scan(data: Path) -> bool:
    """Whether a folder is that of the images, reduced images or masks of a scan in IDR's layout."""
    data = absolute(data)
    scan = _scan_here(data.parent)
    return scan is not None and scan.layout == "idr" and bool(re.fullmatch(r"image(_\d+)?|mask", data.name))


def is_own(scan: Scan) -> bool:
    """Whether it is no scan of DTU's, by its name and its number of cameras, but a capture in the layout of one.

    Raises:
        InputError: its cameras cannot be read.
    """
    if scan.layout == "rectified":
        return False
    if not SCAN_NAME.fullmatch(scan.name):
        return True
    return (
        camera_file(scan.folder) is not None and 1 + max(world_matrices(scan.folder)[1], default=0) not in SCAN_CAMERAS
    )


def find_scan(data: Path, number: int | None) -> Scan:
    """The scan in ``data``, which is its folder or holds scan folders (directly or under `Rectified`).

    Raises:
        InputError: there is none, or several and no number says which.
    """
    if number is None and (scan := _scan_here(data)):
        return scan
    scans = scans_below(data)
    names = ", ".join(sorted(scans, key=lambda name: scan_number(name) or 0)) or "none"
    if number is not None and (scan := _scan_here(data)) and scan.name == f"scan{number}":
        return scan
    if number is not None and f"scan{number}" in scans:
        return scans[f"scan{number}"]
    if number is None and len(scans) == 1:
        return next(iter(scans.values()))
    if not scans:
        raise InputError(
            f"--data {data} holds no DTU scan: expected scanN/image and scanN/cameras.npz, or Rectified/scanN with "
            "rect_001_3_r5000.png and so on, or one such scan folder itself."
        )
    wanted = "which one is meant? Give its number with --scan" if number is None else f"scan{number} is not there"
    raise InputError(f"--data {data} holds the scans {names}: {wanted}.")


def scan_number(name: str) -> int | None:
    """N of a folder that is called scanN, as DTU's are; None of other names, `SCAN_NAME`'s of copies among them."""
    found = SCAN_NAME.fullmatch(name)
    return int(found[1]) if found and name == f"scan{found[1]}" else None


def scans_below(data: Path) -> dict[str, Scan]:
    """The scans in the folders `scanN` of ``data`` and of its `Rectified`."""
    found: dict[str, Scan] = {}
    for parent in (data, data / "Rectified"):
        for folder in parent.glob("scan*") if parent.is_dir() else ():
            if scan_number(folder.name) is not None and (scan := _scan_here(folder)):
                found.setdefault(folder.name, scan)
    return found


def _scan_here(folder: Path) -> Scan | None:
    name = absolute(folder).name
    if any(folder.glob("rect_*_3_r5000.png")):
        return Scan(layout="rectified", folder=folder, name=name)
    if list_images(folder / "image") and (scan_number(name) is not None or camera_file(folder)):
        return Scan(layout="idr", folder=folder, name=name)
    return None


def find_masks(scan: Scan, given: Path | None) -> Path | None:
    """The folder that holds `{id:03d}.png`, or None.

    Raises:
        InputError: ``given`` holds no masks.
    """
    if given is not None or scan.layout == "idr":
        places = mask_places(scan.folder, given)
    else:
        roots = absolute(scan.folder).parents[:2]
        places = [root / "idrmasks" / scan.name / sub for root in roots for sub in ("mask", ".")]
    found = next((place for place in places if any(place.glob("[0-9][0-9][0-9].png"))), None)
    if found is None and given is not None:
        raise InputError(f"--mask-folder {given}: no masks 000.png and so on in it, nor in {scan.name} below it.")
    return found


def read_calibration(folder: Path) -> Float[np.ndarray, "n 3 4"]:
    """Projections of all 49 cameras from `Calibration/cal18`, beside `Rectified` or in a folder above the scan.

    Raises:
        InputError: the folder or a file of it is missing or damaged.
    """
    parents = [*absolute(folder).parents[:2], folder]
    places = [parent / "Calibration" / "cal18" for parent in parents]
    calibration = next((place for place in places if place.is_dir()), None)
    if calibration is None:
        raise InputError(
            f"{folder}: no calibration was found. Expected the folder {places[1]} of DTU's SampleSet, with "
            "pos_001.txt to pos_049.txt."
        )
    projections = []
    for i in range(VIEWS):
        path = calibration / f"pos_{i + 1:03d}.txt"
        if not path.is_file():
            raise InputError(f"{path} is missing: all {VIEWS} cameras are needed, as they set the scale of the scene.")
        try:
            matrix = np.loadtxt(path)
        except ValueError as error:
            raise InputError(f"{path} cannot be read: {error}.") from error
        projections.append(checked_projection(matrix, str(path)))
    return np.stack(projections)


def read_idr_cameras(folder: Path) -> Float[np.ndarray, "n 3 4"]:
    """Projections of all 49 cameras from `cameras.npz`: the upper rows of `world_mat_{id}`.

    Raises:
        InputError: the file is missing or damaged, or lacks a camera.
    """
    path, matrices = world_matrices(folder)
    if missing := [i for i in range(VIEWS) if i not in matrices]:
        raise InputError(f"{path}: world_mat of ids {missing} is missing; all {VIEWS} cameras set the scene's scale.")
    return np.stack([matrices[i] for i in range(VIEWS)])


def calibrated_size(projections: Float[np.ndarray, "n 3 4"]) -> tuple[int, int]:
    """The image size that projections are for: 1600 x 1200 halved until the principal point lies nearest its middle.

    Copies of the data come reduced, with their cameras scaled or not; the principal point tells.
    """
    middle = float(decompose(projections)[0][:, 2].mean())
    halvings = int(np.clip(np.round(np.log2(FULL_SIZE[0] / 2 / middle)), 0, 4)) if middle > 0 else 0
    return FULL_SIZE[0] >> halvings, FULL_SIZE[1] >> halvings


def largest_coordinate(poses: Float[np.ndarray, "n 3 4"]) -> float:
    """Largest absolute coordinate of the camera centres in the frame of the mean camera (RegNeRF's unit).

    That frame: mean centre; z the mean viewing axis; x across it and the mean up vector.
    """
    centres = poses[:, :, 3] - poses[:, :, 3].mean(axis=0)
    z = _unit(poses[:, :, 2].mean(axis=0))
    x = _unit(np.cross(poses[:, :, 1].mean(axis=0), z))
    return float(np.abs(centres @ np.stack([x, np.cross(z, x), z], axis=1)).max())


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _cache_folder(scan: Scan, factor: int) -> Path:
    """Beside the images: `scanN/image_K`, `Rectified/scanN_K`."""
    if scan.layout == "idr":
        return reduced_folder(scan.folder, factor)
    return absolute(scan.folder).parent / f"{scan.name}_{factor}"
