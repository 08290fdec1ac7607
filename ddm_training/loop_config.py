"""Settings that every training has, whatever is trained."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ddm_training.errors import InputError, require_at_least, require_some


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings that every training has."""

    data: tuple[Path, ...]
    """Frame stores, as `ddm rooms`, `ddm frames` and `ddm hypersim prepare` write them."""
    data_weights: tuple[float, ...] | None = None
    """Share of samples from each store, 0 to validate on it alone; by default every frame is equally likely."""
    output_dir: Path
    """Checkpoints, log.jsonl, TensorBoard, and what is exported go here."""

    pretrained: Path | None = None
    """Begin with the weights of this prior folder (fine-tuning), in place of random ones. The network must be the
    same, and where the training goes on they are not read again."""
    train_batch_size: int = 32
    """Samples per step and process."""
    max_train_steps: int = 20_000
    """Optimiser steps in all. May be raised to train a finished run further."""
    max_train_minutes: float | None = None
    """Stop with a checkpoint after this time; the same command goes on."""
    learning_rate: float = 5e-4
    """Peak learning rate; 1e-4 in the authors' code; the paper takes 650,000 steps of as large a batch."""
    lr_scheduler: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine to zero at the last step, or constant."""
    lr_warmup_steps: int = 200
    """Steps of linear warm-up."""
    adam_beta1: float = 0.9
    """AdamW."""
    adam_beta2: float = 0.99
    """AdamW; .99 in the authors' code."""
    adam_weight_decay: float = 0.0
    """AdamW; none in the authors' code."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 for no clipping."""
    ema_decay: float = 0.999
    """Decay per step of the weights' moving average, reached by (1 + n) / (10 + n)."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision inside the network; noise, target and data are always fp32. Devices that would emulate bf16 (most CPUs,
    and NVIDIA's GPUs before Ampere) use no."""
    torch_compile: bool = False
    """Compile the network (a minute at the start)."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes CUDA where there is one."""
    dataloader_num_workers: int = 1
    """Processes that prepare samples; 0 prepares them in the loop. The samples do not depend on it."""
    seed: int = 0
    """Seed of weights, samples and noise."""

    checkpointing_steps: int = 1000
    """Steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """Checkpoints kept; an old one goes only when the new one is whole."""
    resume_from_checkpoint: str = "latest"
    """latest (also right for a first run), none, or a checkpoint's name or path, to go back to it once: later ones are
    set aside. To continue after a stop, run the command without this flag."""
    validation_steps: int = 1000
    """Steps between validations, each of which renews what is exported."""
    logging_steps: int = 50
    """Steps between lines of log.jsonl."""
    export_dtype: Literal["fp16", "fp32"] = "fp16"
    """Precision of the exported weights."""
    license: str = "unknown"
    """Licence of the weights, written to the model card."""

    def __post_init__(self) -> None:
        require_at_least(self, train_batch_size=1, max_train_steps=1, checkpointing_steps=1, checkpoints_total_limit=1,
                         validation_steps=1, logging_steps=1, lr_warmup_steps=0, dataloader_num_workers=0)  # fmt: skip
        check_seed(self.seed)
        require_some(self, "data")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"--ema-decay must lie in [0, 1), found {self.ema_decay}.")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"--learning-rate must be positive, found {self.learning_rate}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must lie in [0, 1), found {getattr(self, name)}.")
        self.require_amounts("adam_weight_decay", "max_grad_norm")
        if self.max_train_minutes is not None:
            self.require_amounts("max_train_minutes")

    def require_amounts(self, *names: str) -> None:
        """Refuse settings that are negative, infinite or not a number.

        Raises:
            InputError: names the flag.
        """
        for name in names:
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be a number >= 0, found {getattr(self, name)}.")


def check_seed(seed: int) -> None:
    """Refuse a seed that NumPy or PyTorch does not take.

    Raises:
        InputError: it is negative, or has more than 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must be at least 0 and less than 2^63, found {seed}.")


def settings(config: LoopConfig) -> dict[str, Any]:
    """The config as plain JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))
