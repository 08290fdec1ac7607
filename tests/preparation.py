"""A small Hypersim tree, how it is prepared into the store beside it, and what is said of that."""

import json
from pathlib import Path

import pytest
from hypersim_tree import write_tree

from ddm_training.hypersim import frame_files
from ddm_training.prepare import HypersimPrepareConfig

SCENES = {"ai_001_001": "train", "ai_001_002": "train", "ai_002_001": "val"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "raw", SCENES)


def config(tree: Path, **changes) -> HypersimPrepareConfig:
    options = {"data": tree, "output": tree.parent / "store", "width": 16, "height": 12} | changes
    return HypersimPrepareConfig(**options)


def report(tree: Path) -> dict:
    return json.loads((tree.parent / "store" / "report.json").read_text())


def files(tree: Path, frame: int = 0, scene: str = "ai_001_001") -> dict[str, Path]:
    return frame_files(tree / scene / "images", "cam_00", frame, "hdr")


def forget_what_was_asked(store: Path) -> None:
    """Make the scenes those of a version that did not keep it."""
    for path in store.glob("*/scene.json"):
        info = json.loads(path.read_text())
        del info["asked"]
        path.write_text(json.dumps(info))
