"""COLMAP's structure from motion (pycolmap) for a few photographs, in a process of its own.

COLMAP's defaults are for hundreds of photographs: with three, its first pair often lacks the matches and the angle that
it asks for. So a search asks for less, and one with more features follows where that is not enough.

Nor do three photographs say much of their lens: of three that were taken at 28 mm COLMAP finds 31, and a distortion
that nine do not have. So the lens has as few unknowns as explain the matches: the focal length that EXIF or the caller
knows and no distortion, unless more of them place more images or lower the error by much.

A process of its own, because Pillow and OpenCV crash at writing PNG where pycolmap 4.2.1 was loaded before them
("corrupted size vs. prev_size"; it exports functions of zlib), because COLMAP ends the process at what it cannot bear,
and because its memory is free again.
"""

import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from ddm_training.errors import InputError
from diffusionerf_ns.dataparsers.images import UNREADABLE, has_alpha

if TYPE_CHECKING:
    import pycolmap

MAX_SIDE = 2000  # pixels, for features: training sees fewer, and memory grows with them
OPAQUE = 128  # alpha from which on a pixel counts, as in training
MAX_THREADS = 4  # for features, each of which takes about a gigabyte
# Ratio of the errors without and with an unknown, above which it is used. Measured on 3 and 6 images of two captures:
# 1.030 at most where the focal length is right, 1.06 to 2.1 where it is 30 or 40 % off.
WORTH_AN_UNKNOWN = 1.03
LEAST_OF_TWO = 100  # points that each image must see where those of two images alone count; COLMAP's first pair's
FEW = 12  # images, of which it is tried; of more, three that see the same are hardly missing
KEPT_POINTS = 0.8  # share of the points of the image that sees fewest, that a lower error must not cost
CameraSharing = Literal["one", "each"]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How hard features and poses are looked for."""

    peak_threshold: float
    """Least contrast of a SIFT feature."""
    guided: bool
    """Match again along the epipolar lines of what was matched."""
    distortion: bool
    """Try to explain the matches by the lens's radial distortion as well."""
    least_inliers: int
    """Matches that the first pair needs."""
    least_angle: float
    """Degrees between the rays of the first pair's points, in the median."""
    least_points: int = 15  # COLMAP: 30
    """Points by which a further image is placed."""


# COLMAP: 100 inliers, 16 degrees.
SEARCHES = (
    Search(peak_threshold=0.02 / 3, guided=False, distortion=True, least_inliers=30, least_angle=4.0),
    Search(peak_threshold=0.002, guided=True, distortion=False, least_inliers=15, least_angle=2.0),
)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An image with a pose."""

    name: str
    """File name."""
    rotation: tuple[tuple[float, float, float], ...]
    """World to camera: rows are the camera's right, down and forward."""
    center: tuple[float, float, float]
    """Position of the camera; the unit of length is arbitrary."""
    focal: float
    """Pixels."""
    principal: tuple[float, float]
    """Pixels from the upper left corner of the image."""
    distortion: float
    """k1 of the radial distortion."""
    size: tuple[int, int]
    """Width and height, pixels."""
    known_focal: float | None
    """Pixels; None where neither EXIF nor the caller said it."""
    points: int
    """Points that it sees."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Images that were placed together."""

    images: tuple[Placed, ...]
    """By name."""
    points: int
    """Number of points in space."""
    error: float
    """Mean distance in pixels between a point and where it was found in an image."""

    @property
    def rank(self) -> tuple[int, int]:
        """The larger the better: placed images, and the points of the one that sees fewest."""
        return len(self.images), min(image.points for image in self.images)


def select_lens_model(tried: Sequence[tuple[int, list[Reconstruction]]]) -> list[Reconstruction]:
    """Those of the lens of fewest unknowns that place as many images as any, about as well; of equal ones the better.

    Args:
        tried: number of the lens's unknowns, and the reconstructions that were found with them.
    """
    tried = [(unknowns, models) for unknowns, models in tried if models]
    if not tried:
        return []
    best = [max(models, key=lambda model: model.rank) for _, models in tried]
    most, _ = top = max(model.rank for model in best)
    sound = [i for i, model in enumerate(best) if model.rank >= (most, KEPT_POINTS * top[1])]
    least = min(best[i].error for i in sound)
    good = [i for i in sound if best[i].error <= WORTH_AN_UNKNOWN * least]
    return tried[min(good, key=lambda i: (tried[i][0], best[i].error))][1]


def search(
    images: Path, names: list[str], how: Search, cameras: CameraSharing, focal: float | None
) -> tuple[list[Reconstruction], int]:
    """Features, exhaustive matching and incremental mapping, all on the CPU. What is transparent has no features.

    Args:
        images: folder of the images, all of one size.
        names: their file names in it.
        how: how hard.
        cameras: whether all have one camera, or each its own.
        focal: pixels, kept where the matches do not contradict it; None: what EXIF says, if it does so of all images,
            else a search that begins at 1.2 times the longer side.

    Returns:
        Reconstructions of the simplest lens that does, which may share images; and the most matches of a pair of images
        that agree with one motion.

    Raises:
        InputError: COLMAP cannot read an image, or fails.
    """
    with tempfile.TemporaryDirectory(prefix="diffusionerf-poses-") as scratch:
        task = {"images": str(images), "names": names, "how": asdict(how), "cameras": cameras, "focal": focal}
        if write_masks(images, names, Path(scratch) / "masks"):
            task["masks"] = str(Path(scratch) / "masks")
        answer = Path(scratch) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", __name__, scratch, str(answer)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode != 0 or not answer.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise InputError(f"COLMAP failed on the photographs (exit status {done.returncode}): {said[-1]}")
        content = json.loads(answer.read_text())
    if content["unread"]:
        raise InputError(
            f"COLMAP cannot read {', '.join(content['unread'][:5])}; save as JPEG or PNG anew, or leave out."
        )
    tried = [(unknowns, [_reconstruction(model) for model in models]) for unknowns, models in content["tried"]]
    return select_lens_model(tried), content["matches"]


def write_masks(images: Path, names: Sequence[str], folder: Path) -> bool:
    """White where an image is opaque, black elsewhere, as `<name>.png`: of all images, as COLMAP wants all or none.

    Returns:
        Whether they were written: not where no image has an alpha channel.
    """
    any_alpha = False
    for name in names:
        with contextlib.suppress(*UNREADABLE), Image.open(images / name) as image:  # COLMAP names those
            any_alpha = any_alpha or has_alpha(image)
    if not any_alpha:
        return False
    folder.mkdir()
    for name in names:
        try:
            with Image.open(images / name) as image:
                alpha = image.convert("RGBA").getchannel("A")
        except UNREADABLE:
            continue
        alpha.point([255 * (value >= OPAQUE) for value in range(256)]).save(folder / f"{name}.png")
    return True


def _reconstruction(content: dict[str, Any]) -> Reconstruction:
    images = tuple(Placed(**{k: _tuples(v) for k, v in image.items()}) for image in content["images"])
    return Reconstruction(images=images, points=content["points"], error=content["error"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


# What runs in the process of its own.


def _search(scratch: Path, task: dict[str, Any]) -> dict[str, Any]:
    import pycolmap

    how, images, names = Search(**task["how"]), Path(task["images"]), task["names"]
    database = scratch / "database.db"
    reader = pycolmap.ImageReaderOptions(camera_model="SIMPLE_RADIAL")
    if "masks" in task:
        reader.mask_path = task["masks"]
    mode = pycolmap.CameraMode.SINGLE if task["cameras"] == "one" else pycolmap.CameraMode.PER_IMAGE
    pycolmap.set_random_seed(0)
    pycolmap.Database.open(database).close()
    pycolmap.import_images(database, images, mode, image_names=names, options=reader)  # so that their order is ours
    known: dict[int, float | None] = {}
    with pycolmap.Database.open(database) as opened:
        read = {image.name for image in opened.read_all_images()}
        for camera in opened.read_all_cameras():
            if task["focal"] is not None:
                camera.params = [task["focal"], *camera.params[1:]]
                camera.has_prior_focal_length = True
                opened.update_camera(camera)
            known[camera.camera_id] = float(camera.params[0]) if camera.has_prior_focal_length else None
    if len(read) < len(names):
        return {"unread": [name for name in names if name not in read], "tried": [], "matches": 0}

    features = pycolmap.FeatureExtractionOptions(use_gpu=False, num_threads=MAX_THREADS, max_image_size=MAX_SIDE)
    features.sift.peak_threshold = how.peak_threshold
    pycolmap.extract_features(database, images, names, mode, reader, features)
    # One thread each from here on: with more, the same photographs have other poses every time.
    matching = pycolmap.FeatureMatchingOptions(use_gpu=False, num_threads=1, guided_matching=how.guided)
    pycolmap.match_exhaustive(database, matching_options=matching)
    with pycolmap.Database.open(database) as opened:
        matches = max(opened.read_two_view_geometry_num_inliers()[1], default=0)
    focals = (False, True) if None not in known.values() else (True,)
    lenses = list(itertools.product(focals, (False, True) if how.distortion else (False,)))

    def find(by_two: bool) -> list[tuple[int, list[dict[str, Any]]]]:
        tried = []
        for find_focal, find_distortion in lenses:
            options = pycolmap.IncrementalPipelineOptions(min_model_size=2, random_seed=0, num_threads=1)
            options.ba_refine_focal_length, options.ba_refine_extra_params = find_focal, find_distortion
            options.mapper.init_min_num_inliers = how.least_inliers
            options.mapper.init_min_tri_angle = how.least_angle
            options.mapper.abs_pose_min_num_inliers = how.least_points
            options.triangulation.ignore_two_view_tracks = not by_two
            folder = scratch / f"{by_two}-{find_focal}-{find_distortion}"
            folder.mkdir()
            models = pycolmap.incremental_mapping(database, images, folder, options)
            tried.append((find_focal + find_distortion, [_content(model, known) for model in models.values()]))
        return tried

    # COLMAP makes no point of what two images alone have matched. Where only neighbours share enough there is no other,
    # but nothing confirms such points: they count where they place more images, and many of them do.
    tried = find(by_two=False)
    placed = max((len(model["images"]) for _, models in tried for model in models), default=0)
    if placed < len(names) <= FEW:
        for unknowns, models in find(by_two=True):
            sure = [m for m in models if min(image["points"] for image in m["images"]) >= LEAST_OF_TWO]
            tried.append((unknowns, [m for m in sure if len(m["images"]) > placed]))
    return {"unread": [], "tried": tried, "matches": matches}


def _content(model: "pycolmap.Reconstruction", known: dict[int, float | None]) -> dict[str, Any]:
    images = []
    for image in sorted((image for image in model.images.values() if image.has_pose), key=lambda image: image.name):
        camera = model.cameras[image.camera_id]
        focal, cx, cy, k1 = map(float, camera.params)
        placed = Placed(
            name=image.name,
            rotation=image.cam_from_world().rotation.matrix().tolist(),
            center=image.projection_center().tolist(),
            focal=focal,
            principal=(cx, cy),
            distortion=k1,
            size=(int(camera.width), int(camera.height)),
            known_focal=known[image.camera_id],
            points=int(image.num_points3D),
        )
        images.append(asdict(placed))
    return {"images": images, "points": model.num_points3D(), "error": model.compute_mean_reprojection_error()}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_search(Path(sys.argv[1]), json.load(sys.stdin))))
