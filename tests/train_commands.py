"""Command lines of `ns-train` for a small capture, what they leave, and what runs them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import box_room
import pytest
from commands import Commands

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def commands(folder) -> Iterator[Commands]:
    server = Commands(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def capture(folder) -> Path:
    """transforms.json with true depth; train 0 2 4 5, test 1 3."""
    return box_room.write_transforms(folder / "box")


@pytest.fixture(scope="module")
def llff(folder) -> Path:
    return box_room.write_llff(folder / "llff")


@pytest.fixture(scope="module")
def prior(folder) -> Path:
    return box_room.write_prior(folder / "prior")


def train_arguments(
    data: Path, prior: Path, name: str, *flags: object, method: str = "diffusionerf-tiny", parser: tuple = ()
) -> list[object]:
    """``ns-train`` for few rays and `STEPS` steps, with a checkpoint in the middle; ``flags`` win."""
    # fmt: off
    return [
        "ns-train", method, "--data", data, "--output-dir", "out", "--experiment-name", "box", "--timestamp", name,
        "--vis", "tensorboard", "--max-num-iterations", STEPS, "--steps-per-save", 2,
        "--save-only-latest-checkpoint", "False", "--logging.local-writer.enable", "False",
        "--pipeline.datamanager.train-num-rays-per-batch", 128, "--pipeline.datamanager.stereo-rays-per-batch", 16,
        "--pipeline.model.prior", prior, "--pipeline.model.patch-size", "None",
        "--pipeline.model.score-weight", 1, "--pipeline.model.metric-scale-warmup", 0.0,
        *flags, *(parser or ("few-view-data", "--num-views", 3)),
    ]
    # fmt: on


def run_folder(folder: Path, name: str, method: str = "diffusionerf-tiny") -> Path:
    return folder / "out" / "box" / method / name


def digest(root: Path) -> dict[str, str]:
    """What every file below a folder holds."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
