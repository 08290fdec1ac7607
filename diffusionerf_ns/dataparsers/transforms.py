"""nerfstudio captures: `transforms.json`, as `ns-process-data`, Polycam, Record3D and others write it.

Also two files in its place, `transforms_train.json` and `transforms_test.json`, as the synthetic NeRF scenes have them.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from ddm_training.errors import InputError
from ddm_training.transforms import DISTORTION, FILE
from diffusionerf_ns.dataparsers.base import (
    Capture,
    FewViewBaseConfig,
    FewViewBaseParser,
    Layout,
    automatic_factor,
    whole_factor,
)
from diffusionerf_ns.dataparsers.images import CACHE_FILE, image_size
from diffusionerf_ns.dataparsers.masks import FOLDER as MASKS
from diffusionerf_ns.dataparsers.poses import OrientationMethod
from diffusionerf_ns.dataparsers.splits import Split, without_lists

PERSPECTIVE = ("PERSPECTIVE", "PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL")
NUMBERS = ("w", "h", "fl_x", "fl_y", "cx", "cy", "camera_angle_x", "applied_scale", *DISTORTION)
FILES = ("file_path", "depth_file_path", "mask_path")
SPLIT_FILES = {kind: f"transforms_{kind}.json" for kind in ("train", "test")}
LISTS = {kind: f"{kind}_filenames" for kind in ("train", "val", "test")}


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
    source: ClassVar[Layout] = "transforms"

    def _read(self) -> tuple[dict[str, Any], Path, Path]:
        """Checked content, the file that it is of, for messages, and the folder that its names are within."""
        path = self.config.data if self.config.data.suffix == ".json" else self.config.data / FILE
        if not path.is_file() and (path.parent / SPLIT_FILES["train"]).is_file():
            return read_split_transforms(path.parent), path.parent / SPLIT_FILES["train"], path.parent
        return read_transforms(path), path, path.parent

    def read_capture(self) -> Capture:
        """All frames sorted by file name; split by the file's own lists, else by `without_lists`."""
        meta, path, folder = self._read()
        files = [_find_file(folder, _entry(frame, "file_path", path)) for frame in meta["frames"]]
        order = sorted(range(len(files)), key=lambda i: files[i])
        frames, files = [meta["frames"][i] for i in order], [files[i] for i in order]
        if len(set(files)) < len(files):
            raise InputError(f"{path}: several frames have the same file_path; expected one frame per image.")
        names = tuple(_name(file, folder) for file in files)

        split = self._split(meta, files, folder, path)
        used = sorted({*split.train, *split.test})
        if missing := [names[i] for i in used if not files[i].is_file()]:
            there = [str(i) for i, file in enumerate(files) if file.is_file()]
            more = ", ..." if len(missing) > 5 else ""
            others = f", or choose with both --train-ids and --test-ids among those there: {', '.join(there[:20])}"
            raise InputError(
                f"{path}: {len(missing)} image files are missing: {', '.join(missing[:5])}{more}. Looked in {folder}. "
                f"Copy them there{others if there else ''}{', ...' if len(there) > 20 else ''}."
            )
        intrinsics, sizes = _intrinsics(meta, frames, files, used[0], path)
        images, factor, cache = _sized_images(files, used, folder, whole_factor(self.config.downscale_factor))
        depths = _optional(frames, "depth_file_path", folder)
        masks = _optional(frames, "mask_path", folder)
        if masks is None and self.source == "transforms" and (folder / MASKS).is_dir():
            CONSOLE.print(f"The masks of {escape(str(folder / MASKS))} are not used: no frame has a mask_path.")
        if masks is not None and (lacking := [names[i] for i in used if masks[i] is None]):
            raise InputError(
                f"{path}: frames {', '.join(lacking[:5])} have no mask_path, others have one: all or none."
            )
        for files_of_kind in (depths, masks):
            gone = [f for i in used if files_of_kind and (f := files_of_kind[i]) is not None and not f.is_file()]
            if gone:
                raise InputError(f"{path} names {gone[0]}, which does not exist.")
        return Capture(
            source=self.source,
            title=f"{folder.resolve().name} ({path.relative_to(folder)})",
            names=names,
            images=tuple(images),
            poses=np.stack([_pose(frame, path) for frame in frames]),
            intrinsics=intrinsics,
            sizes=sizes,
            split=split,
            factor=factor,
            cache=cache,
            distortion=_distortion(meta, frames),
            masks=None if masks is None else tuple(mask or Path() for mask in masks),
            depths=depths,
            depth_unit=self.config.depth_unit_scale_factor,
            metres=None if depths is None else 1.0,
            applied=_applied(meta, path),
            applied_scale=meta.get("applied_scale", 1.0),
            orientation=meta.get("orientation_override"),
            alpha_color=meta.get("alpha_color"),
        )

    def _split(self, meta: dict[str, Any], files: list[Path], folder: Path, path: Path) -> Split:
        """The file's own lists, completed by what is left where it has one only; else see `without_lists`."""
        given: dict[str, list[int]] = {}
        for kind, key in LISTS.items():
            if key in meta:
                wanted = [_find_file(folder, name) for name in meta[key]]
                if unknown := [str(p) for p in wanted if p not in files]:
                    raise InputError(f"{path}: {key} lists images that no frame has: {unknown[:5]}.")
                given[kind] = sorted({files.index(p) for p in wanted})
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
        return self.choose(len(files), pool, test)


def read_transforms(path: Path) -> dict[str, Any]:
    """Read `transforms.json` and check what it must have. Of what is null nothing is given back.

    Raises:
        InputError: missing, not JSON, without frames, with values of another kind than they should be, or of a camera
            model that is not perspective.
    """
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows's tools write a mark first
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    return check_transforms(meta, path)


def read_split_transforms(folder: Path) -> dict[str, Any]:
    """Training and test frames of `transforms_train.json` and `transforms_test.json`, as of one file with lists.

    Such scenes are shown on white, as all who publish figures of them do.

    Raises:
        InputError: as of `read_transforms`, of either file.
    """
    files = {kind: read_transforms(folder / name) for kind, name in SPLIT_FILES.items()}
    frames = {
        kind: [{key: value for key, value in meta.items() if key != "frames"} | frame for frame in meta["frames"]]
        for kind, meta in files.items()
    }
    lists = {
        LISTS[kind]: [_entry(frame, "file_path", folder / SPLIT_FILES[kind]) for frame in frames[kind]]
        for kind in files
    }
    shared = {key: value for key, value in files["train"].items() if key not in ("frames", *LISTS.values())}
    return shared | {"frames": [*frames["train"], *frames["test"]], "alpha_color": (1.0, 1.0, 1.0)} | lists


def check_transforms(meta: Any, path: Path) -> dict[str, Any]:
    """The content of such a file, without what is null and with numbers as floats.

    Args:
        meta: what JSON holds.
        path: of the file, for messages.

    Raises:
        InputError: as of `read_transforms`.
    """
    if not isinstance(meta, dict) or not isinstance(meta.get("frames"), list) or not meta["frames"]:
        raise InputError(f"{path} has no frames; expected a nerfstudio capture with a list under 'frames'.")
    for number, frame in enumerate(meta["frames"]):
        if not isinstance(frame, dict):
            raise InputError(f"{path}: frame {number} is {_short(frame)}; expected an object with its file_path.")
    meta = _checked(meta, path)
    meta.pop("alpha_color", None)  # ours, see `read_split_transforms`; no file has it
    meta["frames"] = [_checked(frame, path) for frame in meta["frames"]]
    for key in LISTS.values():
        names = meta.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: {key} is {_short(names)}; expected a list of file names.")
    if not meta.get("applied_scale", 1.0) > 0:
        raise InputError(f"{path}: applied_scale is {meta['applied_scale']:g}; expected a positive number.")
    orientation = meta.get("orientation_override", "none")
    if orientation not in get_args(OrientationMethod):
        known = ", ".join(get_args(OrientationMethod))
        raise InputError(f"{path}: orientation_override is {orientation!r}; expected one of {known}.")
    return meta


def _checked(owner: dict[str, Any], path: Path) -> dict[str, Any]:
    """The file's own values or a frame's, without those that are null, with numbers as floats."""
    owner = {key: value for key, value in owner.items() if value is not None}
    where = f"frame {_short(owner['file_path'])}" if "file_path" in owner else "a value for all frames"
    for key in NUMBERS:
        if key in owner:
            owner[key] = _number(owner[key], key, where, path)
    for key in FILES:
        if not isinstance(owner.get(key, ""), str):
            raise InputError(f"{path}: {key} is {_short(owner[key])} ({where}); expected the name of a file.")
    if (given := owner.get("distortion_params")) is not None:
        if not isinstance(given, list) or len(given) != len(DISTORTION):
            raise InputError(
                f"{path}: distortion_params is {_short(given)} ({where}); expected the {len(DISTORTION)} numbers "
                f"{' '.join(DISTORTION)}. Put 0 for those that the camera has not, or name those that it has instead."
            )
        owner["distortion_params"] = [_number(value, "distortion_params", where, path) for value in given]
    fisheye = owner.get("is_fisheye")  # instant-ngp's
    model = "FISHEYE (is_fisheye)" if fisheye else owner.get("camera_model", "PERSPECTIVE")
    if str(model).upper() not in PERSPECTIVE:
        raise InputError(
            f"{path}: camera model {model} is not supported; patches and planar depth need a perspective camera "
            f"({', '.join(PERSPECTIVE)}). Undistort the images first."
        )
    return owner


def _number(value: Any, key: str, where: str, path: Path) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{path}: {key} is {_short(value)} ({where}); expected a number.")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _entry(frame: dict[str, Any], key: str, path: Path) -> Any:
    if key not in frame:
        raise InputError(f"{path}: a frame has no {key!r}; every frame needs file_path and transform_matrix.")
    return frame[key]


def _pose(frame: dict[str, Any], path: Path) -> np.ndarray:
    return _matrix(_entry(frame, "transform_matrix", path), f"transform_matrix of {frame['file_path']}", path)


def _matrix(given: Any, what: str, path: Path) -> np.ndarray:
    """The upper 3 x 4 of a matrix of the file."""
    try:
        matrix = np.array(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {what} holds other things than numbers.") from error
    if matrix.shape not in ((4, 4), (3, 4)):
        raise InputError(f"{path}: {what} is {matrix.shape}; expected 4 x 4 or 3 x 4.")
    return matrix[:3]


def _applied(meta: dict[str, Any], path: Path) -> torch.Tensor | None:
    if "applied_transform" not in meta:
        return None
    matrix = _matrix(meta["applied_transform"], "applied_transform", path)
    if not np.isfinite(matrix).all():
        raise InputError(f"{path}: applied_transform holds null, NaN or infinite numbers; expected 3 x 4 numbers.")
    return torch.from_numpy(matrix).float()


def _find_file(folder: Path, name: str) -> Path:
    """A file named in the JSON; the synthetic NeRF scenes leave out the suffix .png."""
    file = folder / name
    if "\\" in name and not file.is_file():  # of a tool on Windows
        file = folder / name.replace("\\", "/")
    if not file.suffix and not file.is_file() and file.with_suffix(".png").is_file():
        return file.with_suffix(".png")
    return file


def _name(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)


def _optional(frames: list[dict[str, Any]], key: str, folder: Path) -> tuple[Path | None, ...] | None:
    """Files that frames may have; None where no frame has one."""
    if not any(frame.get(key) for frame in frames):
        return None
    return tuple(_find_file(folder, frame[key]) if frame.get(key) else None for frame in frames)


def _intrinsics(
    meta: dict[str, Any], frames: list[dict[str, Any]], files: list[Path], sample: int, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """fx, fy, cx, cy [n, 4] and the width and height [n, 2] that they hold for; a frame's own values win."""
    rows, sizes = [], []
    for frame, file in zip(frames, files):
        own = {**meta, **frame}
        if "w" in own and "h" in own:
            width, height = int(own["w"]), int(own["h"])
        else:
            width, height = image_size(file if file.is_file() else files[sample])
        if "fl_x" in own:
            fx = own["fl_x"]
        elif "camera_angle_x" in own:
            if not 0 < own["camera_angle_x"] < math.pi:
                raise InputError(
                    f"{path}: camera_angle_x of frame {frame['file_path']} is {own['camera_angle_x']:g}; expected the "
                    "horizontal field of view in radians, between 0 and pi."
                )
            fx = 0.5 * width / math.tan(0.5 * own["camera_angle_x"])
        else:
            raise InputError(f"{path}: frame {frame['file_path']} has no focal length fl_x, and the file has none.")
        row = (fx, own.get("fl_y", fx), own.get("cx", width / 2), own.get("cy", height / 2))
        if min(row[:2]) <= 0 or min(width, height) <= 0:
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
        rows.append([own.get(key, 0.0) for key in DISTORTION] if given is None else given)
    return np.array(rows, dtype=np.float64)


def _sized_images(files: list[Path], used: list[int], folder: Path, factor: int | None) -> tuple[list[Path], int, Path]:
    """Image files, what they are still to be reduced by, and the folder for the reduced copies.

    As with nerfstudio, a folder `images_K` that holds all the images wanted is used as it is.
    """
    if factor is None:
        factor = automatic_factor(*image_size(files[used[0]]))
    cache = folder / f"images_{factor}"
    if factor > 1 and cache.is_dir() and not (cache / CACHE_FILE).is_file():
        images = folder / "images"
        ready = [cache / (file.relative_to(images) if file.is_relative_to(images) else file.name) for file in files]
        if len(set(ready)) == len(files) and all(ready[i].is_file() for i in used):
            return ready, 1, cache
    return files, factor, cache
