"""Writing a prior folder from a training run: network, schedule, `rgbd.json`, model card, sample sheet."""

import copy
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ddm_training.errors import InputError
from ddm_training.files import writing
from ddm_training.plots import CURVES_FILE
from ddm_training.rgbd import RgbdSpec
from ddm_training.unet import SCHEDULER_FOLDER, UNET_FOLDER

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    from ddm_training.pretrained import Origin

ExportDtype = Literal["fp16", "fp32"]
# Licences that the hub knows by these names, of those that weights have: huggingface.co/docs/hub/repositories-licenses
_HUB_LICENSES = {
    "unknown", "other", "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "mpl-2.0", "unlicense",
    "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0",
    "openrail", "creativeml-openrail-m", "bigscience-openrail-m", "bigcode-openrail-m",
    "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
}  # fmt: skip
_SAMPLES = """, `samples.png` unconditional samples, colour and depth side by side
(depth: red .3 m, blue 20 m)"""
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
    with writing(folder, "Make room and run again.", also=(SafetensorError,)):
        try:
            if part.exists():
                shutil.rmtree(part)
            part.mkdir(parents=True)
            write(part)
            for path in sorted(p for p in part.rglob("*") if p.is_file()):
                target = folder / path.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
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


def model_card(
    spec: RgbdSpec,
    *,
    config: dict[str, Any],
    parameters: int,
    measured: dict[str, Any],
    sheet: bool,
    origin: "Origin | None" = None,
) -> str:
    """The README.md of a prior folder; all figures come from ``spec``, ``config`` and ``measured``.

    Args:
        spec: of the prior.
        config: settings of the training.
        parameters: of the network.
        measured: by `PatchValidation.run`.
        sheet: samples are written beside it.
        origin: what the training began with.
    """
    rows = "\n".join(
        f"| {t} | {both['all']:.4f} | {both['depth']:.4f} |" for t, both in measured.get("val", {}).items()
    )
    quantiles = ", ".join(f"{q}: {v:.3f}" for q, v in spec.disparity_quantiles.items())
    return f"""---
{card_license(spec.license)}
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
 depth weight {config["depth_loss_weight"]:g}, learning rate {config["learning_rate"]:g},\
 {config["mixed_precision"]}{origin or ""} |
| timesteps | {config["timestep_bias"]:.0%} log-uniform in [3, 199), the others uniform over all 1000 |
| licence of the weights | {spec.license} |

Squared error of the predicted noise on held-out patches (predicting zero gives 1.0):

| timestep | all channels | depth |
|---|---|---|
{rows}

`{CURVES_FILE}` shows the losses over the training{_SAMPLES if sheet else ""}.
"""


def card_license(text: str) -> str:
    """The lines of a model card's head that name the licence: of the hub's list, or another by its name."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"
    return f"license: {name}" if name in _HUB_LICENSES else f'license: other\nlicense_name: "{name}"'


def open_repository(model_id: str, *, private: bool) -> None:
    """Make the repository on the Hugging Face hub that a prior will be uploaded to, with the user's own login.

    Raises:
        InputError: there is no login, no right to write there, or no network.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.whoami()
        api.create_repo(model_id, private=private, exist_ok=True)
    except Exception as error:  # the hub client raises many kinds, from no network to no such owner
        raise InputError(
            f"--push-to-hub: the Hugging Face hub does not let {model_id} be written ({_reason(error)}). Log in with "
            "`hf auth login`, and check --hub-model-id and the network, or leave out --push-to-hub."
        ) from error


def push_prior(folder: Path, model_id: str) -> None:
    """Upload a prior folder to the Hugging Face hub, with the user's own login; see `open_repository`.

    Raises:
        InputError: it cannot be uploaded.
    """
    from huggingface_hub import HfApi

    message = "Upload RGBD patch diffusion prior"
    try:
        HfApi().upload_folder(folder_path=str(folder), repo_id=model_id, commit_message=message)
    except Exception as error:  # as above
        raise InputError(
            f"{model_id} could not be uploaded ({_reason(error)}). The prior is whole in {folder}: run the same "
            "command again to upload it."
        ) from error


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def parameter_count(network: torch.nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in network.parameters())
