"""Jobs that write one scene of a frame store each: skipped when the scene is whole, counted, reported."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddm_training.errors import InputError
from ddm_training.files import exclusive, write_whole, writing
from ddm_training.frames import SceneInfo, SceneWriter, Split, names_digest, read_scene_info
from ddm_training.jobs import EngineConfig, run_jobs
from ddm_training.rejection import FrameRejected, RejectionLimits, check_frame, is_no_file
from ddm_training.report import REPORT_FILE, SceneResult, make_report, scene_result, show_report
from ddm_training.resize import resize_color, resize_depth, scale_intrinsics

_ADVICE = "Mend that, or give another --output, and run the same command again; whole scenes are kept."
ABSENT = "not on disk"  # a reason that a later download may take away
Frame = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, float, float, float]]
"""Colour uint8 [h, w, 3], planar depth float32 [h, w] in metres, validity bool [h, w], fx fy cx cy in pixels."""


@dataclass(frozen=True, kw_only=True)
class SceneJob:
    """One scene of the store to be written."""

    root: Path
    """The store."""
    name: str
    split: Split
    source: str
    width: int
    height: int
    """Size of the stored frames in pixels."""
    limits: RejectionLimits
    frames: tuple[Any, ...]
    """What there is to read."""
    names: tuple[str, ...]
    """Name of each of them."""
    missing: dict[str, int]
    """Frames that cannot be read or are not wanted, by reason: counted as rejected."""

    def is_whole(self) -> bool:
        """Whether the store has this scene, of this split, made of the frames that there are now: a later download may
        have brought more, and a longer capture is cut into splits elsewhere."""
        if not (self.root / self.name).exists():
            return False
        info = read_scene_info(self.root / self.name)
        reasons = {*self.missing, ABSENT, *filter(is_no_file, info.rejected)}
        same = all(info.rejected.get(reason, 0) == self.missing.get(reason, 0) for reason in reasons)
        return info.split == self.split and same and self._is_made_of_the_same(info)

    def _is_made_of_the_same(self, info: SceneInfo) -> bool:
        if info.asked:
            return info.asked == names_digest(self.names)
        # older stores know the frames that were kept, and of the others their number
        known = len(info.frames) + sum(info.rejected.values())
        return known == len(self.frames) + sum(self.missing.values()) and set(info.frames) <= set(self.names)


def write_scene(job: SceneJob, read: Callable[[Any], Frame], *, unreadable: str | None = None) -> SceneResult:
    """Write one scene of the store, in memory of one frame.

    Args:
        job: where, and the frames.
        read: content, at its own size, of a frame; `FrameRejected` is counted.
        unreadable: reason that rejects all frames without reading them.

    Raises:
        OSError: the disk is full, or is broken; what was half written is removed.
    """
    start = time.perf_counter()
    writer = SceneWriter(
        job.root,
        job.name,
        split=job.split,
        source=job.source,
        max_frames=0 if unreadable else len(job.frames),
        height=job.height,
        width=job.width,
        asked=names_digest(job.names),
    )
    try:
        for reason, count in job.missing.items():
            writer.reject(reason, count)
        if unreadable and job.frames:
            writer.reject(unreadable, len(job.frames))
        for name, frame in () if unreadable else zip(job.names, job.frames):
            try:
                color, depth, mask, intrinsics = _resized(read(frame), job.width, job.height)
                check_frame(color, depth, mask, job.limits)
            except FrameRejected as reason:
                writer.reject(str(reason))
                continue
            writer.add(color, depth, mask, intrinsics=intrinsics, name=name)
        writer.close()
    except BaseException:
        shutil.rmtree(writer.part, ignore_errors=True)
        raise
    return scene_result(job.root / job.name, seconds=time.perf_counter() - start)


def _resized(frame: Frame, width: int, height: int) -> Frame:
    color, depth, mask, intrinsics = frame
    source = (depth.shape[1], depth.shape[0])
    depth, mask = resize_depth(depth, mask, width, height)
    return resize_color(color, width, height), depth, mask, scale_intrinsics(intrinsics, source, (width, height))


def prepare(
    store: Path,
    command: str,
    options: dict[str, Any],
    jobs: Sequence[SceneJob],
    work: Callable[[Any], SceneResult],
    engine: EngineConfig,
    *,
    redo: bool = False,
) -> dict[str, Any]:
    """Run the jobs of scenes that the store does not have yet, show a table, and write `report.json`.

    The same command does not write into the store twice at a time.

    Args:
        store: the frame store.
        command: name for messages and for the options file.
        options: what decides the content of the frames; a store that was begun with others is refused.
        jobs: the scenes.
        work: what does a job; a module-level function.
        engine: where.
        redo: make whole scenes again as well.

    Returns:
        The report.

    Raises:
        InputError: other options, another run at work, a damaged scene in the store, a store that cannot be written,
            a full disk, or scenes that failed.
    """
    with exclusive(store, f"{command} preparation", "--output"):
        with writing(path := store / f"{command}.options.json", _ADVICE):
            _check_options(path, options)
        todo = [job for job in jobs if redo or not job.is_whole()]
        names = {job.name for job in todo}
        results = [scene_result(store / job.name, skipped=True) for job in jobs if job.name not in names]
        start = time.perf_counter()
        with closing(run_jobs(work, todo, engine, store / f"{command}-submitit.part")) as outcomes:
            made, failed, full = _take(_progress(outcomes, command, len(todo)))
        results += made
        report = make_report(command, results, failed, time.perf_counter() - start)
        show_report(report, store)
        if full is not None:
            raise InputError(
                f"the disk of {store} is full ({shutil.disk_usage(store).free / 1e9:.2f} GB free): free some space and "
                f"run the same command again; the {len(results)} whole scenes are kept."
            ) from full
        with writing(path := store / REPORT_FILE, _ADVICE):
            write_whole(path, json.dumps(report, indent=2) + "\n")
        if failed:
            name, why = next(iter(failed.items()))
            raise InputError(
                f"{len(failed)} scenes failed, the first: {name}: {why}. All of them are in {store / REPORT_FILE}; the "
                "others are whole. Mend the cause and run the same command again."
            )
        if report["frames"] == 0:
            raise InputError(f"no frame was kept; rejected by reason: {report['rejected'] or 'none'}.")
        return report


def _take(outcomes: Iterable[Any]) -> tuple[list[SceneResult], dict[str, str], BaseException | None]:
    """What was made, why scenes failed by their names, and the error of a full disk, which ends the work."""
    made, failed = [], {}
    for outcome in outcomes:
        if outcome.error is None:
            made.append(outcome.result)
            continue
        first_line = (str(outcome.error).splitlines() or [""])[0]
        failed[outcome.job.name] = f"{type(outcome.error).__name__}: {first_line}"
        if _is_full(outcome.error):
            return made, failed, outcome.error
    return made, failed, None


def _same(begun: Any, now: Any) -> bool:
    """Whether two values of an option agree; older stores hold a path as it was typed."""
    typed = isinstance(begun, str) and begun and isinstance(now, str)
    return begun == now or bool(typed and str(Path(begun).resolve()) == now)


def _is_full(error: BaseException) -> bool:
    number = getattr(error, "errno", None)
    # on a full disk submitit cannot hand on the exception itself, and quotes it in its own
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _check_options(path: Path, options: dict[str, Any]) -> None:
    options = json.loads(json.dumps(options, default=str))
    if path.exists():
        try:
            begun = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is damaged ({error}): delete it, or the store, and run again.") from error
        differs = sorted(k for k in begun.keys() | options.keys() if not _same(begun.get(k), options.get(k)))
        if differs:
            what = "; ".join(f"{k} was {begun.get(k)}, is now {options.get(k)}" for k in differs)
            raise InputError(f"{path.parent} was begun with other options ({what}): use those, or another --output.")
    write_whole(path, json.dumps(options, indent=2) + "\n")


def _progress(outcomes: Any, command: str, total: int) -> Any:
    from rich.progress import track

    return track(outcomes, description=f"{command} (scenes)", total=total, disable=total == 0)
