"""The default data parser: finds out what a folder holds and hands over to the parser of that layout."""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from ddm_training.errors import InputError
from ddm_training.transforms import FILE as TRANSFORMS_FILE
from diffusionerf_ns.dataparsers.base import Capture, FewViewBaseConfig, FewViewBaseParser, check_folder
from diffusionerf_ns.dataparsers.dtu import DTUFewViewDataParserConfig, is_dtu
from diffusionerf_ns.dataparsers.images import PHOTOGRAPH_SUFFIXES, list_images
from diffusionerf_ns.dataparsers.llff import POSES_FILE, LLFFFewViewDataParserConfig
from diffusionerf_ns.dataparsers.transforms import TransformsFewViewDataParserConfig

Layout = Literal["llff", "transforms", "dtu"]


@dataclass
class FewViewDataParserConfig(FewViewBaseConfig):
    """Captures of few views: LLFF, nerfstudio's transforms.json, DTU; found by what the folder holds."""

    _target: type = field(default_factory=lambda: FewViewDataParser)
    """target class to instantiate"""
    layout: Literal["auto", "llff", "transforms", "dtu"] = "auto"
    """What the folder holds; "auto" looks."""
    depth_unit_scale_factor: float = 1e-3
    """Metres per stored unit of depth files of transforms.json."""
    scan: int | None = None
    """Number of the DTU scan, where `--data` is the folder of many."""
    mask_folder: Path | None = None
    """Folder of DTU masks. Unset: looked for beside the images."""
    masked_training: bool = False
    """Draw training pixels inside the DTU masks only. The protocol uses masks for evaluation alone."""


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
    if is_photographs(data):
        raise InputError(
            f"--data {data} holds photographs without camera poses. Find them with "
            f"`diffusionerf-poses --data {shlex.quote(str(data))} --output FOLDER`, then give that folder."
        )
    if parent := _find_layout(data.resolve().parent):
        raise InputError(f"--data {data} is a folder of a capture ({parent}); give {data.resolve().parent}.")
    found = sorted(p.name for p in data.iterdir())
    raise InputError(
        f"--data {data} holds no capture that is known. Expected one of: {POSES_FILE} with images or images_K (LLFF); "
        f"{TRANSFORMS_FILE} (nerfstudio; diffusionerf-poses makes it from photographs); "
        "scanN/image and scanN/cameras.npz, or Rectified/scanN and Calibration (DTU). "
        f"Found: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}."
    )


def is_photographs(data: Path) -> bool:
    """Whether a folder holds images, and nothing in it or above it that says where they were taken."""
    if not data.is_dir() or any(_find_layout(f) or _has_cameras(f) for f in (data, data.resolve().parent)):
        return False
    return bool(list_images(data, PHOTOGRAPH_SUFFIXES)) and not any(
        p.is_dir() and not p.name.startswith(".") for p in data.iterdir()
    )


def _has_cameras(folder: Path) -> bool:
    """Whether files of cameras lie there, of layouts that are read here and of others."""
    return any(
        p.name in ("sparse", "colmap") or p.suffix in (".npy", ".npz") or p.match("transforms*.json")
        for p in folder.iterdir()
    )


def _find_layout(data: Path) -> Layout | None:
    if data.suffix == ".json" or (data / TRANSFORMS_FILE).is_file():
        return "transforms"
    if (data / POSES_FILE).is_file():
        return "llff"
    return "dtu" if is_dtu(data) else None


def delegate_config(config: FewViewDataParserConfig) -> FewViewBaseConfig:
    """The config of the parser for the layout of ``config.data``, with the same flags."""
    layout = detect_layout(config.data) if config.layout == "auto" else config.layout
    kind: type[FewViewBaseConfig] = {
        "llff": LLFFFewViewDataParserConfig,
        "transforms": TransformsFewViewDataParserConfig,
        "dtu": DTUFewViewDataParserConfig,
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
            raise InputError(
                f"--{flag.name.replace('_', '-')} means nothing for {config.data}: it is a {layout} capture."
            )
    return kind(**flags)
