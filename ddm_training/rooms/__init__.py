"""`ddm rooms`: procedural scenes with exact depth and poses.

shapes      scenes as arrays of primitives          textures    the texture bank
render      cameras and visibility                  shading     light, and the finished picture
furniture   materials and objects                   scene       a random room
subjects    plants, figures, models, things         stills      a random still, one of them from close by
cameras     where cameras stand                     store, hypersim_layout, capture    what is written
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddm_training.errors import InputError, require_at_least
from ddm_training.files import exclusive
from ddm_training.frames import Split

if TYPE_CHECKING:
    from ddm_training.rooms.cameras import Kind
    from ddm_training.rooms.store import FrameSize

Output = Literal["store", "hypersim", "capture"]
Scenes = Literal["rooms", "stills"]


@dataclass(frozen=True, kw_only=True)
class RoomsConfig:
    """Make procedural rooms: frames for `ddm train`, Hypersim's layout for tests, few-view captures for demos.

    Everything follows from the seed and a room's number. Running the same command again continues.
    """

    folder: Path
    """Where to write. One such command writes there at a time."""
    output: Output = "store"
    """store: a frame store for `ddm train`. hypersim: Hypersim's own files. capture: transforms.json, images and depth
    of one room, for a few-view NeRF."""
    scenes: Scenes = "rooms"
    """rooms: furnished rooms. stills: plants, figures, models of houses and things, from close by, on a
    table or outdoors (store, capture); what is said of rooms below goes for them."""
    seed: int = 0
    """Another seed gives other rooms."""
    first_room: int = 0
    """Number of the first room, or of the capture's room."""
    num_rooms: int | None = None
    """Rooms to make, by default 400 (store) or 4 (hypersim)."""
    num_views: int | None = None
    """Frames of each room, by default 4 (store, hypersim)."""
    val_every: int | None = None
    """Every n-th room is a validation room, by default 16 (store) or 4 (hypersim)."""
    num_train: int | None = None
    """Training images of a capture, by default 9."""
    num_test: int | None = None
    """Test images of a capture, by default 8."""
    width: int | None = None
    """Width of a frame in pixels, by default 256 (store), 1024 (hypersim) or 160 (capture)."""
    height: int | None = None
    """Height of a frame in pixels, by default three quarters of the width."""
    focal: float | None = None
    """Focal length in pixels, by default 175 / 256 (store, capture) or 886.81 / 1024 (hypersim) of the width."""
    workers: int | None = None
    """Processes, by default 2 (store, hypersim); the result does not depend on their number. A capture is made in
    one."""

    def __post_init__(self) -> None:
        for name in _MEANINGLESS[self.output]:
            if getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} has no meaning with --output {self.output}: leave it out.")
        if self.scenes == "stills" and self.output == "hypersim":
            raise InputError("--scenes stills has no meaning with --output hypersim: its scenes are rooms.")
        require_at_least(self, seed=0, first_room=0, num_train=1, num_test=0, width=16, height=16, focal=1,
                         num_rooms=1, num_views=1, val_every=1, workers=1)  # fmt: skip

    def main(self) -> None:
        """Write what is not there yet.

        Raises:
            InputError: the folder holds something else, cannot be written (a full disk) or is written to by another
                such command, a process died, or a room has nowhere a view.
        """
        # Workers inherit this: rooms are made in parallel, and small matrix products gain nothing from threads.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with exclusive(self.folder, "making of scenes", "--folder"):
            {"store": self._store, "hypersim": self._hypersim, "capture": self._capture}[self.output]()

    @property
    def _kind(self) -> "Kind":
        return "still" if self.scenes == "stills" else "room"

    def _frame_size(self, default_width: int, default_focal: float) -> "FrameSize":
        """What is asked for; the default focal length is that of the default width, and follows the width."""
        from ddm_training.rooms.store import FrameSize

        width = self.width or default_width
        return FrameSize(
            width=width,
            height=self.height or round(width * 3 / 4),
            focal=self.focal or default_focal * width / default_width,
        )

    def _rooms(self, count: int, val_every: int) -> Iterable[tuple[int, Split]]:
        """Numbers and splits of the rooms asked for, with these defaults."""
        for index in range(self.first_room, self.first_room + (self.num_rooms or count)):
            yield index, "val" if index % (self.val_every or val_every) == 0 else "train"

    def _store(self) -> None:
        from ddm_training.rooms.store import StoreJob, write_store_room

        size, views = self._frame_size(256, 175.0), self.num_views or 4
        jobs = [
            StoreJob(root=self.folder, kind=self._kind, seed=self.seed, index=i, split=s, views=views, size=size)
            for i, s in self._rooms(400, 16)
        ]
        run_rooms(write_store_room, jobs, workers=self.workers or 2, folder=self.folder, kind=self._kind)

    def _hypersim(self) -> None:
        from ddm_training.rooms.hypersim_layout import HypersimRoomJob, write_hypersim_room, write_metadata

        size = self._frame_size(1024, 886.81)
        jobs = [
            HypersimRoomJob(root=self.folder, seed=self.seed, index=i, split=s, views=self.num_views or 4, size=size)
            for i, s in self._rooms(4, 4)
        ]
        run_rooms(write_hypersim_room, jobs, workers=self.workers or 2, folder=self.folder)
        write_metadata(self.folder, jobs)

    def _capture(self) -> None:
        from ddm_training.rooms.capture import CaptureJob, write_capture

        job = CaptureJob(
            folder=self.folder,
            kind=self._kind,
            seed=self.seed,
            index=self.first_room,
            num_train=9 if self.num_train is None else self.num_train,
            num_test=8 if self.num_test is None else self.num_test,
            size=self._frame_size(160, 175.0 * 160 / 256),
        )
        run_rooms(write_capture, [job], workers=1, folder=self.folder, kind=self._kind)


_MEANINGLESS: dict[Output, tuple[str, ...]] = {
    "store": ("num_train", "num_test"),
    "hypersim": ("num_train", "num_test"),
    "capture": ("num_rooms", "num_views", "val_every", "workers"),
}
"""Settings of other outputs."""


def run_rooms(
    write: Callable[[Any], int], jobs: Sequence[Any], *, workers: int, folder: Path, kind: "Kind" = "room"
) -> int:
    """Do the jobs that are not whole yet in ``workers`` processes, with a progress bar; the number of frames written.

    Args:
        write: does a job; a module-level function.
        jobs: rooms or stills.
        workers: number of processes.
        folder: that is written to, for messages.
        kind: of the jobs, for messages.

    Raises:
        InputError: the folder holds something else or cannot be written (a full disk), a process died, or a room has
            nowhere a view.
    """
    import time
    from contextlib import closing

    from rich.console import Console
    from rich.progress import track

    from ddm_training.jobs import EngineConfig, ProcessDiedError, run_jobs
    from ddm_training.rooms.cameras import NoView

    todo = [job for job in jobs if not job.is_whole()]
    start, frames, console = time.perf_counter(), 0, Console(file=sys.stderr)
    with closing(run_jobs(write, todo, EngineConfig(workers=workers), folder)) as outcomes:
        for outcome in track(outcomes, description=f"{kind}s", total=len(todo), console=console, disable=not todo):
            if isinstance(outcome.error, OSError | ProcessDiedError):
                raise InputError(
                    f"{kind} {outcome.job.index} could not be written: {outcome.error}. Whole {kind}s are kept; "
                    "mend the cause and run the same command again."
                ) from outcome.error
            if isinstance(outcome.error, NoView):
                size = outcome.job.size
                raise InputError(
                    f"{outcome.error}: with --focal {size.focal:g} and --width {size.width} a camera sees too little "
                    f"or too much of a {kind}. Expected a focal length of about {0.7 * size.width:.0f}; give "
                    "another, or fewer views."
                ) from outcome.error
            if outcome.error is not None:
                raise outcome.error
            frames += outcome.result or 0
    seconds = time.perf_counter() - start
    rate = f", {frames / seconds:.1f} frames/s" if frames else ""
    kept = f"; {len(jobs) - len(todo)} were there" if len(todo) < len(jobs) else ""
    said = f"{folder}: {len(todo)} {kind}s, {frames} frames in {seconds:.1f} s{rate}{kept}"
    console.print(said, markup=False, highlight=False)
    return frames
