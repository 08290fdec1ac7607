"""A capture of small images of noise with a `transforms.json`, written and parsed."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from diffusionerf_ns.dataparsers.few_view import FewViewDataParserConfig


def make_capture(folder: Path, count: int = 10, depth: bool = False, mask: bool = False, **meta) -> dict:
    """A folder with ``count`` 40 x 30 images and cameras in a row; returns the JSON, which is also written."""
    rng = np.random.default_rng(0)
    frames = []
    for kind in ("images", "depths", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for i in reversed(range(count)):  # the file need not be sorted
        name = f"f{i:02d}.png"
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / "images" / name)
        pose = np.eye(4)
        pose[:3, 3] = 0.3 * i, 0.1 * (i % 3), 1.0
        frame = {"file_path": f"./images/{name}", "transform_matrix": pose.tolist()}
        if depth:
            Image.fromarray(np.full((30, 40), 1000 + 100 * i, dtype=np.uint16)).save(folder / "depths" / name)
            frame["depth_file_path"] = f"depths/{name}"
        if mask:
            Image.fromarray(np.repeat(np.uint8([[0, 255]]), 30, axis=0).repeat(20, axis=1)).save(
                folder / "masks" / name
            )
            frame["mask_path"] = f"masks/{name}"
        frames.append(frame)
    content = {"w": 40, "h": 30, "fl_x": 36.0, "fl_y": 37.0, "cx": 19.0, "cy": 15.5, "frames": frames, **meta}
    return write(folder, content)


def write(folder: Path, content: dict) -> dict:
    (folder / "transforms.json").write_text(json.dumps(content))
    return content


def parse(data: Path, split: str = "train", **flags):
    return FewViewDataParserConfig(data=data, **flags).setup().get_dataparser_outputs(split)


def names(outputs) -> list[str]:
    return [p.stem for p in outputs.image_filenames]
