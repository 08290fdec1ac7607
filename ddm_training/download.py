"""`ddm hypersim download`: the members of Hypersim's scene archives that training needs, and no others.

On disk, as Hypersim's authors lay it out, with files of this program::

    <output>/<scene>/images/scene_cam_00_final_hdf5/frame.0000.color.hdf5 ...
                     manifest.jsonl       one line per member that is whole: name, size, CRC-32
             metadata_images_split_scene_v1.csv
             download.json                what the last run did: counts, incomplete frames, failed scenes

A member is fetched into ``.part``, checked against the CRC of the archive's directory, flushed, renamed, and only then
noted in the manifest. So whatever stops a run costs at most the members in flight, and running the same command again
goes on: what the manifest and the disk agree on is not asked for again.
"""

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ddm_training.errors import InputError, require_at_least
from ddm_training.files import exclusive, replacing, write_whole
from ddm_training.http_ranges import NotFoundError, RangeClient, RemoteError, RetryPolicy
from ddm_training.hypersim_split import PublicScene, read_split_csv, select_scenes
from ddm_training.manifest import Manifest
from ddm_training.remote_zip import Member, RemoteArchive, file_crc, open_archive, save_member

BASE_URL = "https://docs-assets.developer.apple.com/ml-research/datasets/hypersim/v1/scenes"  # apple/ml-hypersim
REPORT = "download.json"
SPLIT_FILE = "metadata_images_split_scene_v1.csv"
GIVE_UP = 10  # failures in a row, over all connections, after which the server or the network counts as gone
DEPTH = "images/scene_{camera}_geometry_hdf5/frame.{frame:04d}.depth_meters.hdf5"
MEMBERS: dict[bool, tuple[str, ...]] = {  # by `preview`; the entity id is needed by the tone map of the HDR colour only
    False: (
        "images/scene_{camera}_final_hdf5/frame.{frame:04d}.color.hdf5",
        DEPTH,
        "images/scene_{camera}_geometry_hdf5/frame.{frame:04d}.render_entity_id.hdf5",
    ),
    True: ("images/scene_{camera}_final_preview/frame.{frame:04d}.tonemap.jpg", DEPTH),
}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HypersimDownloadConfig:
    """Fetch colour, depth and entity id of Hypersim frames (CC BY-SA 3.0) out of the scene archives.

    Run the same command again to go on after a failure, or with a larger --count to add scenes.
    """

    output: Path
    """Folder that the scenes are put into."""
    split_csv: Path | None = None
    """`metadata_images_split_scene_v1.csv` of the authors' repository (apple/ml-hypersim): public frames and splits.
    Copied into `output`, and read from there when not given."""
    split: Literal["train", "val", "test", "all"] = "all"
    """Take scenes of this split only."""
    scenes: tuple[str, ...] = ()
    """Take these scenes only, e.g. ai_001_001 ai_037_002."""
    count: int | None = None
    """Take this many of them, drawn by --seed. A larger count with the same seed includes the smaller one's scenes."""
    seed: int = 0
    """Draws the scenes of --count."""
    frames_per_scene: int | None = None
    """Take at most this many public frames of a scene, evenly spread over its cameras."""
    preview: bool = False
    """The tone-mapped JPEG instead of the HDR colour and the entity id: a fraction of the bytes."""
    base_url: str = BASE_URL
    """Address below which the archives <scene>.zip lie."""
    connections: int = 8
    """Members fetched at the same time, each over its own connection."""
    retries: int = 8
    """Further tries after a broken connection, a short body, a 5xx or a 429."""
    backoff: float = 1.0
    """Seconds before the first further try; doubled each time up to a minute, jittered."""
    timeout: float = 30.0
    """Seconds without a byte after which a connection counts as broken."""
    verify: bool = False
    """Read all files that are there and compare their CRC; without it only their size is looked at."""
    dry_run: bool = False
    """List what would be fetched and how many bytes, and write nothing."""

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"--base-url {self.base_url!r} is no http(s) address.")
        require_at_least(self, connections=1, retries=0, backoff=0, count=1, frames_per_scene=1)
        if not self.timeout > 0:
            raise InputError(f"--timeout must be positive seconds, found {self.timeout}.")

    def main(self) -> None:
        """Run it, and raise `InputError` at the end where a scene or a member could not be fetched."""
        Download(self).run()


@dataclass
class ScenePlan:
    """What is to be done for one scene."""

    scene: PublicScene
    manifest: Manifest
    archive: RemoteArchive | None = None
    """None where nothing has to be fetched."""
    members: list[Member] = field(default_factory=list)
    """To be fetched."""
    kept: int = 0
    """Members that are there already."""
    incomplete: list[str] = field(default_factory=list)
    """Public frames of which the archive lacks a member, so that none of it is fetched."""


class Download:
    """One run: plan all scenes (reads the archives' directories), then fetch what is missing."""

    def __init__(self, config: HypersimDownloadConfig) -> None:
        self.config = config
        self.stop = threading.Event()
        policy = RetryPolicy(retries=config.retries, backoff=config.backoff, timeout=config.timeout)
        self.client = RangeClient(policy, self.stop)
        self.plans: dict[str, ScenePlan] = {}
        self.failed: dict[str, str] = {}
        self.fetched = self.fetched_bytes = 0
        self._failures_in_a_row = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        """Plan, then fetch or list.

        Raises:
            InputError: bad flags or split file, a full disk, a server that is gone; failed scenes, after all others.
        """
        config, begin = self.config, time.monotonic()
        scenes = select_scenes(
            read_split_csv(config.split_csv or config.output / SPLIT_FILE),
            split=config.split,
            ids=config.scenes,
            count=config.count,
            seed=config.seed,
            frames_per_scene=config.frames_per_scene,
        )
        if config.dry_run:
            self._plan_all(scenes)
            self._print_plan()
        else:
            with exclusive(config.output, "download", "--output"):
                try:
                    self._keep_split_csv()
                    self._plan_all(scenes)
                    self._check_space()
                    self._fetch_all()
                finally:
                    self._write_report(time.monotonic() - begin)
        self._raise_failures(len(scenes))
        if not config.dry_run:
            self._say_what_is_not_here()

    def _plan_all(self, scenes: list[PublicScene]) -> None:
        with _progress() as progress:
            task = progress.add_task("reading directories", total=len(scenes), items="")

            def work(scene: PublicScene) -> None:
                plan = self._guarded(scene.name, lambda: self._plan(scene))
                if plan is not None:
                    with self._lock:
                        self.plans[scene.name] = plan
                progress.update(task, advance=1, items=scene.name)

            run_parallel(work, scenes, self.config.connections, self.stop)
        self.plans = {scene.name: self.plans[scene.name] for scene in scenes if scene.name in self.plans}

    def _plan(self, scene: PublicScene) -> ScenePlan:
        """Compare what is wanted with the disk, and where something is missing with the archive's directory."""
        folder = self.config.output / scene.name
        plan = ScenePlan(scene, Manifest(folder))
        frames = {
            f"{camera} frame {frame:04d}": [t.format(camera=camera, frame=frame) for t in MEMBERS[self.config.preview]]
            for camera, frame in scene.frames
        }
        wanted = [name for names in frames.values() for name in names]
        there = {name for name in wanted if self._is_there(folder / name, plan.manifest.entries.get(name))}
        if len(there) == len(wanted):
            plan.kept = len(there)
            return plan
        prefix = f"{scene.name}/"
        names = {prefix + name for name in wanted}
        archive = open_archive(self.client, f"{self.config.base_url.rstrip('/')}/{scene.name}.zip", names.__contains__)
        plan.archive = archive
        for frame, frame_names in frames.items():
            members = [archive.members.get(prefix + name) for name in frame_names]
            if not all(members):  # ai_006_001 cam_00 frame 53 has no depth, for one
                plan.incomplete.append(frame)
                continue
            for name, member in zip(frame_names, members):
                assert member is not None
                if name in there or self._adopt(plan.manifest, folder / name, member):
                    plan.kept += 1
                else:
                    plan.members.append(member)
        return plan

    def _is_there(self, path: Path, entry: tuple[int, int] | None) -> bool:
        """Does a file have the size, with --verify also the CRC, that the manifest says?"""
        if entry is None or not path.is_file() or path.stat().st_size != entry[0]:
            return False
        return not self.config.verify or file_crc(path) == entry[1]

    def _adopt(self, manifest: Manifest, path: Path, member: Member) -> bool:
        """Take a whole file into the manifest that a killed run had renamed but not noted."""
        if not path.is_file() or path.stat().st_size != member.size or file_crc(path) != member.crc:
            return False
        if not self.config.dry_run:
            manifest.add(_in_scene(member))
        return True

    def _keep_split_csv(self) -> None:
        """`ddm hypersim prepare` looks for it beside the scenes."""
        target = self.config.output / SPLIT_FILE
        if self.config.split_csv is not None and not target.exists():
            try:
                with replacing(target) as part:
                    shutil.copyfile(self.config.split_csv, part)
            except OSError as error:
                raise InputError(f"cannot write {target}: {error.strerror}.") from error

    def _say_what_is_not_here(self) -> None:
        from ddm_training.hypersim import CAMERA_FILE

        if not (self.config.output / CAMERA_FILE).exists():
            print(
                f"`ddm hypersim prepare` needs {CAMERA_FILE} too: put that of the repository apple/ml-hypersim "
                f"(contrib/mikeroberts3000) into {self.config.output}, or name it by --camera-csv."
            )

    def _check_space(self) -> None:
        needed = sum(member.size for plan in self.plans.values() for member in plan.members)
        free = shutil.disk_usage(self.config.output).free
        if needed > free:
            raise InputError(
                f"{self.config.output} has {_human(free)} free, this download needs {_human(needed)}: free space, or "
                "take fewer scenes (--count), fewer frames (--frames-per-scene) or --preview. Nothing was fetched."
            )

    def _fetch_all(self) -> None:
        jobs = [(plan, member) for plan in self.plans.values() for member in plan.members]
        total = sum(member.compressed for _, member in jobs)
        kept = sum(plan.kept for plan in self.plans.values())
        print(f"{len(self.plans)} scenes: {len(jobs)} members, {_human(total)} to fetch; {kept} members are there.")
        with _progress(transfer=True) as progress:
            task = progress.add_task("fetching", total=total, items=f"0/{len(jobs)}")

            def work(job: tuple[ScenePlan, Member]) -> None:
                self._guarded(job[0].scene.name, lambda: self._fetch(*job, lambda n: progress.advance(task, n)))
                progress.update(task, items=f"{self.fetched}/{len(jobs)}")

            run_parallel(work, jobs, self.config.connections, self.stop)

    def _fetch(self, plan: ScenePlan, member: Member, on_bytes: Callable[[int], object]) -> None:
        assert plan.archive is not None
        save_member(self.client, plan.archive, member, self.config.output / member.name, on_bytes=on_bytes)
        plan.manifest.add(_in_scene(member))
        with self._lock:
            self.fetched += 1
            self.fetched_bytes += member.compressed

    def _guarded(self, scene: str, action: Callable[[], T]) -> T | None:
        """Note what fails for good and go on with the rest, unless nothing works any more."""
        try:
            result = action()
        except RemoteError as error:
            with self._lock:
                self.failed.setdefault(scene, str(error))
                # An archive that is not there says nothing about the next one.
                self._failures_in_a_row += not isinstance(error, NotFoundError)
                if self._failures_in_a_row >= GIVE_UP:
                    raise InputError(
                        f"stopped after {GIVE_UP} failures in a row, the last: {error} What was fetched before is "
                        "whole and noted: run the same command again to go on."
                    ) from error
            return None
        except OSError as error:
            problem = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "a file cannot be used"
            raise InputError(
                f"{problem} below {self.config.output} ({error}). All members fetched before are whole and noted: mend "
                "that and run the same command again."
            ) from error
        with self._lock:
            self._failures_in_a_row = 0
        return result

    def _print_plan(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="members by scene")
        for column in ("scene", "split", "frames", "to fetch", "bytes", "there", "incomplete"):
            table.add_column(column, no_wrap=True)
        for plan in self.plans.values():
            size = sum(member.compressed for member in plan.members)
            numbers = (len(plan.scene.frames), len(plan.members), _human(size), plan.kept, len(plan.incomplete))
            table.add_row(plan.scene.name, plan.scene.split, *map(str, numbers))
        Console().print(table)
        members = [member for plan in self.plans.values() for member in plan.members]
        transfer, disk = sum(member.compressed for member in members), sum(member.size for member in members)
        print(
            f"would fetch {len(members)} members of {len(self.plans)} scenes: {transfer} bytes ({_human(transfer)}), "
            f"{_human(disk)} on disk. Nothing was written."
        )

    def _write_report(self, seconds: float) -> None:
        report = {
            "base_url": self.config.base_url,
            "preview": self.config.preview,
            "scenes": {plan.scene.name: len(plan.scene.frames) for plan in self.plans.values()},
            "members_fetched": self.fetched,
            "bytes_fetched": self.fetched_bytes,
            "members_there_before": sum(plan.kept for plan in self.plans.values()),
            "seconds": round(seconds, 1),
            "incomplete_frames": {p.scene.name: p.incomplete for p in self.plans.values() if p.incomplete},
            "failed_scenes": self.failed,
        }
        path = self.config.output / REPORT
        try:
            write_whole(path, json.dumps(report, indent=2) + "\n")
        except OSError as error:  # on a full disk; the error that stopped the run matters more
            print(f"cannot write {path}: {error.strerror}.")
        for scene, frames in report["incomplete_frames"].items():
            print(
                f"{scene}: {len(frames)} public frames are incomplete in the archive and left out, first {frames[0]}."
            )
        print(f"fetched {self.fetched} members, {_human(self.fetched_bytes)} in {seconds:.0f} s.")

    def _raise_failures(self, count: int) -> None:
        if self.failed:
            shown = "\n".join(f"  {scene}: {reason}" for scene, reason in sorted(self.failed.items())[:10])
            more = f"\n  and {len(self.failed) - 10} more" if len(self.failed) > 10 else ""
            raise InputError(
                f"{len(self.failed)} of {count} scenes failed; run the same command again to try them once more, "
                f"and check --base-url {self.config.base_url} where nothing is found:\n{shown}{more}"
            )


def run_parallel(work: Callable[[T], None], items: Iterable[T], threads: int, stop: threading.Event) -> None:
    """Work on all items, in order, ``threads`` at a time. The first exception sets ``stop`` and is raised."""
    iterator, lock = iter(items), threading.Lock()

    def loop() -> None:
        while not stop.is_set():
            with lock:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            work(item)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in as_completed([pool.submit(loop) for _ in range(threads)]):
                future.result()
        except BaseException:
            stop.set()
            raise


def _in_scene(member: Member) -> Member:
    """The member under its name inside the scene's folder."""
    return replace(member, name=member.name.split("/", 1)[1])


def _progress(transfer: bool = False) -> Any:
    from rich import progress as rich

    columns = [rich.TextColumn("{task.description} {task.fields[items]}"), rich.BarColumn()]
    if transfer:
        columns += [
            rich.DownloadColumn(),
            rich.TransferSpeedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
        ]
    else:
        columns += [rich.MofNCompleteColumn()]
    return rich.Progress(*columns)


def _human(size: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
