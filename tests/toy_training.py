"""A small store of frames and the settings of short trainings on it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddm_training.frames import SceneWriter
from ddm_training.train import TrainConfig


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"), "toy")


def make_store(root: Path, source: str) -> Path:
    rng = np.random.default_rng(0)
    for name, split in (("a", "train"), ("b", "val")):
        writer = SceneWriter(root, name, split=split, source=source, max_frames=3, height=40, width=48)
        for index in range(3):
            depth = rng.uniform(1, 4, (40, 48)).astype(np.float32)
            color = rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)
            mask = rng.random((40, 48)) > 0.05
            writer.add(color, depth, mask, intrinsics=(150.0, 150.0, 24.0, 20.0), name=f"{index}")
        writer.close()
    return root


SMALL = {
    "preset": "prototype",
    "patch_size": 16,
    "train_batch_size": 2,
    "max_train_steps": 6,
    "checkpointing_steps": 2,
    "validation_steps": 100,
    "validation_patches": 4,
    "num_validation_samples": 0,
    "logging_steps": 2,
    "dataloader_num_workers": 0,
    "mixed_precision": "no",
    "device": "cpu",
}


def config(store: Path, output: Path, **changed) -> TrainConfig:
    return TrainConfig(**{"data": (store,), "output_dir": output, **SMALL, **changed})


def flags(store: Path, output: Path, **changed) -> list[str]:
    """Words of the command line `ddm train` for `config` of the same settings."""
    words = ["train", "--data", str(store), "--output-dir", str(output)]
    for key, value in {**SMALL, **changed}.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def state(folder: Path, step: int) -> dict:
    return torch.load(folder / f"checkpoint-{step}" / "state.pt", weights_only=True)


def assert_same_weights(first: dict, second: dict) -> None:
    for part in ("model", "ema"):
        assert first[part].keys() == second[part].keys()
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), key
