"""The default data parser: finds out what a folder holds and hands over to the parser of that layout."""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from ddm_training.errors import InputError
from ddm_training.transforms import FILE as TRANSFORMS_FILE
from ddm_training.transforms import is_made_here
from diffusionerf_ns.dataparsers import colmap
from diffusionerf_ns.dataparsers.base import Capture, FewViewBaseConfig, FewViewBaseParser, Layout, check_folder
from diffusionerf_ns.dataparsers.dtu import DTUFewViewDataParserConfig, is_dtu, is_within_scan
from diffusionerf_ns.dataparsers.idr import camera_file
from diffusionerf_ns.dataparsers.images import PHOTOGRAPH_SUFFIXES, list_images
from diffusionerf_ns.dataparsers.llff import POSES_FILE, LLFFFewViewDataParserConfig
from diffusionerf_ns.dataparsers.transforms import SPLIT_FILES, TransformsFewViewDataParserConfig


@dataclass
class FewViewDataParserConfig(FewViewBaseConfig):
    """Captures of few views: LLFF, transforms.json, COLMAP, DTU, IDR's layout; found by what the folder holds."""

    _target: type = field(default_factory=lambda: FewViewDataParser)
    """target class to instantiate"""
    layout: Literal["auto", Layout] = "auto"
    """What the folder holds; "auto" looks."""
    depth_unit_scale_factor: float = 1e-3
    """Metres per stored unit of depth files of transforms.json."""
    scan: int | None = None
    """Number of the DTU scan, where `--data` is the folder of many."""
    mask_folder: Path | None = None
    """Folder of the masks (not of transforms.json, which names its own). Unset: looked for beside the images."""
    masked_training: bool = False
    """Draw training pixels inside those masks only. DTU's protocol uses masks for evaluation alone."""


class FewViewDataParser(FewViewBaseParser):
    """Reads any of the known layouts."""

    config: FewViewDataParserConfig

    def read_capture(self) -> Capture:
        """The capture as the parser of its layout reads it."""
        return delegate_config(self.config).setup().read_capture()


def detect_layout(data: Path) -> Layout:
    """The layout of a folder, by the files that only it has.

    Raises:
        InputError: no such folder, an empty one, or none of the layouts.
    """
    check_folder(data)
    if layout := _find_layout(data):
        return layout
    poses = f"`diffusionerf-poses --data {shlex.quote(str(data))} --output FOLDER`, then give that folder."
    if is_photographs(data):
        raise InputError(f"--data {data} holds photographs without camera poses. Find them with {poses}")
    above = data.resolve().parent
    if layout := _layout_above(data):
        raise InputError(f"--data {data} is a folder of a capture ({layout}); give {above}.")
    found = sorted(p.name for p in data.iterdir())
    images = list_images(data, PHOTOGRAPH_SUFFIXES)
    raise InputError(
        f"--data {data} holds no capture that is known. Expected one of: {POSES_FILE} with images or images_K (LLFF); "
        f"{TRANSFORMS_FILE} (nerfstudio; diffusionerf-poses makes it from photographs), or "
        f"{' and '.join(SPLIT_FILES.values())}; images and sparse/0 (COLMAP); "
        "scanN/image and scanN/cameras.npz, or Rectified/scanN and Calibration (DTU); image and cameras.npz (IDR, "
        f"NeuS). Found: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}."
        + (f" If nothing says where the images were taken, find that out with {poses}" if images else "")
    )


def is_photographs(data: Path) -> bool:
    """Whether a folder holds images, and nothing in it or above it says where they were taken.

    A capture that `diffusionerf-poses` wrote into it does not count: it may have been made of fewer photographs.
    """
    if not data.is_dir() or not list_images(data, PHOTOGRAPH_SUFFIXES):
        return False
    if _find_layout(data) or _has_cameras(data) or any(p.suffix in (".npy", ".npz") for p in data.iterdir()):
        return False
    below = (p for p in data.iterdir() if p.is_dir() and not p.name.startswith("."))
    if any(_has_cameras(folder) and not is_made_here(folder) for folder in below):
        return False
    above = data.resolve().parent
    of_colmap = data.resolve().name.startswith(colmap.IMAGES)
    return not _layout_above(data) and not _has_transforms(above) and not (of_colmap and _has_colmap(above))


def _layout_above(data: Path) -> Layout | None:
    """The layout of the capture in the folder above, where ``data`` belongs to it. What lies beside it does not."""
    layout = _find_layout(data.resolve().parent)
    return None if layout == "dtu" and not is_within_scan(data.resolve()) else layout


def _has_cameras(folder: Path) -> bool:
    """Whether files of cameras lie there, of layouts that are read here and of others."""
    return (
        _has_transforms(folder)
        or _has_colmap(folder)
        or (folder / POSES_FILE).is_file()
        or camera_file(folder) is not None
    )


def _has_transforms(folder: Path) -> bool:
    return any(folder.glob("transforms*.json"))


def _has_colmap(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("sparse", "colmap", "cameras.bin", "cameras.txt"))


def _find_layout(data: Path) -> Layout | None:
    if data.suffix == ".json" or (data / TRANSFORMS_FILE).is_file():
        return "transforms"
    if all((data / name).is_file() for name in SPLIT_FILES.values()):
        return "transforms"
    if (data / POSES_FILE).is_file():
        return "llff"
    if is_dtu(data):
        return "dtu"
    return "colmap" if colmap.find_images(data) is not None and colmap.find_models(data) else None


def delegate_config(config: FewViewDataParserConfig) -> FewViewBaseConfig:
    """The config of the parser for the layout of ``config.data``, with the same flags."""
    layout = detect_layout(config.data) if config.layout == "auto" else config.layout
    kind: type[FewViewBaseConfig] = {
        "llff": LLFFFewViewDataParserConfig,
        "transforms": TransformsFewViewDataParserConfig,
        "dtu": DTUFewViewDataParserConfig,
        "colmap": colmap.ColmapFewViewDataParserConfig,
    }[layout]
    known = {f.name for f in fields(kind)}
    flags = {}
    for flag in fields(config):
        value = getattr(config, flag.name)
        if flag.name in ("_target", "layout"):
            continue
        if flag.name in known:
            flags[flag.name] = value
        elif value != flag.default:
            if layout == "transforms" and flag.name in ("mask_folder", "masked_training"):
                raise InputError(
                    f"--{flag.name.replace('_', '-')} means nothing for {config.data}: the masks of transforms.json "
                    "are the mask_path of its frames, and are always trained by."
                )
            raise InputError(
                f"--{flag.name.replace('_', '-')} means nothing for {config.data}: it is a {layout} capture."
            )
    return kind(**flags)
