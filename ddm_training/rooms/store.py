"""Rooms and stills as scenes of a frame store (see `ddm_training.frames`): each is a scene, a view is a frame."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from ddm_training.errors import InputError
from ddm_training.frames import SceneWriter, Split, open_scene
from ddm_training.rooms.cameras import Kind, exposure, room_with_random_cameras
from ddm_training.rooms.shading import render

NOISE = 0.006  # standard deviation of sensor noise after gamma, at most


@dataclass(frozen=True, kw_only=True)
class FrameSize:
    """Number of pixels of a frame, and the focal length in pixels."""

    width: int
    height: int
    focal: float


@dataclass(frozen=True, kw_only=True)
class StoreJob:
    """One room or still of a frame store."""

    root: Path
    kind: Kind = "room"
    seed: int
    index: int
    split: Split
    views: int
    size: FrameSize

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.seed:03d}_{self.index:06d}"

    @property
    def source(self) -> str:
        """Where frames are from, as the store tells it."""
        return f"{self.kind}s"

    def is_whole(self) -> bool:
        """Whether the store has it.

        Raises:
            InputError: it has one of that name which is damaged or was made with other options.
        """
        folder = self.root / self.name
        if not folder.exists():
            return False
        info = open_scene(folder).info
        size, found = self.size, (info.width, info.height, len(info.frames), info.split, info.source)
        wanted = (size.width, size.height, self.views, self.split, self.source)
        if found != wanted or not math.isclose(info.intrinsics[0][0], size.focal):
            raise InputError(
                f"{folder} was made with other options: (width, height, frames, split, source) {found} with f = "
                f"{info.intrinsics[0][0]} px, wanted {wanted} with f = {size.focal} px. Use those, or another --folder."
            )
        return True


def develop(
    linear: Float[np.ndarray, "h w 3"], gain: float, rng: np.random.Generator | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Linear colour -> 8 bit with gamma 2.2, as Hypersim's tone map; with some noise where ``rng`` is given."""
    image = np.clip(linear * gain, 0.0, 1.0) ** (1 / 2.2)
    if rng is not None:
        image = image + rng.uniform(0, NOISE) * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def write_store_room(job: StoreJob) -> int:
    """Write one into a frame store; returns the number of frames."""
    size = job.size
    room, cameras = room_with_random_cameras(
        job.seed, job.index, job.views, focal=size.focal, width=size.width, height=size.height, kind=job.kind
    )
    gain, rng = exposure(room, cameras), room.rng(2)
    writer = SceneWriter(
        job.root,
        job.name,
        split=job.split,
        source=job.source,
        max_frames=job.views,
        height=size.height,
        width=size.width,
    )
    for number, camera in enumerate(cameras):
        linear, depth, _ = render(room.scene, room.shadows, camera)
        color = develop(linear, gain * float(np.exp(rng.normal(0, 0.25))), rng)
        mask = np.isfinite(depth)
        writer.add(color, depth, mask, intrinsics=camera.intrinsics, name=f"{job.name}/{number:03d}")
    writer.close()
    return job.views
