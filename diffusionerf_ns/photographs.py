"""`diffusionerf-poses`: camera poses of a few photographs, by COLMAP's structure from motion (pycolmap).

COLMAP's defaults are for hundreds of photographs: with three, its first pair rarely has the matches and the angle that
it asks for. So a search asks for less, and one with more features follows where that is not enough.

Layout of what is written::

    <output>/images/*            the photographs, turned as their EXIF says, and to one size where some lie
             transforms.json     cameras in nerfstudio's format; the unit of length is arbitrary
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image, ImageOps

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.images import SUFFIXES, check_readable, image_size, list_images

if TYPE_CHECKING:
    import pycolmap

FILE = "transforms.json"
MADE_BY = {"made_by": "diffusionerf-poses"}
JPEG = (".jpg", ".jpeg")
COPIED = (*JPEG, ".png")  # written as they are where they need no turning; others become PNG
RAW = (".heic", ".heif", ".avif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
ORIENTATION = 0x0112  # EXIF tag
FILM_DIAGONAL = 43.27  # millimetres of 35 mm film: what lenses are compared by
FEW_POINTS = 50  # that an image sees, below which its pose is in doubt
FEW_PIXELS = 500  # of the longer side


@dataclass(frozen=True, kw_only=True)
class Search:
    """How hard features and poses are looked for."""

    peak_threshold: float
    """Least contrast of a SIFT feature."""
    guided: bool
    """Match again along the epipolar lines of what was matched."""
    refine_distortion: bool
    """Find the lens's radial distortion as well: one more unknown."""
    least_inliers: int
    """Matches that the first pair needs."""
    least_angle: float = 4.0  # COLMAP: 16
    """Degrees between the rays of the first pair's points, in the median."""
    least_points: int = 15  # COLMAP: 30
    """Points by which a further image is placed."""


SEARCHES = (
    Search(peak_threshold=0.02 / 3, guided=False, refine_distortion=True, least_inliers=30),  # COLMAP: 100
    Search(peak_threshold=0.002, guided=True, refine_distortion=False, least_inliers=15, least_angle=2.0),
)


@dataclass(frozen=True, kw_only=True)
class PosesConfig:
    """Find the camera poses of a few photographs and write them as a capture that `ns-train ... --data` takes."""

    data: Path
    """Folder of the photographs."""
    output: Path
    """Folder of the capture; it must not exist yet, or be empty."""
    cameras: Literal["one", "each"] = "one"
    """Whether all photographs were taken with one lens and zoom, or each with its own, which few can hardly tell."""
    focal_35mm: float | None = None
    """Focal length in millimetres as on 35 mm film (many phones: 24 to 28). Unset: what EXIF says, else found."""

    def __post_init__(self) -> None:
        if self.focal_35mm is not None and not self.focal_35mm > 0:
            raise InputError(f"--focal-35mm must be positive, found {self.focal_35mm}.")

    def main(self) -> None:
        """Do it.

        Raises:
            InputError: photographs that cannot be read or placed, or an output folder that holds something.
        """
        found = find_poses(self.data, self.output, cameras=self.cameras, focal_35mm=self.focal_35mm)
        print(found.summary())
        print(f"Now: ns-train diffusionerf-tiny --data {self.output}")


@dataclass(frozen=True, kw_only=True)
class Posed:
    """What was found of a folder of photographs."""

    names: tuple[str, ...]
    """All photographs, sorted."""
    points: dict[str, int]
    """Points that each of the placed ones sees."""
    num_points: int
    """Of all of them together."""
    error: float
    """Mean distance in pixels between a point and where it was found in an image."""
    focal: float
    """Focal length in millimetres as on 35 mm film, mean over the placed photographs."""
    focal_known: bool
    """Whether EXIF or the user said where to begin with it."""
    longest: int
    """Longer side of the images, pixels."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Photographs that could not be placed."""
        return tuple(name for name in self.names if name not in self.points)

    def summary(self) -> str:
        """What was found and what is in doubt, for people."""
        origin = "begun with what was known" if self.focal_known else "found: neither EXIF nor --focal-35mm says it"
        lines = [
            f"{len(self.points)} of {len(self.names)} photographs have a pose: {self.num_points} points, off by "
            f"{self.error:.2f} pixels in the mean; focal length {self.focal:.0f} mm as on 35 mm film ({origin})."
        ]
        if self.missing:
            lines.append(
                f"Without a pose, and left out: {', '.join(self.missing)}. They share too little with the others; "
                "photographs from in between would connect them."
            )
        doubtful = [f"{name} ({count})" for name, count in self.points.items() if count < FEW_POINTS]
        if doubtful:
            lines.append(
                f"Few points hold the poses of {', '.join(doubtful)}: they may be wrong, so look at the depth early. "
                + ("Larger images than these would have more. " if self.longest < FEW_PIXELS else "")
                + "Photographs with more in common are safer."
            )
        return "\n".join(lines)


def find_poses(
    data: Path,
    output: Path,
    *,
    cameras: Literal["one", "each"] = "one",
    focal_35mm: float | None = None,
) -> Posed:
    """Place the photographs of a folder and write a capture; nothing is left behind where that fails.

    Args:
        data: folder of the photographs; files of other kinds are ignored.
        output: folder of the capture; must not exist yet, or be empty.
        cameras: as of `PosesConfig`.
        focal_35mm: millimetres.

    Raises:
        InputError: fewer than two photographs, one that cannot be read, none that can be placed, or an output folder
            that holds something.
    """
    sources = find_photographs(data)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output} exists and holds something; expected a new folder, or an empty one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}.part-", dir=output.parent))
    try:
        part.chmod(0o755)  # mkdtemp gives 0700
        names = write_images(sources, part / "images")
        size = _one_size(part / "images", names)
        model = _place(part, names, cameras, focal_35mm)
        frames = frames_of(model)
        content = {"camera_model": "OPENCV", **MADE_BY, "frames": frames}
        (part / FILE).write_text(json.dumps(content, indent=2) + "\n")
        if output.exists():
            output.rmdir()
        part.rename(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    focals = [frame["fl_x"] * FILM_DIAGONAL / np.hypot(frame["w"], frame["h"]) for frame in frames]
    return Posed(
        names=tuple(names),
        points={image.name: image.num_points3D for image in _placed(model)},
        num_points=model.num_points3D(),
        error=model.compute_mean_reprojection_error(),
        focal=float(np.mean(focals)),
        focal_known=all(model.cameras[image.camera_id].has_prior_focal_length for image in _placed(model)),
        longest=max(size),
    )


def find_photographs(data: Path) -> list[Path]:
    """The photographs of a folder, each wholly readable.

    Raises:
        InputError: no such folder, fewer than two photographs, a damaged one, or some of a kind that cannot be read.
    """
    if not data.is_dir():
        raise InputError(f"--data {data} is no folder; expected one with photographs.")
    raw = sorted(p.name for p in data.iterdir() if p.suffix.lower() in RAW)
    if raw:
        raise InputError(
            f"--data {data} has photographs of kinds that cannot be read here: {', '.join(raw[:5])}"
            f"{', ...' if len(raw) > 5 else ''}. Save them as JPEG, and take these files out."
        )
    sources = list_images(data)
    if len(sources) < 2:
        raise InputError(f"--data {data} has {len(sources)} photographs ({', '.join(SUFFIXES)}); expected 2 or more.")
    check_readable(sources)
    return sources


def write_images(sources: Sequence[Path], folder: Path) -> list[str]:
    """Copies of the photographs, turned as their EXIF says and without an alpha channel; gives their names.

    A JPEG or PNG that needs neither is copied to the byte.

    Raises:
        InputError: two would have the same name, or one has more than 8 bits a colour.
    """
    folder.mkdir(parents=True)
    names = []
    for source in sources:
        with Image.open(source) as image:
            if image.mode[0] in "IF":
                raise InputError(
                    f"{source} has more than 8 bits a colour ({image.mode}); save it as JPEG or 8-bit PNG."
                )
            plain = image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1
            if plain and source.suffix.lower() in COPIED:
                name = source.name
                shutil.copyfile(source, folder / name)
            else:
                jpeg = image.mode == "RGB" and source.suffix.lower() in JPEG
                name = source.name if jpeg else f"{source.stem}.png"
                turned = ImageOps.exif_transpose(image).convert("RGB")
                _save(turned, folder / name)
        if name in names:
            raise InputError(f"two photographs would both be written as {name}, {source.name} is one: rename it.")
        names.append(name)
    return names


def _save(image: Image.Image, path: Path, exif: Image.Exif | None = None) -> None:
    """With its EXIF, or that of another; a JPEG loses little."""
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if path.suffix.lower() in JPEG else {}
    image.save(path, exif=(exif or image.getexif()).tobytes(), **options)


def _one_size(folder: Path, names: Sequence[str]) -> tuple[int, int]:
    """Width and height of all images; where some lie and some are upright, the latter are turned to the left.

    Raises:
        InputError: they are of different sizes, which training does not take.
    """
    sizes = {name: image_size(folder / name) for name in names}
    if len(set(sizes.values())) > 1:
        upright = [name for name, (width, height) in sizes.items() if height > width]
        for name in upright:
            with Image.open(folder / name) as image:
                _save(image.transpose(Image.Transpose.ROTATE_90), folder / name, image.getexif())
            sizes[name] = sizes[name][1], sizes[name][0]
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} {width} x {height}" for name, (width, height) in sizes.items())
            raise InputError(f"the photographs are of different sizes ({found}); expected one: do not crop them.")
        CONSOLE.print(f"Turned to lie as the others: {', '.join(upright)}.")
    return next(iter(sizes.values()))


def _place(part: Path, names: list[str], cameras: str, focal_35mm: float | None) -> "pycolmap.Reconstruction":
    """The best model of the searches: the first that places all images well, else the one that places most."""
    best: pycolmap.Reconstruction | None = None
    matches = 0
    for number, search in enumerate(SEARCHES):
        models, most = run_search(part / "images", names, search, cameras, focal_35mm, part / f"search-{number}")
        matches = max(matches, most)
        for model in models:
            if best is None or _rank(model) > _rank(best):
                best = model
        if best is not None and len(_placed(best)) == len(names) and _rank(best)[1] >= FEW_POINTS:
            break
    if best is None:
        raise InputError(
            f"no two of the {len(names)} photographs could be placed; the best pair has {matches} matches that agree "
            "with one motion. Photographs should share more than half of what they show, be taken a step apart rather "
            "than by turning on the spot, and be sharp and not small; --focal-35mm helps where EXIF does not say it. "
            "More of them from in between help most: --num-views chooses afterwards which are trained on."
        )
    return best


def _placed(model: "pycolmap.Reconstruction") -> list["pycolmap.Image"]:
    """The images that have a pose, by name."""
    return sorted((image for image in model.images.values() if image.has_pose), key=lambda image: image.name)


def _rank(model: "pycolmap.Reconstruction") -> tuple[int, int]:
    """Images that are placed, and the points of the one that sees fewest."""
    counts = [image.num_points3D for image in _placed(model)]
    return len(counts), min(counts, default=0)


def run_search(
    images: Path, names: list[str], search: Search, cameras: str, focal_35mm: float | None, folder: Path
) -> tuple[list["pycolmap.Reconstruction"], int]:
    """COLMAP's features, exhaustive matching and incremental mapping, all on the CPU.

    Matching and mapping have one thread each: with more, the same photographs give other poses every time.

    Args:
        images: folder of the photographs.
        names: of them.
        search: how hard.
        cameras: as of `PosesConfig`.
        focal_35mm: the same.
        folder: for COLMAP's files; removed at the end.

    Returns:
        Models that share no image's pose, and the most matches of a pair of images that agree with one motion.
    """
    import pycolmap  # here: a compiled library that nothing else needs

    level, pycolmap.logging.minloglevel = pycolmap.logging.minloglevel, int(pycolmap.logging.FATAL)
    folder.mkdir()
    database = folder / "database.db"
    try:
        features = pycolmap.FeatureExtractionOptions(use_gpu=False)
        features.sift.peak_threshold = search.peak_threshold
        reader = pycolmap.ImageReaderOptions(camera_model="SIMPLE_RADIAL")
        mode = pycolmap.CameraMode.SINGLE if cameras == "one" else pycolmap.CameraMode.PER_IMAGE
        pycolmap.set_random_seed(0)
        pycolmap.Database.open(database).close()
        pycolmap.import_images(database, images, mode, image_names=names, options=reader)  # so that their order is ours
        pycolmap.extract_features(database, images, names, mode, reader, features)
        if focal_35mm is not None:
            _set_focal(database, focal_35mm)
        matching = pycolmap.FeatureMatchingOptions(use_gpu=False, num_threads=1, guided_matching=search.guided)
        pycolmap.match_exhaustive(database, matching_options=matching)
        with pycolmap.Database.open(database) as opened:
            inliers = opened.read_two_view_geometry_num_inliers()[1]
        options = pycolmap.IncrementalPipelineOptions(min_model_size=2, random_seed=0, num_threads=1)
        options.ba_refine_extra_params = search.refine_distortion
        options.mapper.init_min_num_inliers = search.least_inliers
        options.mapper.init_min_tri_angle = search.least_angle
        options.mapper.abs_pose_min_num_inliers = search.least_points
        models = pycolmap.incremental_mapping(database, images, folder, options)
        return list(models.values()), max(inliers, default=0)
    finally:
        pycolmap.logging.minloglevel = level
        shutil.rmtree(folder, ignore_errors=True)


def _set_focal(database: Path, focal_35mm: float) -> None:
    """Let all cameras begin with a focal length, as if EXIF said it."""
    import pycolmap

    with pycolmap.Database.open(database) as opened:
        for camera in opened.read_all_cameras():
            focal = focal_35mm * float(np.hypot(camera.width, camera.height)) / FILM_DIAGONAL
            camera.params = [focal, *camera.params[1:]]
            camera.has_prior_focal_length = True
            opened.update_camera(camera)


def frames_of(model: "pycolmap.Reconstruction") -> list[dict[str, Any]]:
    """Frames of `transforms.json`, by name: camera-to-world in OpenGL axes (right, up, back), intrinsics in pixels."""
    frames = []
    for image in _placed(model):
        camera = model.cameras[image.camera_id]
        right, down, forward = image.cam_from_world().rotation.matrix()
        focal, cx, cy, k1 = map(float, camera.params)
        pose = np.eye(4)
        pose[:3] = np.stack([right, -down, -forward, image.projection_center()], axis=1)
        frames.append(
            {
                "file_path": f"images/{image.name}",
                "transform_matrix": pose.tolist(),
                "w": int(camera.width),
                "h": int(camera.height),
                **{"fl_x": focal, "fl_y": focal, "cx": cx, "cy": cy, "k1": k1},
            }
        )
    return frames


def was_made_here(capture: Path) -> bool:
    """Whether a folder is a capture that `find_poses` wrote."""
    try:
        content = json.loads((capture / FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and MADE_BY.items() <= content.items()


def main(args: list[str] | None = None) -> None:
    """Entry point. Mistakes in what the user gives end with a message and exit status 2, without a traceback."""
    import tyro

    try:
        tyro.cli(PosesConfig, args=args, prog="diffusionerf-poses").main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
