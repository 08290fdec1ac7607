"""What is minimised and how fast: loss, learning rate, moving average of the weights.

Notation
    n          optimiser step, counted from 0
    y          noise that was added, or velocity       [b, 4, h, w]
    y_hat      what the network predicts               [b, 4, h, w]
    m          1 where depth is valid, else 0          [b, h, w]
    w_d        weight of the depth channel
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

LossType = Literal["l1", "l2"]


def learning_rate(step: int, *, peak: float, warmup: int, total: int | None) -> float:
    """peak min(1, (n + 1) / warmup), times (1 + cos(pi n / total)) / 2 unless ``total`` is None."""
    rate = peak * min(1.0, (step + 1) / max(warmup, 1))
    return rate if total is None else rate * 0.5 * (1 + math.cos(math.pi * step / total))


def masked_loss(
    predicted: Float[Tensor, "b 4 h w"],
    target: Float[Tensor, "b 4 h w"],
    mask: Bool[Tensor, "b h w"],
    *,
    kind: LossType,
    depth_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """mean over pixels of (sum_rgb l(y_hat - y) + w_d m l(y_hat_d - y_d)) / (3 + w_d), l = |.| or (.)^2.

    The divisor does not depend on the mask, so that the mean over processes is the loss of their joint batch.
    """
    difference = predicted - target
    error = difference.abs() if kind == "l1" else difference.square()
    color = error[:, :3].sum(dim=1)
    depth = error[:, 3] * mask
    return (color + depth_weight * depth).mean() / (3.0 + depth_weight)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, step: int, decay: float) -> None:
    """average <- average + (1 - a) (weights - average) with a = min(decay, (1 + n) / (10 + n))."""
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(network.parameters()), step)
