"""nerfstudio's trainer in this process: a restart changes no bit, a loss that is not finite stops it."""

import copy
import math
import random
from pathlib import Path
from typing import Any

import box_room
import numpy as np
import pytest
import torch
import train_commands
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import Trainer, TrainerConfig

from diffusionerf_ns import regularizers
from diffusionerf_ns.gradients import NonFiniteLossError

folder, capture, prior = train_commands.folder, train_commands.capture, train_commands.prior  # fixtures


def make_trainer(folder: Path, capture: Path, prior: Path, steps: int, load: Path | None = None) -> Trainer:
    """A trainer in this process, set up but not started."""
    config: TrainerConfig = copy.deepcopy(all_methods["diffusionerf-tiny"])
    config.output_dir, config.data, config.timestamp = folder, capture, "run"
    config.max_num_iterations, config.steps_per_save, config.save_only_latest_checkpoint = steps, 2, False
    config.vis, config.load_dir = "tensorboard", load
    config.logging.local_writer.enable = False
    config.pipeline.datamanager.data = capture
    config.pipeline.datamanager.train_num_rays_per_batch = 128
    config.pipeline.model.prior, config.pipeline.model.patch_size = str(prior), None
    config.machine.device_type = "cpu"
    config.set_timestamp()
    torch.manual_seed(0)
    random.seed(0)  # the order in which nerfstudio keeps the images
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


# Resuming


def seed_every_step(monkeypatch) -> None:
    """nerfstudio does not save the state of the random numbers: let each step begin with its own seed."""
    plain = Trainer.train_iteration

    def seeded(self: Trainer, step: int) -> Any:
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)  # noqa: NPY002 - nerfstudio's samplers draw from the global state
        return plain(self, step)

    monkeypatch.setattr(Trainer, "train_iteration", seeded)


def flat(state: object, path: str = "") -> dict[str, object]:
    """A nested state as one dictionary."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for name, value in items for k, v in flat(value, f"{path}/{name}").items()}
    return {path: state}


def test_n_steps_are_k_steps_a_restart_and_the_rest_to_the_bit(tmp_path, capture, prior, monkeypatch):
    seed_every_step(monkeypatch)
    box_room.remember_stereo(monkeypatch)
    n, k = 6, 3
    make_trainer(tmp_path / "whole", capture, prior, n).train()
    # Stopped as a user stops it, after a checkpoint; it was meant to have n steps.
    first = make_trainer(tmp_path / "first", capture, prior, n)
    plain = first.train_iteration

    def interrupted(step: int) -> Any:
        if step == k:
            raise KeyboardInterrupt
        return plain(step)

    first.train_iteration = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    models = first.checkpoint_dir
    assert [p.name for p in models.iterdir()] == [f"step-{k - 1:09d}.ckpt"]
    second = make_trainer(tmp_path / "second", capture, prior, n - k, load=models)
    assert second.pipeline.model.total_steps == n
    second.train()
    whole, resumed = (
        flat(torch.load(p, weights_only=True))
        for p in (
            next((tmp_path / "whole").rglob("step-000000005.ckpt")),
            next((tmp_path / "second").rglob("step-000000005.ckpt")),
        )
    )
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        equal = torch.equal(value, resumed[name]) if isinstance(value, torch.Tensor) else value == resumed[name]
        assert equal, name


# A loss that is not finite


def test_a_loss_that_is_not_finite_stops_training_and_leaves_the_last_checkpoint(tmp_path, capture, prior, monkeypatch):
    trainer = make_trainer(tmp_path, capture, prior, 10)
    plain = regularizers.foreground
    broken = lambda *given: plain(*given) * (math.nan if trainer.step == 3 else 1.0)  # noqa: E731
    monkeypatch.setattr(regularizers, "foreground", broken)
    with pytest.raises(NonFiniteLossError, match="stopped at step 3: foreground_loss is nan"):
        trainer.train()
    assert sorted(p.name for p in trainer.checkpoint_dir.iterdir()) == ["step-000000002.ckpt"]
    saved = torch.load(trainer.checkpoint_dir / "step-000000002.ckpt", weights_only=True)["pipeline"]
    assert all(bool(v.isfinite().all()) for v in saved.values())
    for name, value in trainer.pipeline.named_parameters():
        assert torch.equal(value, saved[name]), f"{name}: the step that failed has not reached the weights"
