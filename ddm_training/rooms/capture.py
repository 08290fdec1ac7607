"""A room as a few-view capture: `transforms.json` as nerfstudio reads it, images, and true depth.

Poses are camera-to-world in OpenGL axes (right, up, backward), metres, z up. Depth files are 16-bit PNG in millimetres
of planar z (nerfstudio's default unit), 0 where there is none (the sky). Intrinsics count the centre of the first pixel
as (0.5, 0.5).
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddm_training.errors import InputError
from ddm_training.rooms.cameras import capture_cameras, exposure, room_with_views
from ddm_training.rooms.render import Camera
from ddm_training.rooms.scene import Room
from ddm_training.rooms.shading import render
from ddm_training.rooms.store import View, develop

FILE = "transforms.json"
GENERATOR = "ddm rooms"


@dataclass(frozen=True, kw_only=True)
class CaptureJob:
    """One capture, in a folder of its own."""

    folder: Path
    seed: int
    index: int
    num_train: int
    num_test: int
    size: View

    @property
    def options(self) -> dict[str, Any]:
        """What decides the content; kept in the file to tell whether it is this capture."""
        return {
            "generator": GENERATOR,
            "seed": self.seed,
            "room": self.index,
            "num_train": self.num_train,
            "num_test": self.num_test,
            "w": self.size.width,
            "h": self.size.height,
            "fl_x": self.size.focal,
        }

    def is_whole(self) -> bool:
        """Whether the folder holds this capture (transforms.json is written last).

        Raises:
            InputError: it holds something else.
        """
        path = self.folder / FILE
        if not path.exists():
            return False
        try:
            content = json.loads(path.read_text())
            found = {**content.get("made_by", {}), **{k: content.get(k) for k in ("w", "h", "fl_x")}}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be read ({error}): delete {self.folder}, or use another --folder."
            ) from error
        if found != self.options:
            raise InputError(
                f"{self.folder} holds another capture ({found}), not {self.options}: delete it, or "
                "use another --folder."
            )
        return True


def write_capture(job: CaptureJob) -> int:
    """Write the capture; returns the number of images."""
    size = job.size

    def find(room: Room) -> tuple[list[Camera], list[Camera]]:
        return capture_cameras(
            room,
            room.rng(3),
            num_train=job.num_train,
            num_test=job.num_test,
            focal=size.focal,
            width=size.width,
            height=size.height,
        )

    room, (train, test) = room_with_views(job.seed, job.index, find)
    gain = exposure(room, train)
    for sub in ("images", "depth"):
        if (job.folder / sub).exists():
            shutil.rmtree(job.folder / sub)
        (job.folder / sub).mkdir(parents=True)
    frames, lists = [], {"train": [], "test": []}
    for kind, cameras in (("train", train), ("test", test)):
        for number, camera in enumerate(cameras):
            name = f"{kind}_{number:03d}.png"
            linear, depth, _ = render(room.scene, room.shadows, camera)
            Image.fromarray(develop(linear, gain)).save(job.folder / "images" / name)
            millimetres = np.rint(np.where(np.isfinite(depth), 1000.0 * depth, 0.0)).clip(0, 65535).astype(np.uint16)
            Image.fromarray(millimetres).save(job.folder / "depth" / name)
            frames.append(
                {
                    "file_path": f"images/{name}",
                    "depth_file_path": f"depth/{name}",
                    "transform_matrix": camera.camera_to_world.tolist(),
                }
            )
            lists[kind].append(f"images/{name}")
    fx, fy, cx, cy = train[0].intrinsics
    content = {
        "camera_model": "OPENCV",
        "fl_x": fx,
        "fl_y": fy,
        "cx": cx,
        "cy": cy,
        "w": size.width,
        "h": size.height,
        "made_by": {k: v for k, v in job.options.items() if k not in ("w", "h", "fl_x")},
        "train_filenames": lists["train"],
        "val_filenames": lists["test"],
        "test_filenames": lists["test"],
        "frames": frames,
    }
    part = job.folder / f"{FILE}.part"
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.rename(job.folder / FILE)
    return len(frames)
