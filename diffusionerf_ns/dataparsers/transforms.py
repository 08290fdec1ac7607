"""nerfstudio captures: `transforms.json`, as `ns-process-data`, Polycam, Record3D and others write it."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddm_training.errors import InputError
from ddm_training.transforms import FILE
from diffusionerf_ns.dataparsers.base import (
    Capture,
    FewViewBaseConfig,
    FewViewBaseParser,
    automatic_factor,
    whole_factor,
)
from diffusionerf_ns.dataparsers.images import CACHE_FILE, image_size
from diffusionerf_ns.dataparsers.splits import Split, choose, without_lists

PERSPECTIVE = ("PERSPECTIVE", "PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


@dataclass
class TransformsFewViewDataParserConfig(FewViewBaseConfig):
    """nerfstudio captures (transforms.json) with few training views."""

    _target: type = field(default_factory=lambda: TransformsFewViewParser)
    """target class to instantiate"""
    depth_unit_scale_factor: float = 1e-3
    """Metres per stored unit of depth files."""


class TransformsFewViewParser(FewViewBaseParser):
    """Reads `transforms.json`.

    A capture with depth files counts as metric: nerfstudio too takes its pose units to be metres. Depth of structure
    from motion (``ns-process-data --use-sfm-depth``) is in units of nothing, and is taken for metres all the same.
    """

    config: TransformsFewViewDataParserConfig

    def read_capture(self) -> Capture:
        """All frames sorted by file name; split by the file's own lists, else by `without_lists`."""
        path = self.config.data if self.config.data.suffix == ".json" else self.config.data / FILE
        meta = read_transforms(path)
        folder = path.parent
        files = [_find_file(folder, _entry(frame, "file_path", path)) for frame in meta["frames"]]
        order = sorted(range(len(files)), key=lambda i: files[i])
        frames, files = [meta["frames"][i] for i in order], [files[i] for i in order]
        if len(set(files)) < len(files):
            raise InputError(f"{path}: several frames have the same file_path; expected one frame per image.")
        names = tuple(_name(file, folder) for file in files)

        split = self._split(meta, files, folder, path)
        used = sorted({*split.train, *split.test})
        if missing := [names[i] for i in used if not files[i].is_file()]:
            raise InputError(f"{path}: image files are missing: {', '.join(missing[:5])}. Looked in {folder}.")
        intrinsics, sizes = _intrinsics(meta, frames, files, used[0], path)
        images, factor, cache = _sized_images(files, used, folder, whole_factor(self.config.downscale_factor))
        depths = _optional(frames, "depth_file_path", folder)
        masks = _optional(frames, "mask_path", folder)
        if masks is not None and (lacking := [names[i] for i in used if masks[i] is None]):
            raise InputError(
                f"{path}: frames {', '.join(lacking[:5])} have no mask_path, others have one: all or none."
            )
        for files_of_kind in (depths, masks):
            gone = [f for i in used if files_of_kind and (f := files_of_kind[i]) is not None and not f.is_file()]
            if gone:
                raise InputError(f"{path} names {gone[0]}, which does not exist.")
        applied = meta.get("applied_transform")
        return Capture(
            source="transforms",
            title=f"{folder.resolve().name} ({path.name})",
            names=names,
            images=tuple(images),
            poses=np.stack([_matrix(frame, path) for frame in frames]),
            intrinsics=intrinsics,
            sizes=sizes,
            split=split,
            factor=factor,
            cache=cache,
            cached=tuple(i for i in range(len(files)) if files[i].is_file()),
            distortion=_distortion(meta, frames),
            masks=None if masks is None else tuple(mask or Path() for mask in masks),
            depths=depths,
            depth_unit=self.config.depth_unit_scale_factor,
            metres=None if depths is None else 1.0,
            applied=None if applied is None else torch.tensor(applied, dtype=torch.float32)[:3],
            applied_scale=float(meta.get("applied_scale", 1.0)),
            orientation=meta.get("orientation_override"),
        )

    def _split(self, meta: dict[str, Any], files: list[Path], folder: Path, path: Path) -> Split:
        """The file's own lists, completed by what is left where it has one only; else see `without_lists`."""
        given: dict[str, list[int]] = {}
        for kind in ("train", "val", "test"):
            if f"{kind}_filenames" in meta:
                wanted = [_find_file(folder, str(name)) for name in meta[f"{kind}_filenames"]]
                if unknown := [str(p) for p in wanted if p not in files]:
                    raise InputError(f"{path}: {kind}_filenames lists images that no frame has: {unknown[:5]}.")
                given[kind] = sorted(files.index(p) for p in wanted)
        test = given.get("test") or given.get("val")
        if given:
            everything = range(len(files))
            pool = given.get("train") or [i for i in everything if i not in set(test or ())]
            test = test if test is not None else [i for i in everything if i not in set(pool)]
            chosen = self.config.train_ids is not None and self.config.test_ids is not None
            if not chosen and (both := sorted(set(pool) & set(test))):
                raise InputError(
                    f"{path}: {len(both)} images are in train_filenames and in test_filenames, {files[both[0]].name} "
                    "among them: an image is trained on or tested on. Mend the file, or give both --train-ids and "
                    "--test-ids."
                )
        else:
            named = self.config.test_ids is not None
            pool, test = (list(ids) for ids in without_lists(len(files), named))
        return choose(
            len(files),
            pool,
            test,
            num_views=self.config.num_views,
            train_ids=self.config.train_ids,
            test_ids=self.config.test_ids,
        )


def read_transforms(path: Path) -> dict[str, Any]:
    """Read `transforms.json` and check what it must have.

    Raises:
        InputError: missing, not JSON, without frames, or of a camera model that is not perspective.
    """
    try:
        meta = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("frames"), list) or not meta["frames"]:
        raise InputError(f"{path} has no frames; expected a nerfstudio capture with a list under 'frames'.")
    for owner in (meta, *meta["frames"]):
        fisheye = owner.get("is_fisheye")  # instant-ngp's
        model = "FISHEYE (is_fisheye)" if fisheye else owner.get("camera_model", "PERSPECTIVE")
        if model not in PERSPECTIVE:
            raise InputError(
                f"{path}: camera model {model} is not supported; patches and planar depth need a perspective camera "
                f"({', '.join(PERSPECTIVE)}). Undistort the images first."
            )
    return meta


def _entry(frame: dict[str, Any], key: str, path: Path) -> Any:
    if key not in frame:
        raise InputError(f"{path}: a frame has no {key!r}; every frame needs file_path and transform_matrix.")
    return frame[key]


def _matrix(frame: dict[str, Any], path: Path) -> np.ndarray:
    given = _entry(frame, "transform_matrix", path)
    try:
        matrix = np.array(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: transform_matrix of {frame['file_path']} holds other things than numbers."
        ) from error
    if matrix.shape not in ((4, 4), (3, 4)):
        raise InputError(
            f"{path}: transform_matrix of {frame['file_path']} is {matrix.shape}; expected 4 x 4 or 3 x 4."
        )
    return matrix[:3]


def _find_file(folder: Path, name: str) -> Path:
    """A file named in the JSON; the synthetic NeRF scenes leave out the suffix .png."""
    file = folder / name
    if not file.suffix and not file.is_file() and file.with_suffix(".png").is_file():
        return file.with_suffix(".png")
    return file


def _name(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)


def _optional(frames: list[dict[str, Any]], key: str, folder: Path) -> tuple[Path | None, ...] | None:
    """Files that frames may have; None where no frame has one."""
    if not any(frame.get(key) for frame in frames):
        return None
    return tuple(folder / frame[key] if frame.get(key) else None for frame in frames)


def _intrinsics(
    meta: dict[str, Any], frames: list[dict[str, Any]], files: list[Path], sample: int, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """fx, fy, cx, cy [n, 4] and the width and height [n, 2] that they hold for; a frame's own values win."""
    rows, sizes = [], []
    for frame in frames:
        own = {**meta, **frame}
        if "w" in own and "h" in own:
            width, height = int(own["w"]), int(own["h"])
        else:
            width, height = image_size(files[sample])
        if "fl_x" in own:
            fx = float(own["fl_x"])
        elif "camera_angle_x" in own:
            fx = 0.5 * width / math.tan(0.5 * float(own["camera_angle_x"]))
        else:
            raise InputError(f"{path}: frame {frame['file_path']} has no focal length fl_x, and the file has none.")
        row = (fx, float(own.get("fl_y", fx)), float(own.get("cx", width / 2)), float(own.get("cy", height / 2)))
        if not np.isfinite(row).all() or min(row[:2]) <= 0 or min(width, height) <= 0:
            raise InputError(f"{path}: frame {frame['file_path']} has intrinsics {row} for {width} x {height} pixels.")
        rows.append(row)
        sizes.append((width, height))
    return np.array(rows, dtype=np.float64), np.array(sizes, dtype=np.int64)


def _distortion(meta: dict[str, Any], frames: list[dict[str, Any]]) -> np.ndarray:
    """k1 k2 k3 k4 p1 p2 of each frame [n, 6], in nerfstudio's order; a frame's own values win."""
    rows = []
    for frame in frames:
        own = {**meta, **frame}
        given = own.get("distortion_params")
        rows.append([float(own.get(key, 0.0)) for key in DISTORTION] if given is None else [float(v) for v in given])
    return np.array(rows, dtype=np.float64)


def _sized_images(files: list[Path], used: list[int], folder: Path, factor: int | None) -> tuple[list[Path], int, Path]:
    """Image files, what they are still to be reduced by, and the folder for the reduced copies.

    As with nerfstudio, a folder `images_K` that holds all the images wanted is used as it is.
    """
    if factor is None:
        factor = automatic_factor(*image_size(files[used[0]]))
    cache = folder / f"images_{factor}"
    if factor > 1 and cache.is_dir() and not (cache / CACHE_FILE).is_file():
        ready = [cache / file.name for file in files]
        names_differ = len({file.name for file in files}) == len(files)
        if names_differ and all(ready[i].is_file() for i in used):
            return ready, 1, cache
    return files, factor, cache
