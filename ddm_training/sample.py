"""`ddm sample`: unconditional samples of a prior, as a sheet of colour and depth."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ddm_training import rgbd
from ddm_training.errors import InputError, require_at_least
from ddm_training.files import make_folder, writing
from ddm_training.loop_config import check_seed

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

SamplerName = Literal["ddim", "ddpm"]


@torch.no_grad()
def draw_samples(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: "DDPMScheduler",
    noise: Float[Tensor, "n 4 h w"],
    *,
    sampler: SamplerName = "ddpm",
    steps: int = 100,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n 4 h w"]:
    """Patches drawn from a prior, starting from unit noise.

    Args:
        denoise: (x_t, t [n]) -> noise.
        scheduler: noise schedule of the prior.
        noise: start, standard normal.
        sampler: "ddpm" (ancestral: the noise added on the way corrects earlier errors, which small networks need) or
            "ddim" (deterministic).
        steps: number of network evaluations; see `check_steps`.
        generator: source of the noise that DDPM adds.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    kind: Any = DDIMScheduler if sampler == "ddim" else DDPMScheduler
    stepper = kind.from_config(scheduler.config, timestep_spacing="trailing", prediction_type="epsilon")
    stepper.set_timesteps(steps)
    x = noise
    for t in stepper.timesteps:
        predicted = denoise(x, t.to(x.device).expand(len(x)))
        x = stepper.step(predicted, int(t), x, generator=generator).prev_sample
    return x


def sample_prior(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: "DDPMScheduler",
    patch_size: int,
    count: int,
    *,
    device: torch.device,
    seed: int,
    batch_size: int,
    steps: int,
    sampler: SamplerName = "ddpm",
) -> Float[Tensor, "n 4 h w"]:
    """``count`` patches of a prior, on the CPU, drawn ``batch_size`` at a time, see `draw_samples`.

    Noise is drawn on the CPU, so that all devices begin with the same.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 4, patch_size, patch_size, generator=generator)
    batches = [
        draw_samples(
            denoise,
            scheduler,
            part.to(device),
            sampler=sampler,
            steps=steps,
            generator=torch.Generator(device).manual_seed(seed + index),
        ).cpu()
        for index, part in enumerate(noise.split(batch_size))
    ]
    return torch.cat(batches)


def check_steps(steps: int, scheduler: "DDPMScheduler", sampler: SamplerName = "ddpm") -> None:
    """Refuse more steps of sampling than the noise schedule has, and those of DDIM that do not divide it evenly.

    diffusers' DDIM takes each step over ``timesteps // steps``, however far apart the timesteps are.

    Raises:
        InputError: names the flag.
    """
    if steps > (most := len(scheduler.alphas_cumprod)):
        raise InputError(f"--num-inference-steps must be at most {most}, the timesteps of the prior, found {steps}.")
    if sampler == "ddim" and most % steps:
        fewer = next(n for n in range(steps, 0, -1) if most % n == 0)
        raise InputError(
            f"--num-inference-steps must divide {most}, the timesteps of the prior, with --sampler ddim, found "
            f"{steps}: give {fewer}, or --sampler ddpm."
        )


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """CUDA where there is one, unless told otherwise.

    Raises:
        InputError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was asked for, but torch finds no CUDA device here.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw unconditional samples from a prior and write them as a sheet of colour and depth."""

    prior: Path
    """Prior folder, e.g. the `prior` folder of a training run."""
    output: Path = Path("samples.png")
    """Picture to write."""
    num_samples: int = 32
    """Number of patches."""
    sampler: SamplerName = "ddpm"
    """DDPM (ancestral) or DDIM (deterministic)."""
    num_inference_steps: int = 100
    """Network evaluations per patch; with DDIM a divisor of the prior's timesteps, of which there are 1,000."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 32
    """Patches at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        require_at_least(self, num_samples=1, num_inference_steps=1, batch_size=1)
        check_seed(self.seed)

    def main(self) -> None:
        """Load, draw, write."""
        from ddm_training.sheets import patch_sheet, save_picture
        from ddm_training.unet import load_scheduler, load_unet

        make_folder(self.output.parent, "--output: folder")
        spec = rgbd.RgbdSpec.load(self.prior)
        device = choose_device(self.device)
        scheduler = load_scheduler(self.prior)
        check_steps(self.num_inference_steps, scheduler, self.sampler)
        network = load_unet(self.prior).to(device)
        samples = sample_prior(
            network,
            scheduler,
            spec.patch_size,
            self.num_samples,
            device=device,
            seed=self.seed,
            batch_size=self.batch_size,
            steps=self.num_inference_steps,
            sampler=self.sampler,
        )
        with writing(self.output, "Make room, or give another --output."):
            save_picture(self.output, patch_sheet(samples, near=spec.near))
        print(f"{self.num_samples} samples of {self.prior} -> {self.output}")
