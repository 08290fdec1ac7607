"""Writing a few-view capture with true depth as nerfstudio reads it: `transforms.json`, `images` and `depth`.

Poses are camera-to-world in OpenGL axes (right, up, backward), metres. Depth files are 16-bit PNG in millimetres of
planar z (nerfstudio's default unit), 0 where there is none. Intrinsics count the centre of the first pixel as
(0.5, 0.5).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

FILE = "transforms.json"
CaptureView = tuple[
    str,
    str,
    UInt8[np.ndarray, "h w 3"],
    Float[np.ndarray, "h w"],
    Float[np.ndarray, "4 4"],
]
"""What a view is for ("train" or "test"), its name, colours, planar depth in metres (0 or not finite where none is),
and pose."""


def write_views(
    folder: Path,
    views: Iterable[CaptureView],
    intrinsics: tuple[float, float, float, float],
    size: tuple[int, int],
    more: dict[str, Any],
) -> int:
    """Write the views, one at a time, and last of all `transforms.json`; returns their number.

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
        millimetres = np.rint(np.where(np.isfinite(depth), 1000.0 * depth, 0.0)).clip(0, 65535).astype(np.uint16)
        Image.fromarray(millimetres).save(folder / "depth" / file)
        frames.append(
            {
                "file_path": f"images/{file}",
                "depth_file_path": f"depth/{file}",
                "transform_matrix": pose.tolist(),
            }
        )
        lists[kind].append(f"images/{file}")
    content = {
        "camera_model": "OPENCV",
        **dict(zip(("fl_x", "fl_y", "cx", "cy"), intrinsics)),
        **dict(zip(("w", "h"), size)),
        **more,
        "train_filenames": lists["train"],
        "val_filenames": lists["test"],
        "test_filenames": lists["test"],
        "frames": frames,
    }
    part = folder / f"{FILE}.part"
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.rename(folder / FILE)
    return len(frames)
