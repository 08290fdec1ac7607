"""The weights of a training, and their way into its checkpoints and back."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddm_training.errors import InputError
from ddm_training.loop_config import LoopConfig, settings
from ddm_training.task import Task


@dataclass(frozen=True)
class Weights:
    """What a training changes, and its checkpoints hold."""

    network: nn.Module
    average: nn.Module
    """Moving average of the network's weights."""
    optimizer: torch.optim.Optimizer

    def state_dict(self) -> dict[str, Any]:
        """Of all three."""
        return {
            "model": self.network.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of all three; the optimiser's settings become the saved ones.

        Raises:
            RuntimeError, ValueError, KeyError: it is of another network.
        """
        self.network.load_state_dict(state["model"])
        self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])


def adam_settings(config: LoopConfig) -> dict[str, Any]:
    """Those of AdamW that a resumed training takes from its flags."""
    return {"betas": (config.adam_beta1, config.adam_beta2), "weight_decay": config.adam_weight_decay}


def make_weights(config: LoopConfig, task: Task, device: torch.device) -> Weights:
    """Freshly initialised ones, by the seed."""
    torch.manual_seed(config.seed)
    network = task.make_network().to(device)
    average = copy.deepcopy(network).requires_grad_(False)
    adam = adam_settings(config)
    return Weights(
        network, average, torch.optim.AdamW(network.parameters(), lr=config.learning_rate, **adam, fused=True)
    )


def saved_settings(config: LoopConfig, task: Task) -> dict[str, Any]:
    """What a checkpoint tells of the training, plain JSON values."""
    return {"command": task.command, **settings(config)}


def resume(config: LoopConfig, task: Task, weights: Weights, *, chief: bool) -> tuple[int, list[str]]:
    """Load the checkpoint to go on from, if there is one; the chief process sets later ones aside.

    Returns:
        Its step, or 0, and what to tell of it.

    Raises:
        InputError: it does not fit, is damaged, or is not there although it was named.
    """
    from ddm_training.checkpoints import find_checkpoint, load_checkpoint, set_aside_later
    from ddm_training.progress import LOG_FILE

    found = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
    if found is None:
        return 0, []
    state, differing = load_checkpoint(found, saved_settings(config, task), task.identity)
    was, now = differing.pop("pretrained", (None, None))
    if was != now and (None in (was, now) or Path(was).resolve() != Path(now).resolve()):
        was, now = (f"--pretrained {folder}" if folder else "random weights" for folder in (was, now))
        raise InputError(f"{found} began with {was}, not with {now}: say so, or use another --output-dir.")
    try:
        weights.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        newer = [f"--{k.replace('_', '-')}" for k in task.identity if differing.get(k, (True, None))[0] is None]
        hint = f"give {', '.join(newer)}, which its settings lack, as it was made, or " if newer else ""
        raise InputError(
            f"{found} holds the weights of another network ({reason}): {hint}use another --output-dir."
        ) from error
    for group in weights.optimizer.param_groups:
        group |= adam_settings(config)
    start = int(state["step"])
    notes = [f"resuming from {found.name}"]
    notes += [f"--{k.replace('_', '-')} is {now}, was {was}" for k, (was, now) in sorted(differing.items())]
    if chief and (aside := set_aside_later(config.output_dir, start, config.output_dir / LOG_FILE)):
        notes.append(f"{', '.join(path.name for path in aside)} set aside, with the log so far: {aside[0].parent}")
    return start, notes


def save(config: LoopConfig, task: Task, weights: Weights, step: int, *, chief: bool) -> None:
    """Write the checkpoint of a step, in the chief process.

    Raises:
        InputError: weights are not finite, or the disk is full.
    """
    from ddm_training.checkpoints import save_checkpoint

    if not all(p.isfinite().all() for p in weights.network.parameters()):
        raise InputError(f"weights are not finite after step {step}: training stopped, nothing was saved.")
    if chief:
        limit = config.checkpoints_total_limit
        save_checkpoint(config.output_dir, step, weights.state_dict(), saved_settings(config, task), limit=limit)
