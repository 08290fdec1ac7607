"""`diffusionerf-export-depth`: planar depth in metres of the images of a finished run, with their cameras.

Layout of an export::

    <output>/depth/<split>_<number>_<image>.png   uint16, millimetres, 0 where unknown or beyond 65.535 m
                                          .npy   float32 [h, w], metres, 0 where unknown
             transforms.json                     cameras in nerfstudio's format, positions in metres

Depth is planar (along the optical axis), and depth and camera positions share one unit, so points can be formed from
both: X = R (u z, -v z, -z) + t for a pixel at u = (column + .5 - cx) / fx, v = (row + .5 - cy) / fy.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from ddm_training.errors import InputError, ends_plainly, require_positive
from ddm_training.files import make_folder
from ddm_training.transforms import DISTORTION, MAX_MILLIMETRES, depth_millimetres, write_transforms

if TYPE_CHECKING:
    from nerfstudio.cameras.cameras import Cameras


@dataclass(frozen=True, kw_only=True)
class ExportDepthConfig:
    """Write planar depth in metres (16-bit PNG in millimetres, NPY) and cameras of a finished run."""

    load_config: Path
    """The run's config.yml."""
    output_dir: Path
    """Where to write; made when absent."""
    split: Literal["train", "test", "train+test"] = "train+test"
    """Which images."""
    depth: Literal["median", "expected"] = "median"
    """median: where half of the light is stopped, sharp at edges. expected: the mean, as the prior sees it."""
    metres_per_unit: float | None = None
    """Metres per scene unit; unset: the capture's own where it is metric, else what training found for the prior."""
    min_accumulation: float = 0.5
    """Where less of the light is stopped, depth is unknown."""
    downscale: float = 1.0
    """Divides the images' size."""

    def __post_init__(self) -> None:
        require_positive(self, "metres_per_unit", "downscale")
        if not 0.0 <= self.min_accumulation <= 1.0:
            raise InputError(f"--min-accumulation must be in [0, 1], found {self.min_accumulation}.")

    def main(self) -> None:
        """Render and write.

        Raises:
            InputError: no such run, nothing says how long a scene unit is, a folder that cannot be written to, or
                cameras that are not perspective.
        """
        check_run_config(self.load_config)
        make_folder(self.output_dir, "--output-dir")

        from nerfstudio.utils.eval_utils import eval_setup  # imports all of nerfstudio

        from diffusionerf_ns.visibility import are_perspective

        _, pipeline, checkpoint, _ = eval_setup(self.load_config, test_mode="inference")
        scale, source = metres_per_unit(pipeline, self.metres_per_unit)
        frames: list[dict[str, Any]] = []
        datamanager: Any = pipeline.datamanager
        datasets = {"train": datamanager.train_dataset, "test": datamanager.eval_dataset}
        splits = self.split.split("+")
        for split in splits:
            if not are_perspective(datasets[split].cameras):
                raise InputError(
                    f"the {split} images of this run are not all of perspective cameras (fisheye or panorama): there "
                    "is no planar depth of them, and it is not exported."
                )
        for split in splits:
            known = {frame["file_path"] for frame in frames}  # captures of few images are tested on the same
            frames += self._export_split(pipeline, datasets[split], split, scale, known)
        world: Any = datamanager.train_dataparser_outputs
        write_transforms(
            self.output_dir,
            frames,
            {
                "depth_unit_scale_factor": 1e-3,
                "metres_per_scene_unit": scale,
                "metres_from": source,
                "depth_kind": self.depth,
                "checkpoint": checkpoint.name,
                "dataparser_transform": world.dataparser_transform.tolist(),
                "dataparser_scale": float(world.dataparser_scale),
            },
        )
        print(f"{len(frames)} depth maps in {self.output_dir}; a scene unit is {scale:.4g} m ({source}).")

    def _export_split(
        self, pipeline: Any, dataset: Any, split: str, scale: float, known: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        cameras = dataset.cameras if self.downscale == 1.0 else reduced(dataset.cameras, self.downscale)
        cameras = cameras.to(pipeline.device)
        frames = []
        for i, image in enumerate(dataset.image_filenames):
            file = str(Path(image).resolve())  # relative paths are read from the folder of the JSON
            if file in known:
                continue
            name = f"{split}_{i:05d}_{Path(image).stem}"
            z = self._render(pipeline, cameras[i : i + 1]) * scale
            beyond = write_depth(self.output_dir / "depth", name, z)
            if beyond:
                print(
                    f"{name}: {beyond} pixels beyond {MAX_MILLIMETRES / 1000:g} m are 0 in the PNG; the NPY has them."
                )
            frames.append({"split": split, "file_path": file} | frame_of(cameras[i : i + 1], name, scale))
        return frames

    def _render(self, pipeline: Any, camera: "Cameras") -> Float[np.ndarray, "h w"]:
        """Planar depth in scene units, 0 where unknown."""
        outputs = pipeline.model.get_outputs_for_camera(camera)
        norm = camera.generate_rays(camera_indices=0, keep_shape=True).metadata["directions_norm"]
        z = outputs["depth" if self.depth == "median" else "expected_depth"] / norm
        return (z * (outputs["accumulation"] >= self.min_accumulation))[..., 0].cpu().numpy()


def check_run_config(path: Path) -> None:
    """Refuse a file that is not the config.yml of a run, which nerfstudio would meet with an assertion.

    Raises:
        InputError: no such file, not readable, or of something else.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected the config.yml of a run.")

    import yaml
    from nerfstudio.engine.trainer import TrainerConfig

    try:
        held = yaml.load(path.read_text(), Loader=yaml.Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected the config.yml of a run.") from error
    if not isinstance(held, TrainerConfig):
        raise InputError(f"{path} is not the configuration of a run; expected the config.yml that ns-train wrote.")


def metres_per_unit(pipeline: Any, by_hand: float | None) -> tuple[float, str]:
    """Metres per scene unit, and who says so: "by hand", "capture" or "prior".

    Raises:
        InputError: nobody says so.
    """
    if by_hand is not None:
        return by_hand, "by hand"
    known = pipeline.datamanager.train_dataset.metadata.get("scene_units_per_metre")
    if known is not None:
        return 1.0 / float(known), "capture"
    scale = float(getattr(pipeline.model, "metric_scale", np.nan))  # nerfacto of the benchmark has none
    if not np.isfinite(scale):
        raise InputError("nothing says how many metres a scene unit of this run is: give --metres-per-unit.")
    return scale, "prior"


def reduced(cameras: "Cameras", divisor: float) -> "Cameras":
    """Cameras of images with both sides divided by ``divisor`` and rounded down, which show as much as before.

    A side that does not divide shrinks by a little more, and so do its focal length and centre; nerfstudio's
    `rescale_output_resolution` scales them by ``divisor`` itself, which cuts the last columns and rows off.

    Raises:
        InputError: nothing would be left of an image.
    """
    width, height = ((side.double() / divisor).long() for side in (cameras.width, cameras.height))
    if min(int(width.min()), int(height.min())) < 1:
        raise InputError(
            f"--downscale {divisor:g}: images of {int(cameras.width.min())} x {int(cameras.height.min())} pixels "
            "cannot be reduced so much. Give less."
        )
    x, y = width / cameras.width, height / cameras.height
    return replace(
        cameras,
        fx=cameras.fx * x,
        fy=cameras.fy * y,
        cx=cameras.cx * x,
        cy=cameras.cy * y,
        width=width,
        height=height,
    )


def write_depth(folder: Path, name: str, z: Float[np.ndarray, "h w"]) -> int:
    """Write the PNG and the NPY of one image; gives the number of pixels too far away for the PNG."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.npy", z.astype(np.float32))
    stored = depth_millimetres(z.astype(np.float64))
    Image.fromarray(stored).save(folder / f"{name}.png")
    return int(((stored == 0) & (z > 0.001)).sum())


def frame_of(camera: "Cameras", name: str, scale: float) -> dict[str, Any]:
    """A frame of `transforms.json`: OpenGL camera-to-world with the position in metres, intrinsics in pixels."""
    pose = np.vstack([camera.camera_to_worlds[0].cpu().numpy(), [0.0, 0.0, 0.0, 1.0]])
    pose[:3, 3] *= scale
    frame: dict[str, Any] = {
        "depth_file_path": f"depth/{name}.png",
        "depth_npy_path": f"depth/{name}.npy",
        "transform_matrix": pose.tolist(),
        "fl_x": float(camera.fx[0]),
        "fl_y": float(camera.fy[0]),
        "cx": float(camera.cx[0]),
        "cy": float(camera.cy[0]),
        "w": int(camera.width[0]),
        "h": int(camera.height[0]),
    }
    if camera.distortion_params is not None:
        frame |= dict(zip(DISTORTION, map(float, camera.distortion_params[0])))
    return frame


def main(args: list[str] | None = None) -> None:
    """Entry point. Mistakes in what the user gives end with a message and exit status 2, without a traceback."""
    import tyro

    with ends_plainly():
        tyro.cli(ExportDepthConfig, args=args, prog="diffusionerf-export-depth").main()


if __name__ == "__main__":
    main()
