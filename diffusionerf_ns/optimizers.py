"""Optimiser and learning-rate schedule configs that nerfstudio lacks, and schedules that follow the length of a run."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from nerfstudio.engine.optimizers import OptimizerConfig, Optimizers
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch.optim.lr_scheduler import LambdaLR

from ddm_training.errors import InputError


@dataclass
class FusedAdamConfig(OptimizerConfig):
    """Adam with one fused kernel: nine times faster than the plain one on a hash grid on the CPU, as fast on CUDA."""

    _target: type = torch.optim.Adam
    lr: float = 1e-2
    eps: float = 1e-15
    weight_decay: float = 0.0
    fused: bool = True


@dataclass
class ExponentialDecayConfig(SchedulerConfig):
    """Linear warm-up, then exponential decay, with plain Python floats.

    nerfstudio's own schedules leave `numpy.float64` values in the optimiser state, which `torch.load` refuses on
    torch >= 2.6: its runs can then not be resumed, rendered or evaluated.
    """

    _target: type = field(default_factory=lambda: ExponentialDecay)
    lr_final: float = 1e-3
    """Learning rate at ``max_steps``."""
    warmup_steps: int | None = None
    """Steps of linear warm-up: step i of n has (i + 1) / (n + 1) of the full rate. None: 1 % of ``max_steps``."""
    max_steps: int | None = None
    """Step at which ``lr_final`` is reached; it stays there. None: the end of the run (``--max-num-iterations``)."""

    def corners(self, run_steps: int) -> tuple[int, int]:
        """The steps at which the warm-up ends and ``lr_final`` is reached, in a run of ``run_steps`` steps."""
        end = run_steps if self.max_steps is None else self.max_steps
        return round(0.01 * end) if self.warmup_steps is None else self.warmup_steps, end

    def multiplier(self, lr_init: float, run_steps: int) -> Callable[[int], float]:
        """Step -> factor of ``lr_init``, a Python float, in a run of ``run_steps`` steps."""
        warmup, end = self.corners(run_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            t = min(max((step - warmup) / max(end - warmup, 1), 0.0), 1.0)
            return math.exp(t * math.log(self.lr_final / lr_init))

        return factor


class ExponentialDecay(Scheduler):
    """See `ExponentialDecayConfig`."""

    config: ExponentialDecayConfig

    def get_scheduler(self, optimizer: torch.optim.Optimizer, lr_init: float) -> LambdaLR:
        """LambdaLR; without ``max_steps``, `follow_run` has to tell it the run's length before its first step.

        Raises:
            InputError: ``lr_final`` is not positive, which no exponential decay reaches.
        """
        config = self.config
        if not config.lr_final > 0.0:
            raise InputError(f"scheduler.lr-final must be positive, found {config.lr_final}: the decay is exponential.")
        if config.max_steps is None:
            return LambdaLR(optimizer, _of_unknown_length)
        return LambdaLR(optimizer, config.multiplier(lr_init, config.max_steps))


def _of_unknown_length(step: int) -> float:
    """1, and a warning where this is not only until the run's length is known."""
    if step > 0:
        warnings.warn(
            "The learning rate stays as it is: its schedule was not told the run's length, as DiffusioNeRFPipeline "
            "does. Give --optimizers.NAME.scheduler.max-steps.",
            stacklevel=2,
        )
    return 1.0


def follow_run(optimizers: Optimizers, steps: int) -> None:
    """Let the schedules without ``max_steps`` end with a run that has ``steps`` steps to go, in place.

    To be called when a checkpoint, if any, is loaded: the rate is that of the whole run from the next step on, however
    long the run that was interrupted was to be.
    """
    for name, scheduler in optimizers.schedulers.items():
        group = optimizers.config[name]
        config = group["scheduler"]
        if isinstance(config, ExponentialDecayConfig) and config.max_steps is None:
            multiplier = config.multiplier(scheduler.base_lrs[0], scheduler.last_epoch + steps)
            scheduler.lr_lambdas = [multiplier] * len(scheduler.base_lrs)
            for parameters, lr in zip(optimizers.optimizers[name].param_groups, scheduler.base_lrs):
                parameters["lr"] = lr * multiplier(scheduler.last_epoch)
