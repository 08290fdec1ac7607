"""What all few-view data parsers share: flags, the choice of views, normalisation, and nerfstudio's outputs.

A parser of one layout only reads: it returns a `Capture`, all cameras and files in the capture's own units. The rest,
from the split to `DataparserOutputs`, is the same for all and lies here.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.utils.rich_utils import CONSOLE

from ddm_training.errors import InputError, require_positive
from diffusionerf_ns.dataparsers import poses as scene_poses
from diffusionerf_ns.dataparsers.images import check_readable, downscaled, same_shape
from diffusionerf_ns.dataparsers.splits import Split, choose, split_table
from diffusionerf_ns.metrics import ProtocolName

Layout = Literal["llff", "transforms", "dtu", "colmap"]
Source = Literal[Layout, "idr"]  # "idr": an own capture in the layout of a DTU scan


@dataclass
class FewViewBaseConfig(DataParserConfig):
    """Flags that every few-view data parser has."""

    _target: type = field(default_factory=lambda: FewViewBaseParser)
    """target class to instantiate"""
    data: Path = Path()
    """Folder of the capture."""
    num_views: int | Literal["all"] = "all"
    """Number of training images, spread evenly over those that are not held out (of DTU the first of the
    protocol's list); "all" takes them all."""
    train_ids: tuple[int, ...] | None = None
    """Train on these images (0-based, sorted by name) instead; they are then not tested on."""
    test_ids: tuple[int, ...] | None = None
    """Test on these images instead; they are then not trained on. With a `transforms.json` that has no lists of its
    own, all others may then train."""
    downscale_factor: int | None = None
    """Reduce images by this factor: `images_K` is used where it exists, else made once. Unset: LLFF takes `images_8`
    (the protocol's size) where it exists, DTU what gives 400 x 300, others the smallest factor whose result has no
    side over 1008 pixels."""
    orientation_method: scene_poses.OrientationMethod = "up"
    """How the scene is turned; "up" puts the mean up vector of all cameras along z."""
    center_method: scene_poses.CenterMethod = "poses"
    """What becomes the origin; "poses" is the mean of all camera centres, training and test alike."""
    auto_scale_poses: bool = True
    """Scale the scene so that the largest camera coordinate is 1."""
    scale_factor: float = 1.0
    """Scale camera centres by this after that."""
    scene_scale: float = 1.0
    """Half the side of the scene box."""

    def __post_init__(self) -> None:
        require_positive(self, "scale_factor", "scene_scale")


@dataclass(frozen=True, kw_only=True)
class Capture:
    """All cameras of a capture, in its own units, before any choice of views. ``n`` cameras, sorted by name."""

    source: Source
    title: str
    """What the capture is called in tables and messages."""
    names: tuple[str, ...]
    images: tuple[Path, ...]
    """Full-size file of each camera. It need not exist for cameras outside ``split``."""
    poses: Float[np.ndarray, "n 3 4"]
    """Camera to world, OpenGL axes."""
    intrinsics: Float[np.ndarray, "n 4"]
    """fx, fy, cx, cy in pixels of an image of ``sizes``; the first pixel's centre is at (0.5, 0.5)."""
    sizes: Int[np.ndarray, "n 2"]
    """Width and height that ``intrinsics`` hold for; the files may be smaller."""
    split: Split
    factor: int
    """By how much the images are to be reduced; 1 where the files have their final size."""
    cache: Path
    """Folder for reduced copies."""
    distortion: Float[np.ndarray, "n 6"] | None = None
    bounds: Float[np.ndarray, "n 2"] | None = None
    """Near and far distance of what each camera sees, in units of the capture."""
    masks: tuple[Path, ...] | None = None
    """Masks that training pixels are drawn by."""
    eval_masks: tuple[Path, ...] | None = None
    """Masks for evaluation only."""
    depths: tuple[Path | None, ...] | None = None
    """Planar depth files."""
    depth_unit: float = 1e-3
    """Metres per stored unit of ``depths``."""
    metres: float | None = None
    """Metres per unit of the capture; None where it is not metric."""
    unit: float | None = None
    """Length that is to become 1 in the scene; None: the largest camera coordinate."""
    applied: Float[torch.Tensor, "3 4"] | None = None
    """Transform that the capture's poses have been through already (nerfstudio's `applied_transform`)."""
    applied_scale: float = 1.0
    orientation: scene_poses.OrientationMethod | None = None
    """Wins over the flag."""
    alpha_color: tuple[float, float, float] | None = None
    """What transparent pixels are shown on, in [0, 1]; None: not known."""
    protocol: ProtocolName = "nerfstudio"


class FewViewBaseParser(DataParser):
    """Turns a `Capture` into nerfstudio's outputs. A subclass reads one layout in `read_capture`."""

    config: FewViewBaseConfig

    def __init__(self, config: FewViewBaseConfig) -> None:
        super().__init__(config=config)
        self._capture: Capture | None = None
        self._shown = False

    @abstractmethod
    def read_capture(self) -> Capture:
        """All cameras of the capture and the choice of views."""

    def choose(
        self, count: int, pool: Sequence[int], test: Sequence[int], how: Literal["spread", "first"] = "spread"
    ) -> Split:
        """The flags' choice of views; arguments as of `splits.choose`."""
        c = self.config
        return choose(count, pool, test, num_views=c.num_views, train_ids=c.train_ids, test_ids=c.test_ids, how=how)

    def _generate_dataparser_outputs(self, split: str = "train", **_: Any) -> DataparserOutputs:
        """Outputs of "train", or of the test images for "val" and "test".

        ``metadata`` holds: "near", "far" (scene units; absent where unknown), "split" (``{"train": [{"id", "name"}],
        "test": [...]}``), "source", "protocol", "depth_filenames" (planar depth, a path or None per image),
        "depth_unit_scale_factor" (metres per stored unit), "scene_units_per_metre" (absent where the capture is not
        metric), "eval_mask_filenames" (a path per test image; None for "train" and where there
        are none), "downscale_factor" (to a whole number).

        Raises:
            InputError: the folder does not hold what it should, or the flags ask for what it cannot give.
        """
        if split not in ("train", "val", "test"):
            raise InputError(f"split {split!r} is unknown; expected 'train', 'val' or 'test'.")
        check_folder(self.config.data)
        if self._capture is None:
            self._capture = self.read_capture()
        capture = self._capture
        ids = list(capture.split.train if split == "train" else capture.split.test)
        first = split == "train" and not self._shown
        if first:
            self._shown = True
            CONSOLE.print(split_table(capture.split, capture.names, f"{capture.title}: which images are used"))

        scene_poses.check_poses(capture.poses, capture.names, capture.title)
        wanted = capture.orientation or self.config.orientation_method
        scene = scene_poses.normalise(
            capture.poses,
            orientation_method=wanted,
            center_method=self.config.center_method,
            auto_scale=self.config.auto_scale_poses,
            scale_factor=self.config.scale_factor,
            unit=capture.unit,
        )
        if first and scene.orientation != wanted:
            CONSOLE.print(
                f"[yellow]The cameras' up vectors cancel out, so the scene cannot be oriented by {wanted!r}: it is "
                "left as it lies. --orientation-method none says so, pca orients it by where the cameras are."
            )
        files = self._files(capture, ids)
        sizes = np.array(check_readable(files))
        half = self.config.scene_scale
        scale = scene.scale * capture.applied_scale
        return DataparserOutputs(
            image_filenames=files,
            cameras=_cameras(capture, ids, scene.poses[ids], sizes),
            scene_box=SceneBox(aabb=torch.tensor([[-half] * 3, [half] * 3], dtype=torch.float32)),
            mask_filenames=None if capture.masks is None else [capture.masks[i] for i in ids],
            alpha_color=None if capture.alpha_color is None else torch.tensor(capture.alpha_color),
            dataparser_scale=scale,
            dataparser_transform=(
                scene.transform if capture.applied is None else scene_poses.compose(capture.applied, scene.transform)
            ),
            metadata=self._metadata(capture, ids, split, scene.scale, scale)
            | {"downscale_factor": _reduced_by(capture, ids, sizes)},
        )

    def _files(self, capture: Capture, ids: list[int]) -> list[Path]:
        """The image files of ``ids`` in their final size."""
        if capture.factor == 1:
            return [capture.images[i] for i in ids]
        needed = {capture.images[i] for i in (*capture.split.train, *capture.split.test)}
        made = [i for i, image in enumerate(capture.images) if image in needed or image.is_file()]
        paths = downscaled([capture.images[i] for i in made], capture.factor, capture.cache, needed)
        by_id = dict(zip(made, paths))
        return [by_id[i] for i in ids]

    def _metadata(
        self, capture: Capture, ids: list[int], split: str, pose_scale: float, scale: float
    ) -> dict[str, Any]:
        def listed(chosen: tuple[int, ...]) -> list[dict[str, Any]]:
            return [{"id": i, "name": capture.names[i]} for i in chosen]

        metadata: dict[str, Any] = {
            "source": capture.source,
            "protocol": capture.protocol,
            "split": {"train": listed(capture.split.train), "test": listed(capture.split.test)},
            "depth_filenames": None if capture.depths is None else [capture.depths[i] for i in ids],
            "depth_unit_scale_factor": capture.depth_unit,
            "eval_mask_filenames": None
            if capture.eval_masks is None or split == "train"
            else [capture.eval_masks[i] for i in ids],
        }
        if capture.metres is not None:
            metadata["scene_units_per_metre"] = scale / capture.metres
        if capture.bounds is not None:
            chosen = capture.bounds[list(capture.split.train)]
            metadata |= {
                "near": float(chosen[:, 0].min()) * pose_scale,
                "far": float(chosen[:, 1].max()) * pose_scale,
            }
        return metadata


def check_folder(data: Path) -> None:
    """Raises InputError where ``data`` is no folder (or .json file) or is an empty folder."""
    if not data.exists():
        where = "" if data.is_absolute() else f" in {Path.cwd()} (a finished run is used from where it was trained)"
        raise InputError(f"--data {data}: there is no such folder{where}. Give the folder of a capture.")
    if data.is_dir() and not any(data.iterdir()):
        raise InputError(f"--data {data}: the folder is empty. Give the folder of a capture.")
    if not data.is_dir() and data.suffix != ".json":
        raise InputError(f"--data {data} is a file; expected the folder of a capture or a transforms.json.")


def automatic_factor(width: int, height: int, longest: int = 1008) -> int:
    """Smallest factor that brings the longer side to at most ``longest`` pixels (1008: LLFF's `images_4`)."""
    return max(1, -(-max(width, height) // longest))


def whole_factor(factor: int | float | None) -> int | None:
    """--downscale-factor as an int; `ns-render dataset` hands over a float whatever is typed.

    Raises:
        InputError: it is no whole number of at least 1.
    """
    if factor is None:
        return None
    if factor < 1 or factor != int(factor):
        raise InputError(f"--downscale-factor {factor}: expected a whole number of at least 1.")
    return int(factor)


def _reduced_by(capture: Capture, ids: list[int], sizes: Int[np.ndarray, "ids 2"]) -> int:
    """How much smaller the images are than those that the cameras were given for, to a whole number."""
    return max(1, round(float(capture.sizes[ids[0], 0]) / int(sizes[0, 0])))


def _cameras(capture: Capture, ids: list[int], poses: torch.Tensor, sizes: Int[np.ndarray, "ids 2"]) -> Cameras:
    """Cameras whose intrinsics hold for the image sizes (width, height) that were found."""
    ratio = sizes / capture.sizes[ids]
    for i, (width, height), (given_width, given_height) in zip(ids, sizes.tolist(), capture.sizes[ids].tolist()):
        if not same_shape((width, height), (given_width, given_height)):
            raise InputError(
                f"{capture.title}: {capture.names[i]} is {width} x {height}, but its camera is given for {given_width} "
                f"x {given_height} pixels, which has another shape. Use the images that the cameras were estimated "
                "from, not cropped or turned."
            )
    scaled = torch.from_numpy(capture.intrinsics[ids] * np.concatenate([ratio, ratio], axis=1)).float()
    distortion = None
    if capture.distortion is not None and np.any(capture.distortion[ids]):
        distortion = torch.from_numpy(capture.distortion[ids]).float()
    return Cameras(
        camera_to_worlds=poses,
        fx=scaled[:, 0:1],
        fy=scaled[:, 1:2],
        cx=scaled[:, 2:3],
        cy=scaled[:, 3:4],
        width=torch.from_numpy(sizes[:, :1]),
        height=torch.from_numpy(sizes[:, 1:]),
        distortion_params=distortion,
        camera_type=CameraType.PERSPECTIVE,
        metadata={},  # `ns-export cameras` expects some
    )
