"""`diffusionerf-poses`: a few photographs become a capture, by structure from motion.

Layout of what is written::

    <output>/images/*            the photographs without copies, turned as their EXIF says, all lying where some lie,
                                 and of the smallest one's size; with their alpha where a pixel is transparent
             transforms.json     cameras in nerfstudio's format; the unit of length is arbitrary; and what the
                                 photographs were ("made_of"), which tells them from others of the same names
"""

import math
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE

from ddm_training.errors import InputError, ends_plainly
from ddm_training.transforms import FILE, MADE_BY, content_made_here, write_transforms
from diffusionerf_ns import structure_from_motion
from diffusionerf_ns.dataparsers.images import PHOTOGRAPH_SUFFIXES, list_images
from diffusionerf_ns.photographs import (
    FOCAL_RANGE,
    find_photographs,
    fingerprints,
    one_focal,
    one_size,
    without_copies,
    write_images,
)
from diffusionerf_ns.structure_from_motion import SEARCHES, CameraSharing, Reconstruction

FILM_DIAGONAL = 43.27  # millimetres of 35 mm film: what lenses are compared by
FAR_FOCAL = 1.4  # ratio of what was found and what was known, from which on one of them is wrong
FEW_POINTS = 50  # that an image sees, below which its pose is in doubt
MANY_MATCHES = 100  # of a pair of images: enough to place them, were there an angle between them
FEW_PIXELS = 500  # of the longer side


class NotPlacedError(InputError):
    """No photograph could be placed."""


@dataclass(frozen=True, kw_only=True)
class PosesConfig:
    """Find the camera poses of a few photographs and write them as a capture that `ns-train ... --data` takes."""

    data: Path
    """Folder of the photographs."""
    output: Path
    """Folder of the capture; it must not exist yet, or be empty."""
    cameras: CameraSharing = "one"
    """Whether all photographs were taken with one lens and zoom, or each with its own, which few can hardly tell."""
    focal_35mm: float | None = None
    """Focal length in millimetres as on 35 mm film (many phones: 24 to 28), not the lens's own (many phones: 4 to 7).
    Unset: what EXIF says. Kept, unless the photographs contradict it; where nobody says it, it is found."""

    def main(self) -> None:
        """Do it.

        Raises:
            InputError: photographs that cannot be read or placed, or an output folder that holds something.
        """
        found = find_poses(self.data, self.output, cameras=self.cameras, focal_35mm=self.focal_35mm)
        print(found.summary())
        print(f"Now: ns-train diffusionerf-tiny --data {shlex.quote(str(self.output))}")


@dataclass(frozen=True, kw_only=True)
class Posed:
    """What was found of a folder of photographs."""

    names: tuple[str, ...]
    """All photographs as they were written, sorted; without copies."""
    points: dict[str, int]
    """Points that each of the placed ones sees."""
    num_points: int
    """Of all of them together."""
    error: float
    """Mean distance in pixels between a point and where it was found in an image."""
    focal: float
    """Focal length in millimetres as on 35 mm film, mean over the placed photographs."""
    known_focal: float | None
    """By EXIF or the user, the same way; None where they do not say it of all photographs."""
    longest: int
    """Longer side of the images, pixels."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Photographs that could not be placed."""
        return tuple(name for name in self.names if name not in self.points)

    def summary(self) -> str:
        """What was found and what is in doubt, for people."""
        origin = "neither --focal-35mm nor the EXIF of all photographs says it"
        if self.known_focal:
            kept = math.isclose(self.focal, self.known_focal, rel_tol=1e-3)
            origin = "as it was known" if kept else f"the photographs contradict the known {self.known_focal:.0f} mm"
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
        far = self.known_focal and max(self.focal / self.known_focal, self.known_focal / self.focal) > FAR_FOCAL
        if far or not FOCAL_RANGE[0] <= self.focal <= FOCAL_RANGE[1]:
            lines.append(
                "That focal length is unlikely, so all poses may be wrong. Give another --focal-35mm, leave out "
                "photographs of another zoom, or add some from in between."
            )
        return "\n".join(lines)


def find_poses(data: Path, output: Path, *, cameras: CameraSharing = "one", focal_35mm: float | None = None) -> Posed:
    """Place the photographs of a folder and write a capture; where that fails, nothing is written.

    Args:
        data: folder of the photographs.
        output: folder of the capture; must not exist yet, or be empty.
        cameras: whether all were taken with one lens and zoom.
        focal_35mm: focal length in millimetres as on 35 mm film; unset: what EXIF says.

    Raises:
        InputError: fewer than `LEAST_IMAGES` photographs that are no copies, one that cannot be read, several lenses,
            none that can be placed, a focal length that no lens has, or an output folder that holds something or
            cannot be written.
    """
    if focal_35mm is not None and not FOCAL_RANGE[0] <= focal_35mm <= FOCAL_RANGE[1]:
        raise InputError(
            f"--focal-35mm must be within {FOCAL_RANGE[0]:g} and {FOCAL_RANGE[1]:g}, found {focal_35mm:g}: it is "
            "meant as on 35 mm film (many phones: 24 to 28), not the lens's own."
        )
    sources = find_photographs(data)
    part: Path | None = None
    try:
        output = output.resolve()
        if holds_something(output):
            raise InputError(f"--output {output} exists and holds something; expected a new folder, or an empty one.")
        place = next(folder for folder in (output, *output.parents) if folder.exists())
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}.part-", dir=place))
        made_of = fingerprints(sources)
        posed, frames, oriented = _pose_all(sources, part / "images", cameras, focal_35mm)
        write_transforms(part, frames, {**MADE_BY, "made_of": made_of, **oriented})
        output.mkdir(parents=True, exist_ok=True)
        for name in ("images", FILE):
            (part / name).rename(output / name)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror or error}.") from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return posed


def _pose_all(
    sources: Sequence[Path], folder: Path, cameras: CameraSharing, focal_35mm: float | None
) -> tuple[Posed, list[dict[str, Any]], dict[str, str]]:
    """What was found, and the frames of `transforms.json` and how they are oriented; images go to ``folder``."""
    focals = write_images(sources, folder)
    names = tuple(focals)
    (width, height), turned = one_size(folder, names)
    if focal_35mm is None and cameras == "one":
        focal_35mm = one_focal(focals)
    diagonal = float(np.hypot(width, height)) / FILM_DIAGONAL
    focal = None if focal_35mm is None else focal_35mm * diagonal
    model = _best_model(folder, list(names), cameras, focal)
    found = float(np.mean([image.focal for image in model.images])) / diagonal
    known = [image.known_focal for image in model.images if image.known_focal is not None]
    posed = Posed(
        names=names,
        points={image.name: image.points for image in model.images},
        num_points=model.points,
        error=model.error,
        focal=found,
        known_focal=float(np.mean(known)) / diagonal if len(known) == len(model.images) else None,
        longest=max(width, height),
    )
    return posed, *frames_of(model, turned)


def _best_model(images: Path, names: list[str], cameras: CameraSharing, focal: float | None) -> Reconstruction:
    """The best model of the searches: the first that places all images well, else the one that places most."""
    best: Reconstruction | None = None
    matches = 0
    for number, how in enumerate(SEARCHES):
        CONSOLE.print(f"Looking for the poses of {len(names)} photographs{', harder' if number else ''} ...")
        models, most = structure_from_motion.search(images, names, how, cameras, focal)
        matches = max(matches, most)
        best = max([*models, *([best] if best else [])], key=lambda model: model.rank, default=None)
        if best is not None and len(best.images) == len(names) and best.rank[1] >= FEW_POINTS:
            break
    if best is None:
        why = (
            "Probably they were taken from one place: take them a step apart, not by turning on the spot."
            if matches > MANY_MATCHES
            else "They should share more than half of what they show, be taken a step apart, and be sharp, not small."
        )
        raise NotPlacedError(
            f"none of the {len(names)} photographs could be placed; {matches} points at most agree between two of "
            f"them. {why} --focal-35mm helps where EXIF does not say it. More photographs from in between "
            "help most: --num-views chooses afterwards which are trained on."
        )
    return best


def frames_of(model: Reconstruction, turned: Sequence[str] = ()) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Frames of `transforms.json`: camera-to-world in OpenGL axes (right, up, back), intrinsics in pixels.

    Beside them, what the file says of how they are oriented.

    Args:
        model: of which the images are.
        turned: images that were turned by 90 degrees to the left: the photographer's up is their left. With some of
            them the world is turned so that the mean up of all is its z, and the file says so; else the data parser
            turns it so.
    """
    frames = []
    world, oriented = np.eye(3), {}
    if any(image.name in turned for image in model.images):
        ups = [-np.array(image.rotation[0 if image.name in turned else 1]) for image in model.images]
        world = turn_to_z(np.mean(ups, axis=0))
        oriented = {"orientation_override": "none"}
    for image in model.images:
        right, down, forward = np.array(image.rotation) @ world.T
        pose = np.eye(4)
        pose[:3] = np.stack([right, -down, -forward, world @ np.array(image.center)], axis=1)
        intrinsics = {"fl_x": image.focal, "fl_y": image.focal, "k1": image.distortion}
        intrinsics |= dict(zip(("cx", "cy", "w", "h"), (*image.principal, *image.size)))
        frames.append({"file_path": f"images/{image.name}", "transform_matrix": pose.tolist(), **intrinsics})
    return frames, oriented


def turn_to_z(up: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """The smallest rotation that brings a direction to z."""
    x, y, z = up / np.linalg.norm(up)
    if z < -1.0 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    cross = np.array([[0.0, 0.0, -x], [0.0, 0.0, -y], [x, y, 0.0]])  # of up x z
    return np.eye(3) + cross + cross @ cross / (1.0 + z)


def holds_something(folder: Path) -> bool:
    """Whether a capture cannot be written there: it is no folder, or one with more than hidden files."""
    return folder.exists() and (not folder.is_dir() or any(p.name[0] != "." for p in folder.iterdir()))


def was_made_of(capture: Path, data: Path) -> bool:
    """Whether a folder is a whole capture that `find_poses` wrote of just these photographs.

    They are told by names and contents; copies among them do not count. Captures of versions that did not keep those,
    or that placed copies, count as made of others.
    """
    content = content_made_here(capture)
    if content is None:
        return False
    try:
        sources, _ = without_copies(list_images(data, PHOTOGRAPH_SUFFIXES))
        if {p.stem for p in list_images(capture / "images")} != {p.stem for p in sources}:
            return False
        return content.get("made_of") == fingerprints(sources)
    except (InputError, OSError):
        return False


def main(args: list[str] | None = None) -> None:
    """Entry point. Mistakes in what the user gives end with a message and exit status 2, without a traceback."""
    import tyro

    with ends_plainly():
        tyro.cli(PosesConfig, args=args, prog="diffusionerf-poses").main()


if __name__ == "__main__":
    main()
