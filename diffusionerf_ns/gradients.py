"""Losses and gradients that are not finite, and gradients too small for float16."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddm_training.errors import InputError


class NonFiniteLossError(InputError):
    """A loss term became NaN or infinite; names the step and the term."""


def check_finite(losses: Mapping[str, Tensor], step: int) -> None:
    """Raise `NonFiniteLossError` where a term is NaN or infinite; one synchronisation with the device for all terms."""
    if not bool(torch.stack([v.detach().reshape(()) for v in losses.values()]).isfinite().all()):
        bad = {name: float(v.detach()) for name, v in losses.items() if not bool(v.isfinite())}
        raise NonFiniteLossError(
            f"training stopped at step {step}: {', '.join(f'{k} is {v}' for k, v in bad.items())}. The last checkpoint "
            "is untouched. Lower the learning rate or that term's weight, then resume with --load-dir."
        )


def scale_small_gradients(trainer: Any) -> None:
    """Have nerfstudio's trainer scale the loss, as its own presets do: for tinycudann.

    Its backward pass is in float16 whatever the precision of the training. Without a scale most entries of a hash
    table's gradient are lost there, and all that the score says of colours: a pixel's share of it is 7e-9, float16
    ends at 6e-8. Called after a checkpoint was loaded: one of a training without a scale has none to give, and one of
    a training with it finds it again within a few skipped steps.

    Args:
        trainer: nerfstudio's.
    """
    if any(steps > 1 for steps in trainer.gradient_accumulation_steps.values()):
        warnings.warn(
            "gradients are accumulated over steps, with which nerfstudio cannot scale the loss: tinycudann loses small "
            "ones. Leave --gradient-accumulation-steps out, or set --pipeline.model.implementation torch.",
            stacklevel=2,
        )
        return
    trainer.grad_scaler = torch.amp.GradScaler(torch.device(trainer.device).type)


def check_gradients(grad_scaler: torch.amp.GradScaler, step: int) -> None:
    """After a step: a scale that falls and falls means gradients that no scale makes finite.

    Each such step is left out, without which the weights would be NaN and the next loss would tell.

    Raises:
        NonFiniteLossError: the scale is below 1.
    """
    if grad_scaler.is_enabled() and grad_scaler.get_scale() < 1.0:
        raise NonFiniteLossError(
            f"training stopped at step {step}: gradients have been NaN or infinite for many steps, whatever the scale "
            "of the loss. The last checkpoint holds what was learnt before. Lower the learning rate, or set "
            "--pipeline.model.implementation torch."
        )
