"""Rooms to disk: frame stores, Hypersim's layout, few-view captures. Every writer is a function of (config, room)."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from ddm_training.frames import SceneWriter, Split, read_scene_info
from ddm_training.rooms.render import Camera
from ddm_training.rooms.scene import Room, exposure, random_camera, room_with_views
from ddm_training.rooms.shading import render

NOISE = 0.006  # standard deviation of sensor noise in sRGB, at most


def develop(
    linear: Float[np.ndarray, "h w 3"], gain: float, rng: np.random.Generator | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Linear colour -> 8 bit with gamma 2.2, as Hypersim's tone map; with some noise where ``rng`` is given."""
    image = np.clip(linear * gain, 0.0, 1.0) ** (1 / 2.2)
    if rng is not None:
        image = image + rng.uniform(0, NOISE) * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def store_scene_name(seed: int, index: int) -> str:
    """Name of a room in a frame store."""
    return f"room_{seed:03d}_{index:06d}"


def write_store_room(
    root: Path, *, seed: int, index: int, split: Split, views: int, width: int, height: int, focal: float
) -> int:
    """Write one room into a frame store; nothing to do where it is already whole. Returns the frames written."""
    name = store_scene_name(seed, index)
    if (root / name).is_dir():
        info = read_scene_info(root / name)
        if (len(info.frames), info.width, info.height, info.split) == (views, width, height, split):
            return 0

    def cameras_of(room: Room) -> list[Camera]:
        rng = room.rng(1)
        return [random_camera(room, rng, focal=focal, width=width, height=height) for _ in range(views)]

    room, cameras = room_with_views(seed, index, cameras_of)
    gain, rng = exposure(room, cameras), room.rng(2)
    writer = SceneWriter(root, name, split=split, source="rooms", max_frames=views, height=height, width=width)
    for number, camera in enumerate(cameras):
        linear, depth, _ = render(room.scene, room.shadows, camera)
        color = develop(linear, gain * float(np.exp(rng.normal(0, 0.25))), rng)
        mask = np.isfinite(depth)
        depth = np.where(mask, depth, 0.0).astype(np.float32)
        writer.add(color, depth, mask, intrinsics=camera.intrinsics, name=f"{name}/{number:03d}")
    writer.close()
    return views
