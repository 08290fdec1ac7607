"""Small trees in Hypersim's on-disk layout, of a known plane or of random content."""

import csv
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from ddm_training.hypersim import CAMERA_FILE, PLAIN_CAMERA, SPLIT_FILE, WIDTH_HEIGHT, frame_files

SPLIT_COLUMNS = (
    "scene_name",
    "camera_name",
    "frame_id",
    "included_in_public_release",
    "exclude_reason",
    "split_partition_name",
)


def write_hdf5(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset", data=array, compression="gzip")


def ray_lengths(width: int, height: int) -> np.ndarray:
    """|ray| / |ray_z| of the plain camera, from the focal formula."""
    focal = 886.81 * width / 1024
    x, y = np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2
    return np.sqrt(x[None, :] ** 2 + y[:, None] ** 2 + focal**2) / focal


def write_frame(images: Path, camera: str, frame: int, *, size: tuple[int, int] = (64, 48), seed: int = 0) -> None:
    """A wall at 2 m on the left and at 4 m on the right; random colour."""
    width, height = size
    rng = np.random.default_rng([seed, frame])
    z = np.full((height, width), 2.0)
    z[:, width // 2 :] = 4.0
    files = frame_files(images, camera, frame, "hdr")
    write_hdf5(files["depth"], (z * ray_lengths(width, height)).astype(np.float16))
    write_hdf5(files["entity id"], np.ones((height, width), np.int32))
    write_hdf5(files["colour"], rng.uniform(0.0, 3.0, (height, width, 3)).astype(np.float16))


def write_tables(
    root: Path, scenes: dict[str, str], cameras: Sequence[str], frames: int, size: tuple[int, int]
) -> None:
    """Split and camera tables for scenes given as name -> split."""
    with (root / SPLIT_FILE).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(SPLIT_COLUMNS)
        for scene, split in scenes.items():
            for camera in cameras:
                table.writerows([scene, camera, i, "True", "", split] for i in range(frames))
    with (root / CAMERA_FILE).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["scene_name", *WIDTH_HEIGHT, *(f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3))])
        for scene in scenes:
            table.writerow([scene, float(size[0]), float(size[1]), *np.array(PLAIN_CAMERA).ravel()])


def write_tree(
    root: Path,
    scenes: dict[str, str],
    *,
    cameras: Sequence[str] = ("cam_00",),
    frames: int = 2,
    size: tuple[int, int] = (64, 48),
) -> Path:
    """A whole tree; scenes are given as name -> split."""
    root.mkdir(parents=True, exist_ok=True)
    write_tables(root, scenes, cameras, frames, size)
    for number, scene in enumerate(scenes):
        for camera in cameras:
            for frame in range(frames):
                write_frame(root / scene / "images", camera, frame, size=size, seed=number)
    return root
