"""Writing a prior folder from a training run: network, schedule, `rgbd.json`, model card, sample sheet."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ddm_training.errors import InputError
from ddm_training.plots import CURVES_FILE
from ddm_training.rgbd import RgbdSpec
from ddm_training.unet import SCHEDULER_FOLDER, UNET_FOLDER

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

ExportDtype = Literal["fp16", "fp32"]
_PREDICTS = {"epsilon": "noise", "v_prediction": "velocity"}


def export_prior(
    folder: Path,
    *,
    unet: "UNet2DModel",
    scheduler: "DDPMScheduler",
    spec: RgbdSpec,
    card: str,
    sheet: np.ndarray | None,
    dtype: ExportDtype = "fp16",
) -> None:
    """Write or renew a prior folder; see `replace_folder`."""

    def write(part: Path) -> None:
        _write(part, unet=unet, scheduler=scheduler, spec=spec, card=card, sheet=sheet, dtype=dtype)

    replace_folder(folder, write)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write or renew the files of a folder.

    They are replaced one by one, each at once, so that a reader beside a running training never meets half a file.

    Args:
        folder: made when absent; files that are not written again stay.
        write: writes into an empty folder.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    from safetensors import SafetensorError

    part = folder.with_name(f"{folder.name}.part")
    try:
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
        write(part)
        for path in sorted(p for p in part.rglob("*") if p.is_file()):
            target = folder / path.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} could not be written ({error}): make room and run again.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(
    folder: Path,
    *,
    unet: "UNet2DModel",
    scheduler: "DDPMScheduler",
    spec: RgbdSpec,
    card: str,
    sheet: np.ndarray | None,
    dtype: ExportDtype,
) -> None:
    from ddm_training.sheets import save_picture

    network = copy.deepcopy(unet)
    torch.nn.Module.to(network, torch.float16 if dtype == "fp16" else torch.float32)
    network.save_pretrained(folder / UNET_FOLDER, safe_serialization=True)
    scheduler.save_pretrained(folder / SCHEDULER_FOLDER)
    spec.save(folder)
    (folder / "README.md").write_text(card)
    if sheet is not None:
        save_picture(folder / "samples.png", sheet)


def model_card(spec: RgbdSpec, *, config: dict[str, Any], parameters: int, measured: dict[str, Any]) -> str:
    """The README.md of a prior folder; all figures come from ``spec``, ``config`` and ``measured``."""
    rows = "\n".join(
        f"| {t} | {both['all']:.4f} | {both['depth']:.4f} |" for t, both in measured.get("val", {}).items()
    )
    quantiles = ", ".join(f"{q}: {v:.3f}" for q, v in spec.disparity_quantiles.items())
    return f"""---
license: {spec.license.lower()}
library_name: diffusers
tags: [diffusion, rgbd, nerf]
---
# RGBD patch diffusion prior

A denoising diffusion model of {spec.patch_size} x {spec.patch_size} patches with colour and depth, made with
`ddm train`. It regularises NeRFs trained from few views (DiffusioNeRF, Wynn and Turmukhambetov, CVPR 2023).

| | |
|---|---|
| network | diffusers `UNet2DModel`, preset `{config["preset"]}`, {parameters:,} parameters, EMA weights |
| noise | cosine schedule, 1000 steps, predicts {_PREDICTS[config["prediction_type"]]} |
| patch | 4 channels in [-1, 1]: RGB and 2 d - 1 with d = {spec.near} / max(z, {spec.near}), z planar depth in metres |
| focal length | {spec.focal_range[0]:g} to {spec.focal_range[1]:g} px (nominal {spec.focal:g} px) |
| depth scale jitter | log-uniform in [1/{spec.depth_scale_jitter:g}, {spec.depth_scale_jitter:g}] |
| trained on | {", ".join(spec.trained_on)} ({measured.get("frames", "?")} frames) |
| disparity quantiles, 1/m | {quantiles} |
| training | {spec.steps:,} steps of {measured.get("global_batch", "?")} patches, {config["loss_type"]} loss,\
 depth weight {config["depth_loss_weight"]:g}, learning rate {config["learning_rate"]:g}, {config["mixed_precision"]} |
| timesteps | {config["timestep_bias"]:.0%} log-uniform in [3, 199), the others uniform over all 1000 |
| licence of the weights | {spec.license} |

Squared error of the predicted noise on held-out patches (predicting zero gives 1.0):

| timestep | all channels | depth |
|---|---|---|
{rows}

`{CURVES_FILE}` shows the losses over the training, `samples.png` unconditional samples, colour and depth side by side
(depth: red .3 m, blue 20 m).
"""


def push_prior(folder: Path, model_id: str, *, private: bool) -> None:
    """Upload a prior folder to the Hugging Face hub, with the user's own login."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(model_id, private=private, exist_ok=True)
    api.upload_folder(folder_path=str(folder), repo_id=model_id, commit_message="Upload RGBD patch diffusion prior")


def parameter_count(network: torch.nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in network.parameters())
