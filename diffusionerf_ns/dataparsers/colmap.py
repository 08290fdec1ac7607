"""COLMAP models beside their images: `images` and `sparse/0`, as mip-NeRF 360 and Gaussian splatting have them."""

import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.base import Capture
from diffusionerf_ns.dataparsers.images import PHOTOGRAPH_SUFFIXES, list_images
from diffusionerf_ns.dataparsers.masks import MaskedFewViewConfig, find_masks
from diffusionerf_ns.dataparsers.transforms import (
    TransformsFewViewDataParserConfig,
    TransformsFewViewParser,
    check_transforms,
)

IMAGES = ("images", "input")  # where COLMAP's users keep them
SUFFIXES = (".bin", ".txt")
UNDISTORT = "Undistort the images first (colmap image_undistorter)."


@dataclass
class ColmapFewViewDataParserConfig(MaskedFewViewConfig, TransformsFewViewDataParserConfig):
    """COLMAP models with few training views."""

    _target: type = field(default_factory=lambda: ColmapFewViewParser)
    """target class to instantiate"""


class ColmapFewViewParser(TransformsFewViewParser):
    """Reads `cameras` and `images` of a model; its points are not needed: `stereo` finds its own."""

    config: ColmapFewViewDataParserConfig
    source = "colmap"

    def read_capture(self) -> Capture:
        """All images that have a pose, with their masks."""
        capture, data = super().read_capture(), self.config.data
        names = [str(Path(*Path(name).parts[1:])) for name in capture.names]  # without the folder of the images
        return replace(capture, masks=find_masks(names, {*capture.split.train, *capture.split.test}, data, self.config))

    def _read(self) -> tuple[dict[str, Any], Path, Path]:
        data = self.config.data
        folder = find_images(data)
        models = find_models(data)
        if folder is None or not models:
            raise InputError(
                f"--data {data} holds no COLMAP model with its images; expected {' or '.join(IMAGES)}, and cameras and "
                "images (.bin or .txt) in sparse/0, sparse, colmap/sparse/0 or the folder itself."
            )
        read = [(path, _read_model(path)) for path in models]
        path, (cameras, images) = max(read, key=lambda model: len(model[1][1]))  # mapping may have begun anew
        frames = [_frame(image, cameras, folder.relative_to(data), path) for image in images.values()]
        known = {image.name for image in images.values()}
        unknown = [file.name for file in list_images(folder, PHOTOGRAPH_SUFFIXES) if file.name not in known]
        if unknown:
            CONSOLE.print(
                f"[yellow]{len(unknown)} of the images in {escape(str(folder))} have no pose in "
                f"{escape(str(path.relative_to(data)))} and are left out: {escape(', '.join(unknown[:5]))}"
                f"{', ...' if len(unknown) > 5 else ''}."
            )
        return check_transforms({"frames": frames}, path), path, data


def find_images(data: Path) -> Path | None:
    """The folder of a model's images."""
    return next((data / name for name in IMAGES if (data / name).is_dir()), None)


def find_models(data: Path) -> list[Path]:
    """Folders that hold a model, of the first place that has any."""
    for place in (data / "sparse", data / "colmap" / "sparse", data):
        found = [path for path in (*sorted(place.glob("[0-9]*")), place) if _file(path, "images") is not None]
        if found:
            return found
    return []


def _file(model: Path, name: str) -> Path | None:
    """A file of a model, where the model is whole."""
    for suffix in SUFFIXES:
        if all((model / f"{part}{suffix}").is_file() for part in ("cameras", "images")):
            return model / f"{name}{suffix}"
    return None


def _read_model(model: Path) -> tuple[dict[int, Any], dict[int, Any]]:
    """Cameras and images of a model as nerfstudio reads them, by their ids.

    Raises:
        InputError: a file is damaged, or there are no images.
    """
    from nerfstudio.data.utils import colmap_parsing_utils as colmap

    parts, path = [], Path()
    for name in ("cameras", "images"):
        path = _file(model, name) or path
        read = getattr(colmap, f"read_{name}_{'binary' if path.suffix == '.bin' else 'text'}")
        try:
            parts.append(read(path))
        except KeyError as error:  # of its table of camera models
            raise InputError(f"{path} has a camera model that is not supported, number {error}. {UNDISTORT}") from error
        except (OSError, ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}. Expected a model of COLMAP.") from error
    cameras, images = parts
    if not images:
        raise InputError(f"{model} is a COLMAP model without images: nothing was placed.")
    if path.suffix == ".txt":
        names = _names(path)
        images = {number: image._replace(name=names[number]) for number, image in images.items()}
    return cameras, images


def _names(path: Path) -> dict[int, str]:
    """Names of a text model's images by their ids, with their spaces, where nerfstudio's reader ends them."""
    lines = iter(path.read_text().splitlines())
    names = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            number, *_, name = line.strip().split(maxsplit=9)
            names[int(number)] = name
            next(lines, None)  # its points
    return names


def _frame(image: Any, cameras: dict[int, Any], folder: Path, model: Path) -> dict[str, Any]:
    """An image of a model, as a frame of `transforms.json`."""
    from nerfstudio.data.utils.colmap_parsing_utils import qvec2rotmat
    from nerfstudio.process_data.colmap_utils import parse_colmap_camera_params

    if image.camera_id not in cameras:
        raise InputError(f"{model}: image {image.name} is of camera {image.camera_id}, which the model has not.")
    try:
        intrinsics = parse_colmap_camera_params(cameras[image.camera_id])
    except NotImplementedError as error:
        found = cameras[image.camera_id].model
        raise InputError(f"{model}: camera model {found} is not supported. {UNDISTORT}") from error
    rotation = qvec2rotmat(image.qvec)  # world to camera, y down and z ahead
    pose = np.concatenate([rotation.T, -rotation.T @ image.tvec[:, None]], axis=1)
    pose[:, 1:3] *= -1.0  # to OpenGL's axes
    return {"file_path": str(folder / image.name), "transform_matrix": pose.tolist(), **intrinsics}
