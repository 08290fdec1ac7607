"""Writing captures as nerfstudio reads them: `transforms.json`, `images` and, where it is known, `depth`.

Poses are camera-to-world in OpenGL axes (right, up, backward), metres where there is depth. Depth files are 16-bit PNG
in millimetres of planar z (nerfstudio's default unit), 0 where there is none. Intrinsics count the centre of the first
pixel as (0.5, 0.5).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8, UInt16
from PIL import Image

from ddm_training.files import write_whole

FILE = "transforms.json"
MADE_BY = {"made_by": "diffusionerf-poses"}  # in captures of photographs whose poses were searched for
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")  # in the order of nerfstudio's cameras
MAX_MILLIMETRES = 65_535  # that 16 bits hold
CaptureView = tuple[
    str,
    str,
    UInt8[np.ndarray, "h w 3"],
    Float[np.ndarray, "h w"],
    Float[np.ndarray, "4 4"],
]
"""What a view is for ("train" or "test"), its name, colours, planar depth in metres (0 or not finite where none is),
and pose."""


def depth_millimetres(z: Float[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    """Metres to whole millimetres, rounded in the precision of ``z``; 0 of what is not finite, or beyond 65.535 m."""
    rounded = np.rint(1000.0 * z)
    return np.where((rounded > 0) & (rounded <= MAX_MILLIMETRES), rounded, 0).astype(np.uint16)


def write_transforms(folder: Path, frames: Sequence[dict[str, Any]], more: dict[str, Any]) -> None:
    """Write or replace a capture's `transforms.json`, whole or not at all.

    Args:
        folder: of the capture; made when absent.
        frames: as nerfstudio reads them.
        more: further entries, which come before the frames.

    Raises:
        OSError: it cannot be written.
    """
    content = {"camera_model": "OPENCV", **more, "frames": frames}
    write_whole(folder / FILE, json.dumps(content, indent=2) + "\n")


def content_made_here(capture: Path) -> dict[str, Any] | None:
    """Of a capture's `transforms.json`; None where it cannot be read, or `diffusionerf-poses` did not write it."""
    try:
        content = json.loads((capture / FILE).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and MADE_BY.items() <= content.items() else None


def is_made_here(capture: Path) -> bool:
    """Whether a folder is a capture that `diffusionerf-poses` wrote, of whatever photographs."""
    return content_made_here(capture) is not None


def write_views(
    folder: Path,
    views: Iterable[CaptureView],
    intrinsics: tuple[float, float, float, float],
    size: tuple[int, int],
    more: dict[str, Any],
) -> int:
    """Write views with true depth, one at a time, and last of all `transforms.json`; returns their number.

    Args:
        folder: of the capture.
        views: all with one camera's intrinsics.
        intrinsics: fx, fy, cx, cy in pixels.
        size: width and height in pixels.
        more: further entries of `transforms.json`.
    """
    for sub in ("images", "depth"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    frames: list[dict[str, Any]] = []
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for kind, name, color, depth, pose in views:
        file = f"{kind}_{name}.png"
        Image.fromarray(color).save(folder / "images" / file)
        Image.fromarray(depth_millimetres(depth)).save(folder / "depth" / file)
        frames.append(
            {
                "file_path": f"images/{file}",
                "depth_file_path": f"depth/{file}",
                "transform_matrix": pose.tolist(),
            }
        )
        lists[kind].append(f"images/{file}")
    common = {
        **dict(zip(("fl_x", "fl_y", "cx", "cy"), intrinsics)),
        **dict(zip(("w", "h"), size)),
        **more,
        "train_filenames": lists["train"],
        "val_filenames": lists["test"],
        "test_filenames": lists["test"],
    }
    write_transforms(folder, frames, common)
    return len(frames)
