"""Poses that `diffusionerf-poses` finds from a few photographs, against those that their capture has.

python scripts/pose_errors.py CAPTURE ... [--views 3 6 9]      writes docs/figures/poses.md

A capture's poses were found with all its images (LLFF) or are the calibration of a robot (DTU). Each search is run
twice: without a focal length, and with the capture's in whole millimetres, as EXIF would have it.
"""

import argparse
import contextlib
import io
import math
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from ddm_training.files import write_whole
from ddm_training.transforms import FILE
from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig
from diffusionerf_ns.dataparsers.transforms import read_transforms
from diffusionerf_ns.pose_search import FILM_DIAGONAL, NotPlacedError, find_poses

ROOT = Path(__file__).resolve().parents[1]


def pose_errors(
    found: Float[np.ndarray, "n 3 4"], true: Float[np.ndarray, "n 3 4"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Degrees between rotations, and distances of positions in parts of their mean distance from their centre.

    Both after the rotation that brings the rotations together best, and then the best shift and scale of the positions.
    Camera-to-world, the same axes.
    """
    rotations, true_rotations = found[:, :, :3], true[:, :, :3]
    u, _, vt = np.linalg.svd(np.einsum("nij,nkj->ik", true_rotations, rotations))
    align = u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt
    between = np.einsum("ij,njk,nlk->nil", align, rotations, true_rotations)
    degrees = np.degrees(np.arccos(np.clip((np.trace(between, axis1=1, axis2=2) - 1.0) / 2.0, -1.0, 1.0)))
    a, b = ((x - x.mean(axis=0)) for x in (found[:, :, 3] @ align.T, true[:, :, 3]))
    scale = (a * b).sum() / (a * a).sum()
    return degrees, np.linalg.norm(scale * a - b, axis=1) / np.linalg.norm(b, axis=1).mean()


def compare(capture: Path, views: int, known_focal: bool, folder: Path) -> str:
    """A row of the table for the training images of so many views."""
    with contextlib.redirect_stdout(io.StringIO()):  # the parser's table
        outputs = FewViewDataParserConfig(data=capture, num_views=views).setup().get_dataparser_outputs("train")
    for number, file in enumerate(outputs.image_filenames):
        target = folder / "photographs" / f"{number:03d}{file.suffix}"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    width, height = int(outputs.cameras.width[0]), int(outputs.cameras.height[0])
    begin = time.time()
    row = f"| {capture.name} | {width} x {height} | {len(outputs.image_filenames)} | {'yes' if known_focal else 'no'} |"
    true_focal = float(outputs.cameras.fx.mean())
    focal_35mm = round(true_focal / math.hypot(width, height) * FILM_DIAGONAL) if known_focal else None
    try:
        posed = find_poses(folder / "photographs", folder / "capture", focal_35mm=focal_35mm)
    except NotPlacedError:
        return f"{row} 0 | | | | | {time.time() - begin:.0f} |"
    seconds = time.time() - begin
    frames = read_transforms(folder / "capture" / FILE)["frames"]
    placed = [int(Path(frame["file_path"]).stem) for frame in frames]
    true = outputs.cameras.camera_to_worlds[placed].to(torch.float64).numpy()
    degrees, distances = pose_errors(np.array([frame["transform_matrix"] for frame in frames])[:, :3], true)
    focal = float(np.mean([frame["fl_x"] for frame in frames])) / true_focal
    return (
        f"{row} {len(frames)} | {posed.num_points} | {degrees.max():.2f} | {100.0 * distances.max():.1f} | "
        f"{100.0 * (focal - 1.0):+.1f} | {seconds:.0f} |"
    )


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captures", nargs="+", type=Path)
    parser.add_argument("--views", nargs="+", type=int, default=[3, 6, 9])
    given = parser.parse_args()
    lines = [
        "Poses found from the training images alone; the largest error of an image each.",
        "",
        "| capture | pixels | photographs | focal length known | placed | points | rotation, degrees "
        "| position, % of the cameras' spread | focal length, % | seconds |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for capture in given.captures:
        for count in given.views:
            for known_focal in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    lines.append(compare(capture, count, known_focal, Path(folder)))
                print(lines[-1], flush=True)
    write_whole(ROOT / "docs" / "figures" / "poses.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
