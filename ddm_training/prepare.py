"""`ddm frames` and `ddm hypersim prepare`: raw RGBD data into the frame store, one job per scene of the store.

Whole scenes are skipped, so running the same command again continues after a kill, a full disk or a repaired file.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ddm_training.errors import InputError
from ddm_training.frames import SceneWriter, Split, read_scene_info
from ddm_training.jobs import EngineConfig, run_jobs
from ddm_training.rejection import FrameRejected, RejectionLimits, check_frame, folder_bytes
from ddm_training.rgbd_folder import Intrinsics, Pair, image_size, list_pairs, read_intrinsics, read_pair

REPORT_FILE = "report.json"
Frame = tuple[np.ndarray, np.ndarray, np.ndarray, Intrinsics]
"""Colour uint8 [h, w, 3], planar depth float32 [h, w] in metres, validity bool [h, w], fx fy cx cy."""


@dataclass(frozen=True, kw_only=True)
class SceneResult:
    """What a job did; `skipped` when the scene was whole already (its counts then come from the store)."""

    name: str
    split: str
    frames: int
    rejected: dict[str, int]
    bytes: int
    seconds: float = 0.0
    skipped: bool = False


@dataclass(frozen=True, kw_only=True)
class SceneSpec:
    """Where a scene goes and what is judged about its frames."""

    root: Path
    name: str
    split: Split
    source: str
    width: int
    height: int
    limits: RejectionLimits


def scene_result(folder: Path, *, seconds: float = 0.0, skipped: bool = False) -> SceneResult:
    """Counts of a whole scene of the store."""
    info = read_scene_info(folder)
    return SceneResult(
        name=info.name,
        split=info.split,
        frames=len(info.frames),
        rejected=dict(info.rejected),
        bytes=folder_bytes(folder),
        seconds=seconds,
        skipped=skipped,
    )


def write_scene(
    spec: SceneSpec, frames: Sequence[tuple[str, Callable[[], Frame]]], rejected: dict[str, int]
) -> SceneResult:
    """Write one scene of the store, in memory of one frame.

    Args:
        spec: where and how.
        frames: name of each frame and what reads it; `FrameRejected` raised by the reader is counted.
        rejected: frames that are missing already, by reason.

    Raises:
        OSError: the disk is full, or something else about the store; what was half written is removed.
    """
    start = time.perf_counter()
    writer = SceneWriter(
        spec.root,
        spec.name,
        split=spec.split,
        source=spec.source,
        max_frames=len(frames),
        height=spec.height,
        width=spec.width,
    )
    try:
        _reserve(writer.part)
        for reason, count in rejected.items():
            writer.reject(reason, count)
        for name, read in frames:
            try:
                color, depth, mask, intrinsics = read()
                check_frame(color, depth, mask, spec.limits)
            except FrameRejected as reason:
                writer.reject(str(reason))
                continue
            writer.add(color, depth, mask, intrinsics=intrinsics, name=name)
        writer.close()
    except BaseException:
        shutil.rmtree(writer.part, ignore_errors=True)
        raise
    return scene_result(spec.root / spec.name, seconds=time.perf_counter() - start)


def _reserve(folder: Path) -> None:
    """Claim the disk space of the arrays now: writing into a sparse memory map on a full disk ends the process with
    SIGBUS, while claiming it raises OSError."""
    if not hasattr(os, "posix_fallocate"):
        return
    for path in folder.glob("*.npy"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def prepare(
    store: Path,
    command: str,
    options: dict[str, Any],
    jobs: Sequence[Any],
    work: Callable[[Any], SceneResult],
    engine: EngineConfig,
) -> dict[str, Any]:
    """Run the jobs of scenes that the store does not have yet, show a table, and write `report.json`.

    Args:
        store: the frame store.
        command: name for messages and for the options file.
        options: what decides the content of the frames; a store that was begun with others is refused.
        jobs: each with a `spec` of type `SceneSpec`.
        work: what does a job.
        engine: where.

    Returns:
        The report.

    Raises:
        InputError: other options, a damaged scene in the store, a full disk, or scenes that failed.
    """
    store.mkdir(parents=True, exist_ok=True)
    _check_options(store / f"{command}.options.json", options)
    results, failed = [], {}
    todo = []
    for job in jobs:
        folder = store / job.spec.name
        if folder.exists():
            results.append(scene_result(folder, skipped=True))
        else:
            todo.append(job)
    start = time.perf_counter()
    full: OSError | None = None
    for outcome in _progress(run_jobs(work, todo, engine, store / "submitit.part"), command, len(todo)):
        if outcome.error is None:
            results.append(outcome.result)
            continue
        failed[outcome.job.spec.name] = f"{type(outcome.error).__name__}: {outcome.error}"
        if isinstance(outcome.error, OSError) and outcome.error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = outcome.error
            break
    report = make_report(command, results, failed, time.perf_counter() - start)
    (store / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    show_report(report, store)
    _raise_for(report, store, full)
    return report


def _raise_for(report: dict[str, Any], store: Path, full: OSError | None) -> None:
    if full is not None:
        free = shutil.disk_usage(store).free
        raise InputError(
            f"the disk of {store} is full ({free / 1e9:.2f} GB free): free some space and run the same command again; "
            f"the {report['scenes']} whole scenes are kept."
        ) from full
    if report["failed"]:
        name, why = next(iter(report["failed"].items()))
        raise InputError(
            f"{len(report['failed'])} scenes failed, the first: {name}: {why}. All of them are in "
            f"{store / REPORT_FILE}; the others are whole. Mend the input and run the same command again."
        )
    if report["frames"] == 0:
        raise InputError(f"no frame was kept; rejected by reason: {report['rejected'] or 'none'}.")


def _check_options(path: Path, options: dict[str, Any]) -> None:
    options = json.loads(json.dumps(options, default=str))
    if path.exists():
        try:
            begun = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is damaged ({error}): delete it, or the store, and run again.") from error
        differs = {
            k: (begun.get(k), options.get(k)) for k in begun.keys() | options.keys() if begun.get(k) != options.get(k)
        }
        if differs:
            what = "; ".join(f"{k} was {a}, is {b}" for k, (a, b) in sorted(differs.items()))
            raise InputError(f"{path.parent} was begun with other options ({what}): use them, or another --output.")
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(options, indent=2) + "\n")
    part.rename(path)


def make_report(command: str, results: Sequence[SceneResult], failed: dict[str, str], seconds: float) -> dict[str, Any]:
    """Totals over scenes; `frames_per_second` is of this run alone and counts read frames, kept or not."""
    rejected: dict[str, int] = {}
    splits: dict[str, int] = {}
    for result in results:
        splits[result.split] = splits.get(result.split, 0) + result.frames
        for reason, count in result.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    read = sum(r.frames + sum(r.rejected.values()) for r in results if not r.skipped)
    return {
        "command": command,
        "scenes": len(results),
        "scenes_skipped": sum(r.skipped for r in results),
        "frames": sum(r.frames for r in results),
        "frames_by_split": splits,
        "rejected": dict(sorted(rejected.items(), key=lambda item: -item[1])),
        "bytes": sum(r.bytes for r in results),
        "seconds": round(seconds, 3),
        "frames_per_second": round(read / seconds, 2) if seconds > 0 else 0.0,
        "failed": failed,
        "by_scene": [asdict(r) for r in sorted(results, key=lambda r: r.name)],
    }


def show_report(report: dict[str, Any], store: Path) -> None:
    """Print the report as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['command']}: {store}", show_header=False)
    table.add_row("scenes", f"{report['scenes']} ({report['scenes_skipped']} were there already)")
    for split, count in report["frames_by_split"].items():
        table.add_row(f"frames kept, {split}", str(count))
    for reason, count in report["rejected"].items():
        table.add_row(f"rejected: {reason}", str(count))
    for name, why in report["failed"].items():
        table.add_row(f"[red]failed: {name}[/red]", why)
    table.add_row("frames/s (this run)", f"{report['frames_per_second']:.1f}")
    table.add_row("size", f"{report['bytes'] / 1e9:.3f} GB")
    Console().print(table)


def _progress(outcomes: Iterable[Any], command: str, total: int) -> Iterable[Any]:
    from rich.progress import track

    return track(outcomes, description=f"{command} (scenes)", total=total, disable=total == 0)


@dataclass(frozen=True, kw_only=True)
class FolderJob:
    """A run of frames of an RGBD folder that becomes one scene."""

    spec: SceneSpec
    pairs: tuple[Pair, ...]
    missing: dict[str, int]
    source_size: tuple[int, int]
    intrinsics: Intrinsics
    metres_per_unit: float


def write_folder_scene(job: FolderJob) -> SceneResult:
    """Do a `FolderJob`."""

    def read(pair: Pair) -> Frame:
        return (*read_pair(pair, *job.source_size, metres_per_unit=job.metres_per_unit), job.intrinsics)

    return write_scene(job.spec, [(pair.name, partial(read, pair)) for pair in job.pairs], job.missing)


@dataclass(frozen=True, kw_only=True)
class FramesConfig:
    """Make a frame store of any RGBD folder: colour images, 16-bit depth images and a 3 x 3 matrix of intrinsics.

    The frames are taken for a video in the order of their names: the last part is held out as scene
    `<name>_val`, some frames before it are left out, the rest is scene `<name>_train`.
    """

    data: Path
    """The folder."""
    output: Path
    """The frame store; made when absent, other scenes in it are left alone."""
    name: str | None = None
    """Name of the data set in the store; the folder's name when not given."""
    color_dir: str = "rgb"
    """Folder of colour images in `data`."""
    depth_dir: str = "depth"
    """Folder of 16-bit depth images in `data`, of the same names; planar depth, 0 where there is none."""
    intrinsics: str = "K.txt"
    """Text file in `data` with the 3 x 3 matrix, in pixels of the images."""
    pixel_centre: Literal["0", "0.5"] = "0"
    """Coordinate of the centre of the first pixel in the matrix: 0 as in OpenCV, or 0.5."""
    metres_per_unit: float = 0.001
    """Metres that one unit of a depth image stands for."""
    val_fraction: float = 0.15
    """Share of the frames, the last of the sequence, that becomes split `val`; 0 for none."""
    val_gap: int = 10
    """Frames left out between `train` and `val`, since neighbours in a video are nearly the same."""
    limits: RejectionLimits = field(
        # depth sensors leave a third of the pixels without depth; they are masked
        default_factory=lambda: RejectionLimits(max_invalid=0.8, min_depth_range=0.1)
    )
    """Which frames are left out."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where the work is done."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"val-fraction must be in [0, 1), found {self.val_fraction}.")
        if self.val_gap < 0:
            raise InputError(f"val-gap must not be negative, found {self.val_gap}.")
        if not self.metres_per_unit > 0:
            raise InputError(f"metres-per-unit must be positive, found {self.metres_per_unit}.")

    def jobs(self) -> list[FolderJob]:
        """One job per split.

        Raises:
            InputError: the folder has no pairs, no usable intrinsics, or too few frames for the splits.
        """
        pairs, missing = list_pairs(self.data / self.color_dir, self.data / self.depth_dir)
        size = image_size(pairs)
        intrinsics = read_intrinsics(self.data / self.intrinsics, *size, pixel_centre=float(self.pixel_centre))
        name = self.name or self.data.resolve().name
        val = round(self.val_fraction * len(pairs))
        train = len(pairs) - val - (self.val_gap if val else 0)
        if train < 1 or (self.val_fraction and val < 1):
            raise InputError(
                f"{len(pairs)} frames are too few for --val-fraction {self.val_fraction}, --val-gap {self.val_gap}: "
                f"{max(train, 0)} would be left for training and {val} for validation."
            )
        gap = {"gap between train and val": len(pairs) - train - val} if val and self.val_gap else {}
        splits: list[tuple[Split, list[Pair], dict[str, int]]] = [("train", pairs[:train], missing | gap)]
        if val:
            splits.append(("val", pairs[-val:], {}))
        return [
            FolderJob(
                spec=SceneSpec(
                    root=self.output,
                    name=f"{name}_{split}",
                    split=split,
                    source=name,
                    width=size[0],
                    height=size[1],
                    limits=self.limits,
                ),
                pairs=tuple(part),
                missing=left_out,
                source_size=size,
                intrinsics=intrinsics,
                metres_per_unit=self.metres_per_unit,
            )
            for split, part, left_out in splits
        ]

    def main(self) -> None:
        """Write the store."""
        jobs = self.jobs()
        options = {k: v for k, v in asdict(self).items() if k not in ("output", "engine")}
        options["data"] = str(self.data.resolve())
        prepare(self.output, f"frames-{jobs[0].spec.source}", options, jobs, write_folder_scene, self.engine)
