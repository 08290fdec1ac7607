"""A room or still as a few-view capture, see `transforms`: z is up, and the sky has no depth."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddm_training.errors import InputError
from ddm_training.rooms.cameras import Kind, capture_cameras, exposure, room_with_views
from ddm_training.rooms.render import Camera
from ddm_training.rooms.scene import Room
from ddm_training.rooms.shading import render
from ddm_training.rooms.store import FrameSize, develop
from ddm_training.transforms import FILE, CaptureView, write_views

GENERATOR = "ddm rooms"
_PICTURE = re.compile(r"(train|test)_\d+\.png")


@dataclass(frozen=True, kw_only=True)
class CaptureJob:
    """One capture, in a folder of its own."""

    folder: Path
    kind: Kind = "room"
    seed: int
    index: int
    num_train: int
    num_test: int
    size: FrameSize

    @property
    def options(self) -> dict[str, Any]:
        """What decides the content; kept in the file to tell whether it is this capture."""
        return {
            "generator": GENERATOR,
            "seed": self.seed,
            self.kind: self.index,
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
            self._require_no_pictures_of_others()
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

    def _require_no_pictures_of_others(self) -> None:
        """Refuse a folder with pictures that are not what a killed `write_views` leaves: a user's own would mix."""
        for folder in (self.folder / "images", self.folder / "depth"):
            names = [p.name for p in folder.iterdir() if p.name[0] != "."] if folder.is_dir() else []
            if other := next((name for name in sorted(names) if not _PICTURE.fullmatch(name)), None):
                raise InputError(
                    f"{folder} holds {other}, which `ddm rooms` did not write: expected an empty --folder, or one that "
                    "it began; give another."
                )


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
            kind=job.kind,
        )

    room, (train, test) = room_with_views(job.seed, job.index, find, job.kind)
    gain = exposure(room, train)
    for sub in ("images", "depth"):  # of a run that was killed, perhaps with more views
        for path in (job.folder / sub).glob("*.png"):
            if _PICTURE.fullmatch(path.name):
                path.unlink()

    def views() -> Iterator[CaptureView]:
        for kind, cameras in (("train", train), ("test", test)):
            for number, camera in enumerate(cameras):
                linear, depth, _ = render(room.scene, room.shadows, camera)
                yield kind, f"{number:03d}", develop(linear, gain), depth, camera.camera_to_world

    made_by = {k: v for k, v in job.options.items() if k not in ("w", "h", "fl_x")}
    return write_views(job.folder, views(), train[0].intrinsics, (size.width, size.height), {"made_by": made_by})
