"""`ddm eval`: how well priors predict noise and depth on held-out frames, and whether their samples look like data."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddm_training.errors import InputError, require_at_least, require_some
from ddm_training.files import make_folder, write_whole, writing
from ddm_training.frames import Split
from ddm_training.loop_config import check_seed
from ddm_training.unet import add_noise, predict_clean, tau_to_timestep

if TYPE_CHECKING:
    from ddm_training.rgbd import RgbdSpec

DENOISING_LEVELS = (99, 49, 20, 3)
TAUS = (0.1, 0.05, 0.01)
_ADVICE = "Make room, or give another --output-dir, and run again."


@torch.no_grad()
def depth_errors(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "n 4 h w"],
    mask: Bool[Tensor, "n h w"],
    noise: Float[Tensor, "n 4 h w"],
    *,
    levels: Sequence[int],
    abar: Float[Tensor, " t"],
    batch: int = 32,
) -> dict[str, dict[str, float]]:
    """RMSE of the depth channel in its [-1, 1], before and after one step of denoising, over valid pixels.

    "noisy" is x_t / sqrt(abar_t), the patch with nothing but noise added; "clean" is the one-step estimate
    (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), not clipped.
    """
    result = {}
    for level in levels:
        squares = {"noisy": 0.0, "clean": 0.0}
        for part in torch.arange(len(x)).split(batch):
            t = torch.full((len(part),), level, device=x.device)
            x_t = add_noise(x[part], noise[part], abar[t])
            estimates = {
                "noisy": x_t / abar[level].sqrt(),
                "clean": predict_clean(x_t, denoise(x_t, t), abar[t]),
            }
            for name, estimate in estimates.items():
                difference = (estimate[:, 3] - x[part, 3]) * mask[part]
                squares[name] += difference.double().square().sum().item()
        count = max(int(mask.sum()), 1)
        rmse = {name: math.sqrt(value / count) for name, value in squares.items()}
        result[str(level)] = {**rmse, "ratio": rmse["clean"] / rmse["noisy"]}
    return result


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate prior folders on held-out frames; writes evaluation.json, evaluation.md and pictures.

    Several priors are measured on the same patches with the same noise. The `prior` folder of a running training may
    be given.
    """

    prior: tuple[Path, ...]
    """Prior folders, e.g. the `prior` folder of a training run."""
    data: tuple[Path, ...]
    """Frame stores, each measured by itself."""
    output_dir: Path
    """Where evaluation.json and the pictures go."""
    split: Split = "val"
    """Scenes to use."""
    num_patches: int = 256
    """Held-out patches per store."""
    focal: float | None = None
    """Focal length of the patches in pixels; by default the nominal one of the first prior, the scale a NeRF uses."""
    num_samples: int = 64
    """Unconditional samples for the comparison with data; 0 leaves it out."""
    num_inference_steps: int = 100
    """DDPM steps of a sample."""
    batch_size: int = 32
    """Patches at a time."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision inside the network."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is one."""
    seed: int = 0
    """Seed of patches and noise."""

    def __post_init__(self) -> None:
        require_at_least(self, num_patches=1, num_samples=0, num_inference_steps=1, batch_size=1)
        if self.focal is not None and not 0 < self.focal < math.inf:
            raise InputError(f"--focal must be positive, found {self.focal}.")
        check_seed(self.seed)
        require_some(self, "prior", "data")

    def main(self) -> None:
        """Measure, write, print the tables."""
        result = evaluate(self)
        print(tables(result))
        print(f"-> {self.output_dir}/evaluation.json")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """All measurements of `ddm eval` as plain JSON values, also written to the output folder with pictures.

    Raises:
        InputError: a folder is no prior or no store, a split is empty, the priors' patch sizes differ, or the output
            folder cannot be written to.
    """
    from ddm_training.patches import PatchConfig, Stream, open_sampler
    from ddm_training.plots import plot_denoising, plot_histograms
    from ddm_training.rgbd import RgbdSpec
    from ddm_training.sample import check_steps, choose_device
    from ddm_training.sheets import save_picture
    from ddm_training.unet import Predictor, load_scheduler, load_unet
    from ddm_training.validation import LEVELS, noise_losses

    specs = [RgbdSpec.load(folder) for folder in config.prior]
    if len({(spec.patch_size, spec.near) for spec in specs}) > 1:
        found = ", ".join(f"{p}: {s.patch_size} px, near {s.near}" for p, s in zip(config.prior, specs))
        raise InputError(f"priors of different patch sizes or encodings cannot share one evaluation: {found}.")
    make_folder(config.output_dir, "--output-dir")
    schedulers = [load_scheduler(folder) for folder in config.prior]
    for scheduler in schedulers:
        check_steps(config.num_inference_steps, scheduler)
    spec, device = specs[0], choose_device(config.device)
    focal = config.focal or spec.focal
    plain = PatchConfig(patch_size=spec.patch_size, focal_range=(focal, focal), depth_scale_jitter=1.0, augment=False)
    data = {}
    for name, root in zip(unique_names(config.data), config.data):
        batch = open_sampler([root], config.split, plain).patches(
            seed=config.seed, stream=Stream.VALIDATION, step=0, first=0, count=config.num_patches
        )
        data[name] = {key: value.to(device) for key, value in batch.items()}

    result: dict[str, Any] = {
        "split": config.split, "focal": focal, "patches": config.num_patches, "seed": config.seed, "priors": {},
    }  # fmt: skip
    names = unique_names(config.prior)
    for name, folder, its, scheduler in zip(names, config.prior, specs, schedulers):
        network = Predictor(load_unet(folder), bf16=config.mixed_precision == "bf16").to(device).eval()
        abar = scheduler.alphas_cumprod.to(device)
        stores = {}
        for store, batch in data.items():
            given = (network, batch["x"], batch["mask"], batch["noise"])
            taus = {tau: tau_to_timestep(tau, len(abar)) for tau in TAUS}
            levels = tuple(dict.fromkeys((*DENOISING_LEVELS, *taus.values())))
            errors = depth_errors(*given, levels=levels, abar=abar, batch=config.batch_size)
            stores[store] = {
                "noise_loss": noise_losses(*given, levels=LEVELS, abar=abar, batch=config.batch_size),
                "depth_rmse": {str(t): errors[str(t)] for t in DENOISING_LEVELS},
                "depth_rmse_by_tau": {str(tau): errors[str(t)] for tau, t in taus.items()},
            }
            picture = denoising_sheet(network, batch, abar=abar, near=its.near)
            with writing(path := config.output_dir / f"denoising-{name}-{store}.png", _ADVICE):
                save_picture(path, picture)
        result["priors"][name] = {"folder": str(folder), "steps": its.steps, "stores": stores}
        if config.num_samples:
            measured, samples, real = compare_samples(config, network, scheduler, its, device)
            result["priors"][name]["samples"] = measured
            with writing(path := config.output_dir / f"histograms-{name}.png", _ADVICE):
                plot_histograms(path, samples, real)
    with writing(config.output_dir, _ADVICE):
        plot_denoising(config.output_dir / "denoising.png", result)
        write_whole(config.output_dir / "evaluation.md", tables(result) + "\n")
        write_whole(config.output_dir / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return result


def unique_names(folders: Sequence[Path]) -> list[str]:
    """A short name per folder: its own, or its parent's when that is just "prior"; numbered when they clash."""
    names: list[str] = []
    for folder in folders:
        folder = Path(os.path.abspath(folder))  # of a link the name that was given
        name = base = folder.parent.name if folder.name == "prior" else folder.name
        number = 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


@torch.no_grad()
def denoising_sheet(
    denoise: Callable[[Tensor, Tensor], Tensor], batch: dict[str, Tensor], *, abar: Tensor, near: float, count: int = 8
):
    """Rows of true, noisy at t = 99, and one-step clean patches."""
    from ddm_training.sheets import patch_sheet

    x, noise = batch["x"][:count], batch["noise"][:count]
    t = torch.full((len(x),), 99, device=x.device)
    x_t = add_noise(x, noise, abar[t])
    clean = predict_clean(x_t, denoise(x_t, t), abar[t])
    return patch_sheet(torch.cat([x, x_t, clean]), near=near, columns=len(x))


def compare_samples(
    config: EvalConfig,
    network: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    spec: "RgbdSpec",
    device: torch.device,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Statistics of samples against data drawn as in training (focal lengths, depth scale, colours).

    Returns:
        Measurements, the samples, and as many data patches as set the ranges.
    """
    from ddm_training.patches import PatchConfig, Stream, open_sampler
    from ddm_training.plausibility import (
        DEPTH_BINS,
        GRADIENT_BINS,
        STATISTICS,
        gradient_size,
        histogram,
        patch_statistics,
        plausible_share,
        total_variation,
    )  # fmt: skip
    from ddm_training.sample import sample_prior

    samples = sample_prior(
        network,
        scheduler,
        spec.patch_size,
        config.num_samples,
        device=device,
        seed=config.seed,
        batch_size=config.batch_size,
        steps=config.num_inference_steps,
    )
    drawn_as = PatchConfig(
        patch_size=spec.patch_size, focal_range=spec.focal_range, depth_scale_jitter=spec.depth_scale_jitter
    )
    weights = [1.0] * len(config.data)
    sampler = open_sampler(config.data, config.split, replace(drawn_as, min_valid=0.9), weights=weights)
    size = max(512, config.num_samples)
    real = sampler.patches(seed=config.seed, stream=Stream.STATISTICS, step=1, first=0, count=2 * size)["x"]
    ranges, other = real[:size], real[size:]
    share, each = plausible_share(patch_statistics(samples), patch_statistics(ranges))
    share_data, _ = plausible_share(patch_statistics(other), patch_statistics(ranges))

    def distances(x: Tensor) -> dict[str, float]:
        return {
            "depth": total_variation(histogram(x[:, 3], DEPTH_BINS), histogram(ranges[:, 3], DEPTH_BINS)),
            "depth gradient": total_variation(
                histogram(gradient_size(x[:, 3]), GRADIENT_BINS), histogram(gradient_size(ranges[:, 3]), GRADIENT_BINS)
            ),
        }

    measured = {
        "count": config.num_samples,
        "plausible": share,
        "plausible_data": share_data,
        "plausible_by_statistic": dict(zip(STATISTICS, each.tolist())),
        "histogram_distance": distances(samples),
        "histogram_distance_data": distances(other),
    }
    return measured, samples, ranges


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown tables."""
    lines = [f"Depth RMSE in [-1, 1], noisy -> clean ({result['patches']} patches per store, f = {result['focal']:g}):"]
    lines += ["", "| prior | steps | store | " + " | ".join(f"t = {t}" for t in DENOISING_LEVELS) + " |"]
    lines.append("|---" * (3 + len(DENOISING_LEVELS)) + "|")
    for name, prior in result["priors"].items():
        for store, figures in prior["stores"].items():
            cells = [
                f"{figures['depth_rmse'][str(t)]['noisy']:.4f} -> {figures['depth_rmse'][str(t)]['clean']:.4f}"
                for t in DENOISING_LEVELS
            ]
            lines.append(f"| {name} | {prior['steps']} | {store} | " + " | ".join(cells) + " |")
    lines += ["", "Noise prediction, mean squared error over all channels / depth (predicting zero: 1):", ""]
    levels = list(next(iter(next(iter(result["priors"].values()))["stores"].values()))["noise_loss"])
    lines += ["| prior | store | " + " | ".join(f"t = {t}" for t in levels) + " |", "|---" * (2 + len(levels)) + "|"]
    for name, prior in result["priors"].items():
        for store, figures in prior["stores"].items():
            cells = [f"{v['all']:.3f} / {v['depth']:.3f}" for v in figures["noise_loss"].values()]
            lines.append(f"| {name} | {store} | " + " | ".join(cells) + " |")
    for name, prior in result["priors"].items():
        if found := prior.get("samples"):
            lines += [
                "",
                f"{name}: {found['plausible']:.0%} of {found['count']} samples have plausible statistics "
                f"(other data patches: {found['plausible_data']:.0%}).",
            ]
    return "\n".join(lines)
