"""`ddm rooms`: procedural indoor scenes with exact depth and poses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddm_training.errors import InputError
from ddm_training.frames import Split


@dataclass(frozen=True, kw_only=True)
class RoomsConfig:
    """Make procedural rooms: frame stores for training, Hypersim's layout for tests, few-view captures for demos."""

    folder: Path
    """Where to write."""
    output: Literal["store", "hypersim", "capture"] = "store"
    """store: frames for `ddm train`; hypersim: Hypersim's own files; capture: transforms.json for a few-view NeRF."""
    seed: int = 0
    """Everything follows from the seed and a room's number."""
    num_rooms: int = 400
    """Rooms to make."""
    first_room: int = 0
    """Number of the first room."""
    num_views: int = 4
    """Frames per room."""
    val_every: int = 16
    """Every n-th room is a validation room."""
    width: int = 256
    """Width of a frame in pixels."""
    height: int = 192
    """Height of a frame in pixels."""
    focal: float = 175.0
    """Focal length in pixels."""
    workers: int = 2
    """Processes; the result does not depend on it."""

    def main(self) -> None:
        from ddm_training.rooms.write import write_store_room

        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = []
        for index in range(self.first_room, self.first_room + self.num_rooms):
            split: Split = "val" if index % self.val_every == 0 else "train"
            jobs.append(
                {
                    "root": self.folder, "seed": self.seed, "index": index, "split": split, "views": self.num_views,
                    "width": self.width, "height": self.height, "focal": self.focal,
                }
            )  # fmt: skip
        run_jobs(write_store_room, jobs, workers=self.workers, title="rooms")


def run_jobs(function: Callable[..., int], jobs: list[dict], *, workers: int, title: str) -> int:
    """Call ``function(**job)`` for every job in ``workers`` processes, with a progress bar; the sum of the results."""
    from rich.progress import track

    total = 0
    for result in track(_results(function, jobs, workers), description=title, total=len(jobs)):
        total += result
    return total


def _results(function: Callable[..., int], jobs: list[dict], workers: int) -> Iterator[int]:
    if workers <= 1:
        yield from (function(**job) for job in jobs)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(function, **job) for job in jobs]):
            yield future.result()
