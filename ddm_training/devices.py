"""The devices of a training, as accelerate finds them."""

import os
from typing import Any

import torch

from ddm_training.errors import InputError
from ddm_training.loop_config import LoopConfig

_SPREADING = {  # variables by which accelerate's launcher asks for it
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism of its own",
}


def make_accelerator(config: LoopConfig) -> Any:
    """The devices that the training was started on.

    The loop has its own mixed precision, see `task.Task.wrap`, and one optimiser step a batch: what a saved
    configuration of accelerate says of these must not change a training behind its flags.

    Raises:
        InputError: that configuration asks for gradient accumulation, or to spread the weights over devices.
    """
    from accelerate import Accelerator

    for name, what in _SPREADING.items():
        if os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on"):
            raise InputError(
                f"accelerate is configured for {what} ({name}), this training knows one device, or several with all "
                "weights on each: choose that in its configuration (accelerate config), or unset the variable."
            )
    if (count := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        raise InputError(
            f"accelerate is configured for {count} gradient accumulation steps, this training makes 1: set that in its "
            "configuration or by accelerate launch --gradient_accumulation_steps 1, and raise --train-batch-size."
        )
    accelerator = Accelerator(cpu=config.device == "cpu" or not torch.cuda.is_available(), mixed_precision="no")
    if (kind := accelerator.distributed_type.value) not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InputError(
            f"accelerate is configured for {kind}, this training knows NO, MULTI_CPU and MULTI_GPU: choose one of "
            "those in its configuration (accelerate config)."
        )
    return accelerator


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 is there but slow: on NVIDIA GPUs before Ampere, and on CPUs that do not say that they have it.

    On a CPU with AVX2 alone a step of the denoiser takes 13 times as long, one of the completing network 19 times.
    """
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
