"""`ddm frames` and `ddm hypersim prepare`: raw RGBD data into the frame store, one job per scene of the store.

Whole scenes are skipped, so running the same command again continues after a kill, a full disk or a longer download.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from ddm_training.errors import InputError
from ddm_training.frames import Split
from ddm_training.hypersim import (
    CAMERA_FILE,
    KNOWN_BAD_CAMERAS,
    SPLIT_FILE,
    ColorSource,
    Pinhole,
    SceneCamera,
    frame_files,
    pinhole_from_uv,
    read_camera_file,
    read_frame,
)
from ddm_training.hypersim_split import PublicScene, read_split_csv
from ddm_training.jobs import EngineConfig
from ddm_training.rejection import FrameRejected, RejectionLimits, no_file
from ddm_training.report import SceneResult
from ddm_training.resize import check_size
from ddm_training.rgbd_folder import Intrinsics, Pair, image_size, list_pairs, read_intrinsics, read_pair
from ddm_training.scene_jobs import ABSENT, Frame, SceneJob, prepare, write_scene

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]
"""Flags of a nested config without its name before them: `--workers`, not `--engine.workers`."""


@dataclass(frozen=True, kw_only=True)
class HypersimJob(SceneJob):
    """The frames of one camera of a Hypersim scene."""

    images: Path
    """`<scene>/images`."""
    camera_name: str
    camera: SceneCamera | None
    """None where the table of cameras has no such scene."""
    color: ColorSource
    max_shear: float


def write_hypersim_scene(job: HypersimJob) -> SceneResult:
    """Do a `HypersimJob`."""
    try:
        pinhole = _usable_camera(job)
    except FrameRejected as reason:
        return write_scene(job, _never, unreadable=str(reason))

    def read(frame: int) -> Frame:
        files = frame_files(job.images, job.camera_name, frame, job.color)
        return *read_frame(files, pinhole), pinhole.intrinsics

    return write_scene(job, read)


def _usable_camera(job: HypersimJob) -> Pinhole:
    if (job.images.parent.name, job.camera_name) in KNOWN_BAD_CAMERAS:
        raise FrameRejected("known bad camera")
    if job.camera is None:
        raise FrameRejected("scene not in the table of cameras")
    pinhole = pinhole_from_uv(job.camera)
    if abs(pinhole.shear) > job.max_shear:
        raise FrameRejected(f"camera sheared by more than {100 * job.max_shear:g} %")
    return pinhole


def _never(frame: Any) -> Frame:
    raise AssertionError(f"frame {frame} of an unusable camera was read")


@dataclass(frozen=True, kw_only=True)
class HypersimPrepareConfig:
    """Make a frame store of Hypersim scenes as `ddm hypersim download` fetches them.

    Colour is tone-mapped, distance becomes planar depth, pixels without depth are masked, bad cameras and frames are
    left out and counted. Each camera of a scene becomes a scene of the store.
    """

    data: Path
    """Folder with the scenes: `ai_001_001/images/scene_cam_00_final_hdf5/...`."""
    output: Path
    """The frame store; made when absent."""
    split_csv: Path | None = None
    """`metadata_images_split_scene_v1.csv`; in `data` when not given."""
    camera_csv: Path | None = None
    """`metadata_camera_parameters.csv`; in `data` when not given. Not part of the download: it is in
    `contrib/mikeroberts3000` of the repository apple/ml-hypersim."""
    camera: Literal["table", "plain"] = "table"
    """The scene's own camera from that table, or the plain one (f = 886.81) for all: wrong in every second scene."""
    splits: tuple[Split, ...] = ("train", "val", "test")
    """Splits to prepare; each scene keeps its split in the store."""
    scenes: tuple[str, ...] = ()
    """These scenes only; all that are on disk when empty."""
    color: ColorSource = "hdr"
    """"hdr": tone-map the HDR colour. "preview": the ready JPEG (`ddm hypersim download --preview`)."""
    width: int = 256
    """Width of the stored frames; the paper renders its patches in an image of 256 x 192."""
    height: int = 192
    """Height of the stored frames."""
    max_shear: float = 0.02
    """Largest shear of a camera, as a share of the focal length. Intrinsics have no shear, so it is neglected: the
    published scenes have 0.019 at most (one degree), and 459 of 482 below .001."""
    limits: Flat[RejectionLimits] = field(default_factory=RejectionLimits)
    """Which frames are left out; judged at the stored size."""
    engine: Flat[EngineConfig] = field(default_factory=EngineConfig)
    """Where the work is done."""
    redo: bool = False
    """Make whole scenes again, e.g. after a damaged file was replaced."""

    def jobs(self) -> list[HypersimJob]:
        """One job per camera of each scene on disk.

        Raises:
            InputError: a table cannot be read, or nothing is left to do.
        """
        if not self.data.is_dir():
            raise InputError(f"{self.data} is not a folder; expected Hypersim scenes (ai_001_001, ...) in it.")
        table = read_split_csv(self.split_csv or self.data / SPLIT_FILE)
        cameras = read_camera_file(self.camera_csv or self.data / CAMERA_FILE) if self.camera == "table" else None
        chosen = self._chosen(table)
        jobs = []
        for scene in chosen:
            camera = SceneCamera() if cameras is None else cameras.get(scene.name)
            if camera is not None:
                check_size((camera.width, camera.height), (self.width, self.height))
            names = sorted({name for name, _ in scene.frames})
            jobs += [self._job(scene, name, camera) for name in names]
        return jobs

    def _chosen(self, table: dict[str, PublicScene]) -> list[PublicScene]:
        on_disk = {path.parent.name for path in self.data.glob("*/images")}
        if unknown := set(self.scenes) - on_disk:
            raise InputError(f"scenes {sorted(unknown)} are not in {self.data}; on disk are {len(on_disk)} scenes.")
        if strangers := sorted(on_disk - table.keys()):
            print(f"left out: {len(strangers)} folders that the split file does not know, e.g. {strangers[0]}")
        wanted = set(self.scenes) or on_disk
        chosen = [scene for name, scene in sorted(table.items()) if name in wanted and scene.split in self.splits]
        if not chosen:
            found = {split: sum(table[n].split == split for n in wanted & table.keys()) for split in self.splits}
            raise InputError(
                f"nothing to prepare: of the {len(on_disk)} scenes on disk in {self.data}, none is in the split file "
                f"with public frames of the splits asked for {found}; the split file has {len(table)} scenes."
            )
        return chosen

    def _job(self, scene: PublicScene, camera_name: str, camera: SceneCamera | None) -> HypersimJob:
        images = self.data / scene.name / "images"
        frames = [number for name, number in scene.frames if name == camera_name]
        present = _files_by_folder(images, camera_name)
        here: list[int] = []
        missing: dict[str, int] = {}
        for number in frames:
            files = frame_files(images, camera_name, number, self.color)
            lacking = [what for what, path in files.items() if path.name not in present]
            if not lacking:
                here.append(number)
                continue
            reason = ABSENT if len(lacking) == len(files) else no_file(lacking[0])
            missing[reason] = missing.get(reason, 0) + 1
        return HypersimJob(
            root=self.output,
            name=f"{scene.name}_{camera_name}",
            split=scene.split,  # pyright: ignore[reportArgumentType]
            source="hypersim",
            width=self.width,
            height=self.height,
            limits=self.limits,
            frames=tuple(here),
            names=tuple(f"frame.{number:04d}" for number in here),
            missing=missing,
            images=images,
            camera_name=camera_name,
            camera=camera,
            color=self.color,
            max_shear=self.max_shear,
        )

    def main(self) -> None:
        """Write the store."""
        jobs = self.jobs()
        left_out = ("output", "engine", "redo", "scenes", "splits", "split_csv")  # which scenes, not what is in them
        options = {k: v for k, v in asdict(self).items() if k not in left_out}
        options["data"] = str(self.data.resolve())
        options["camera_csv"] = str(self.camera_csv.resolve()) if self.camera_csv else ""
        prepare(self.output, "hypersim", options, jobs, write_hypersim_scene, self.engine, redo=self.redo)


def _files_by_folder(images: Path, camera_name: str) -> set[str]:
    """Names of the files of a camera: three listings in place of three look-ups per frame."""
    folders = [images / f"scene_{camera_name}_{kind}" for kind in ("geometry_hdf5", "final_hdf5", "final_preview")]
    return {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}


@dataclass(frozen=True, kw_only=True)
class FolderJob(SceneJob):
    """A run of frames of an RGBD folder; `frames` are of type `Pair`."""

    source_size: tuple[int, int]
    intrinsics: Intrinsics
    metres_per_unit: float


def write_folder_scene(job: FolderJob) -> SceneResult:
    """Do a `FolderJob`."""

    def read(pair: Pair) -> Frame:
        return *read_pair(pair, *job.source_size, metres_per_unit=job.metres_per_unit), job.intrinsics

    return write_scene(job, read)


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
    size: tuple[int, int] | None = None
    """Width and height of the stored frames, in the aspect ratio of the images; their own size when not given."""
    limits: Flat[RejectionLimits] = field(
        # depth sensors leave a third of the pixels without depth; they are masked
        default_factory=lambda: RejectionLimits(max_invalid=0.8, min_depth_range=0.1)
    )
    """Which frames are left out."""
    engine: Flat[EngineConfig] = field(default_factory=EngineConfig)
    """Where the work is done."""
    redo: bool = False
    """Make whole scenes again, e.g. after a damaged file was replaced."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"val-fraction must be in [0, 1), found {self.val_fraction}.")
        if self.val_gap < 0:
            raise InputError(f"val-gap must not be negative, found {self.val_gap}.")
        if not self.metres_per_unit > 0:
            raise InputError(f"metres-per-unit must be positive, found {self.metres_per_unit}.")
        if self.name is not None and (not self.name or {"/", "\\"} & set(self.name)):
            raise InputError(f"name must be a word that a folder may be called, found {self.name!r}.")

    def jobs(self) -> list[FolderJob]:
        """One job per split.

        Raises:
            InputError: the folder has no pairs, no usable intrinsics, or too few frames for the splits.
        """
        pairs, missing = list_pairs(self.data / self.color_dir, self.data / self.depth_dir)
        size = image_size(pairs)
        width, height = self.size or size
        check_size(size, (width, height))
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
                root=self.output,
                name=f"{name}_{split}",
                split=split,
                source=name,
                width=width,
                height=height,
                limits=self.limits,
                frames=tuple(part),
                names=tuple(pair.name for pair in part),
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
        options = {k: v for k, v in asdict(self).items() if k not in ("output", "engine", "redo")}
        options["data"] = str(self.data.resolve())
        prepare(self.output, f"frames-{jobs[0].source}", options, jobs, write_folder_scene, self.engine, redo=self.redo)
