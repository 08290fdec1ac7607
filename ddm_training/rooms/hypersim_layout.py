"""Rooms in Hypersim's own on-disk layout, with real HDF5 files: to try the whole path without Hypersim.

A room is a scene ``ai_9XX_YYY`` (no such scene is in Hypersim) with one camera, ``cam_00``. Depth is the Euclidean
distance to the camera centre in metres, NaN where nothing is hit; colour is linear and of no particular exposure.
"""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from ddm_training.errors import InputError
from ddm_training.files import replacing, writing
from ddm_training.frames import Split
from ddm_training.hypersim import CAMERA_FILE, SPLIT_FILE, tone_map
from ddm_training.rooms.cameras import room_with_random_cameras
from ddm_training.rooms.shading import render
from ddm_training.rooms.store import FrameSize

CAMERA = "cam_00"
OPTIONS_FILE = "made_by.json"  # in a scene's folder
SPLIT_COLUMNS = [
    "scene_name", "camera_name", "frame_id", "included_in_public_release", "exclude_reason", "split_partition_name"
]  # fmt: skip
# The official columns; those of V-Ray's physical camera stay empty, as where Hypersim's camera is not physical.
_PHYSICAL = """
anisotropy blades_enable blades_num blades_rotation bmpaperture_affects_exposure bmpaperture_enable
bmpaperture_resolution bmpaperture_tex center_bias distortion distortion_tex distortion_type dof_display_threshold
dont_affect_settings enable_thin_lens_equation exposure f_number film_width focal_length focus_distance fov
horizontal_offset horizontal_shift ISO latency lens_file lens_shift optical_vignetting rolling_shutter_duration
rolling_shutter_mode shutter_angle shutter_offset shutter_speed specify_focus specify_fov subdivs target_distance
targeted type use_dof use_moblur vertical_offset vignetting white_balance zoom_factor
"""
_SETTINGS = """
auto_corrections_mode auto_exposure auto_exposure_compensation auto_fit auto_white_balance curve dist
dont_affect_settings fov height image_planes type
"""
CAMERA_COLUMNS = [
    "scene_name",
    "settings_output_img_height",
    "settings_output_img_width",
    "settings_units_info_meters_scale",
    "use_camera_physical",
    *(f"camera_physical_{name}" for name in _PHYSICAL.split()),
    *(f"settings_camera_{name}" for name in _SETTINGS.split()),
    *(f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3)),
    *(f"M_proj_{i}{j}" for i in range(4) for j in range(4)),
]


@dataclass(frozen=True, kw_only=True)
class HypersimRoomJob:
    """One room, as a scene of Hypersim's layout."""

    root: Path
    """Folder of the data set: scenes and the two CSV files."""
    seed: int
    index: int
    split: Split
    views: int
    size: FrameSize

    @property
    def name(self) -> str:
        return f"ai_{900 + self.index // 999:03d}_{self.index % 999 + 1:03d}"

    @property
    def options(self) -> dict[str, Any]:
        """What decides the content; kept in the scene's folder to tell whether it is this scene."""
        return {"seed": self.seed, "num_views": self.views, **asdict(self.size)}

    def is_whole(self) -> bool:
        """Whether the scene's folder is there: it is renamed into place when whole.

        Raises:
            InputError: it was made with other options, or does not say with which.
        """
        folder = self.root / self.name
        if not folder.exists():
            return False
        path = folder / OPTIONS_FILE
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}, which tells how the scene was made, cannot be read ({error}): delete {folder}, or use "
                "another --folder."
            ) from error
        if found != self.options:
            raise InputError(
                f"{folder} was made with other options ({found}), not {self.options}: use those, or another --folder."
            )
        return True


def euclidean_distance(depth: Float[np.ndarray, "h w"], focal: float) -> Float[np.ndarray, "h w"]:
    """Planar z -> distance to the camera centre, z sqrt(u^2 + v^2 + f^2) / f, the principal point in the centre."""
    h, w = depth.shape
    u = np.arange(w) + 0.5 - w / 2
    v = np.arange(h)[:, None] + 0.5 - h / 2
    return depth * np.sqrt(u**2 + v**2 + focal**2) / focal


def write_hypersim_room(job: HypersimRoomJob) -> int:
    """Write one scene; returns the number of frames."""
    size = job.size
    room, cameras = room_with_random_cameras(
        job.seed, job.index, job.views, focal=size.focal, width=size.width, height=size.height
    )
    part = job.root / f"{job.name}.part"
    if part.exists():
        shutil.rmtree(part)
    kinds = {
        kind: part / "images" / f"scene_{CAMERA}_{kind}" for kind in ("final_hdf5", "geometry_hdf5", "final_preview")
    }
    for folder in kinds.values():
        folder.mkdir(parents=True)
    for frame, camera in enumerate(cameras):
        linear, depth, entity = render(room.scene, room.shadows, camera)
        distance = np.where(np.isfinite(depth), euclidean_distance(depth, camera.focal), np.nan)
        color = linear.astype(np.float16)
        name = f"frame.{frame:04d}"
        _write_hdf5(kinds["final_hdf5"] / f"{name}.color.hdf5", color)
        _write_hdf5(kinds["geometry_hdf5"] / f"{name}.depth_meters.hdf5", distance.astype(np.float16))
        _write_hdf5(kinds["geometry_hdf5"] / f"{name}.render_entity_id.hdf5", entity.astype(np.int32))
        preview = tone_map(color, entity != -1)
        Image.fromarray(preview).save(kinds["final_preview"] / f"{name}.tonemap.jpg", quality=95)
    (part / OPTIONS_FILE).write_text(json.dumps(job.options) + "\n")
    part.rename(job.root / job.name)
    return job.views


def _write_hdf5(path: Path, array: np.ndarray) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("dataset", data=array, compression="gzip", compression_opts=1)


def write_metadata(root: Path, jobs: Sequence[HypersimRoomJob]) -> None:
    """The two CSV files with the official columns: the rows of all scenes of ``jobs``, and those that are there of
    other scenes, sorted by scene.

    Raises:
        InputError: a file is there and is another table, or cannot be read or written.
    """
    split_rows = [[job.name, CAMERA, frame, True, "", job.split] for job in jobs for frame in range(job.views)]
    _merge_csv(root / SPLIT_FILE, SPLIT_COLUMNS, split_rows)
    _merge_csv(root / CAMERA_FILE, CAMERA_COLUMNS, [_camera_row(job) for job in jobs])


def _camera_row(job: HypersimRoomJob) -> list[str]:
    x, y = job.size.width / 2 / job.size.focal, job.size.height / 2 / job.size.focal
    near, far = 1.0, 1000.0
    row = dict.fromkeys(CAMERA_COLUMNS, "")
    row |= {f"M_cam_from_uv_{i}{j}": "0.0" for i in range(3) for j in range(3)}
    row |= {f"M_proj_{i}{j}": "0.0" for i in range(4) for j in range(4)}
    values = {
        "scene_name": job.name,
        "settings_output_img_height": float(job.size.height),
        "settings_output_img_width": float(job.size.width),
        "settings_units_info_meters_scale": 1.0,
        "use_camera_physical": False,
        "settings_camera_fov": 2 * np.arctan(x),
        "M_cam_from_uv_00": x,
        "M_cam_from_uv_11": y,
        "M_cam_from_uv_22": -1.0,
        "M_proj_00": 1 / x,
        "M_proj_11": 1 / y,
        "M_proj_22": -(far + near) / (far - near),
        "M_proj_23": -2 * far * near / (far - near),
        "M_proj_32": -1.0,
    }
    row |= {key: str(value) for key, value in values.items()}
    return list(row.values())


def _merge_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table of which each row begins with its scene; the rows of a scene stay in their order."""
    replaced = {row[0] for row in rows}
    with writing(path, "The rooms are whole; mend the cause and run the same command again."):
        kept = [row for row in _read_rows(path, columns) if row[0] not in replaced]
        merged = sorted([*kept, *rows], key=lambda row: str(row[0]))
        with replacing(path) as part, part.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *merged])


def _read_rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The rows of a table that is there, without its head."""
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            head, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no table ({error}): delete it, or use another --folder.") from error
    if head != list(columns):
        raise InputError(f"{path} has other columns than Hypersim's: delete it, or use another --folder.")
    return rows
