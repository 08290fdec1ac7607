"""`ddm convert`: the authors' checkpoint `rgbd-patch-diffusion.pt` -> a prior folder.

The checkpoint is a dictionary of which `ema` counts: the averaged network under `ema_model.model.` and the buffers of
the noise schedule under `ema_model.`. It is read with ``weights_only=True``, so it cannot run code.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ddm_training.authors_unet import CLASS_NAME, RgbdPatchUNet
from ddm_training.errors import InputError
from ddm_training.export import replace_folder
from ddm_training.files import writing
from ddm_training.plots import CURVES_FILE
from ddm_training.rgbd import SPEC_FILE, RgbdSpec

if TYPE_CHECKING:
    from diffusers import DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]

NETWORK_PREFIX = "ema_model.model."
SCHEDULE_PREFIX = "ema_model."
ALPHA_TOLERANCE = 1e-4  # largest difference of abar_t at which the schedule is called the cosine one
LICENSE = "MIT, as the authors' repository (Copyright 2023 Niantic); no separate licence is stated for the weights"

# The authors' names -> ours, which say what a layer does; first match of each pattern, in this order.
_RENAMES = (
    (r"^(downs|ups)\.(\d+)\.0\.", r"\1.\2.first."),
    (r"^(downs|ups)\.(\d+)\.1\.", r"\1.\2.second."),
    (r"^(downs|ups)\.(\d+)\.2\.", r"\1.\2.attention."),
    (r"^downs\.(\d+)\.3\.", r"downs.\1.resize."),
    (r"^ups\.(\d+)\.3\.(1\.)?", r"ups.\1.resize.1."),  # the last one has no upsampling before its convolution
    (r"^time_mlp\.1\.", "time_mlp.0."),
    (r"^time_mlp\.3\.", "time_mlp.2."),
    (r"\.fn\.norm\.g$", ".norm.gain"),
    (r"\.fn\.fn\.to_out\.1\.g$", ".out_norm.gain"),
    (r"\.fn\.fn\.to_out\.(0\.)?", ".to_out."),
    (r"\.fn\.fn\.", "."),
)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn the authors' checkpoint into a prior folder."""

    checkpoint: Path
    """The authors' `rgbd-patch-diffusion.pt`, or a checkpoint of the same format."""
    output_dir: Path
    """Prior folder to write: unet/, scheduler/, rgbd.json, README.md."""
    overwrite: bool = False
    """Replace the prior in an existing prior folder, and remove the pictures of the old one (samples.png, curves.png);
    other files in it stay, the folder completion among them."""

    def main(self) -> None:
        """Convert, and say what was written.

        Raises:
            InputError: see `read_checkpoint` and `write_prior`.
        """
        checkpoint = read_checkpoint(self.checkpoint)
        write_prior(checkpoint, self.output_dir, source=self.checkpoint.name, overwrite=self.overwrite)
        parameters = sum(p.numel() for p in checkpoint.model.parameters())
        print(
            f"{self.output_dir}: {CLASS_NAME} of width {checkpoint.model.dim}, {parameters:,} parameters, "
            f"{checkpoint.steps:,} training steps, {len(checkpoint.alphas_cumprod)} timesteps."
        )


@dataclass(frozen=True)
class Checkpoint:
    """What is used of a checkpoint."""

    model: RgbdPatchUNet
    """The averaged network, in evaluation mode."""
    alphas_cumprod: Float[Tensor, " T"]
    """abar_t: the variance of the clean patch that is left at timestep t."""
    betas: Float[Tensor, " T"]
    """1 - abar_t / abar_(t-1)."""
    steps: int
    """Optimiser steps of the training."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the averaged network and the noise schedule of a checkpoint of the authors' format.

    Raises:
        InputError: the file is missing, is no such checkpoint, holds pickled objects, lacks or has too many averaged
            weights, has another number of channels than 4, or holds values that are not finite.
    """
    content = _load_weights_only(path)
    ema = content.get("ema")
    if not isinstance(ema, Mapping):
        raise InputError(
            f"{path} has no averaged weights: expected a dictionary with 'ema', found {_listed(content)}. "
            "Only the averaged (EMA) weights are converted."
        )
    state = {
        _rename(key.removeprefix(NETWORK_PREFIX)): value.float()
        for key, value in ema.items()
        if key.startswith(NETWORK_PREFIX) and isinstance(value, Tensor)
    }
    alphas, betas = (ema.get(SCHEDULE_PREFIX + name) for name in ("alphas_cumprod", "betas"))
    if not (isinstance(alphas, Tensor) and isinstance(betas, Tensor) and alphas.shape == betas.shape):
        raise InputError(f"{path} lacks the noise schedule: 'ema' must hold 'ema_model.alphas_cumprod' and '.betas'.")
    if bad := [name for name, value in {**state, "betas": betas}.items() if not value.isfinite().all()]:
        raise InputError(f"{path} holds values that are not finite, in {_listed(bad)}: fetch the file again.")
    steps = content.get("step", 0)
    return Checkpoint(_build(path, state), alphas.float(), betas.float(), steps if isinstance(steps, int) else 0)


def scheduler_of(checkpoint: Checkpoint) -> "DDPMScheduler":
    """The diffusers scheduler with the checkpoint's noise schedule: the cosine one if it agrees, else its own betas."""
    from diffusers import DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]

    steps = len(checkpoint.alphas_cumprod)
    cosine = DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    if (cosine.alphas_cumprod - checkpoint.alphas_cumprod).abs().max() <= ALPHA_TOLERANCE:
        return cosine
    return DDPMScheduler(num_train_timesteps=steps, trained_betas=checkpoint.betas.tolist(), prediction_type="epsilon")


def write_prior(checkpoint: Checkpoint, folder: Path, *, source: str, overwrite: bool = False) -> None:
    """Write a prior folder; files in it that are not a prior's own stay, but for the pictures of the old one.

    Args:
        checkpoint: what to write.
        folder: the prior folder.
        source: name of the checkpoint, for the model card.
        overwrite: replace ``folder`` if it exists.

    Raises:
        InputError: ``folder`` exists and is not to be replaced, is no prior folder, or cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists already: choose another --output-dir, or say --overwrite to replace it.")
    if folder.exists() and not (folder / SPEC_FILE).is_file():
        raise InputError(f"{folder} is not a prior folder (it has no {SPEC_FILE}) and is not replaced.")
    spec = RgbdSpec(trained_on=("hypersim",), steps=checkpoint.steps, license=LICENSE)

    def write(part: Path) -> None:
        checkpoint.model.save_pretrained(part / "unet")
        scheduler_of(checkpoint).save_pretrained(part / "scheduler")
        spec.save(part)
        (part / "README.md").write_text(model_card(checkpoint, spec, source))

    replace_folder(folder, write)
    for name in ("samples.png", CURVES_FILE):  # of the denoiser that was there
        with writing(path := folder / name, "The new prior is whole; delete this picture of the old one."):
            path.unlink(missing_ok=True)


def model_card(checkpoint: Checkpoint, spec: RgbdSpec, source: str) -> str:
    """The README of a converted prior."""
    model = checkpoint.model
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    levels = "-".join(map(str, model.multipliers))
    width, height = spec.image_size
    return f"""---
license: other
license_name: see-below
tags: [diffusionerf, rgbd, denoising-diffusion]
---
# RGBD patch prior of the DiffusioNeRF authors

Converted with `ddm convert` from `{source}`, the checkpoint released with "DiffusioNeRF: Regularizing Neural Radiance
Fields with Denoising Diffusion Models" (Wynn and Turmukhambetov, CVPR 2023, arXiv 2302.12231). Averaged (EMA) weights.

| item | value |
|---|---|
| network | {CLASS_NAME}, width {model.dim}, multipliers {levels}, {size} |
| patches | {spec.patch_size} x {spec.patch_size}, RGB and inverse depth ({spec.near} m / depth), each in [-1, 1] |
| scale of a patch | a window of an image of {width} x {height} pixels, focal length {spec.focal:g} |
| predicts | the noise, {len(checkpoint.alphas_cumprod)} timesteps |
| trained on | Hypersim (Roberts et al., ICCV 2021), {checkpoint.steps:,} steps |
| licence | {spec.license} |

The authors did not publish the scales at which training patches were cut, nor the statistics of their depth, so
`rgbd.json` holds the scale at which they use the prior and no disparity quantiles.
"""


def _load_weights_only(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected the authors' rgbd-patch-diffusion.pt.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise InputError(
                f"{path} holds pickled objects beside tensors and is not read, since they could run code; "
                "expected tensors, numbers and text only."
            ) from error
        # torch's own text on pickles advises turning weights_only off: it is not passed on.
        known = isinstance(error, pickle.UnpicklingError) or not str(error)
        reason = "it is in no format that PyTorch writes" if known else str(error).splitlines()[0]
        raise InputError(f"{path} is not a PyTorch checkpoint, or is damaged ({reason}): fetch it again.") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a dictionary with 'ema'.")
    return content


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key, count=1)
    return key


def _build(path: Path, state: dict[str, Tensor]) -> RgbdPatchUNet:
    """Network whose sizes are those of the weights, with the weights loaded strictly."""
    stem = state.get("init_conv.weight")
    resizes = [state.get(f"downs.{i}.resize.weight") for i in range(sum(k.endswith(".resize.weight") for k in state))]
    if stem is None or stem.ndim != 4 or not resizes or any(w is None or w.ndim != 4 for w in resizes):
        raise InputError(
            f"{path} does not hold the authors' network: 'ema' has no first or down-sampling layers under "
            f"{NETWORK_PREFIX!r}; found {_listed(state)}."
        )
    dim, channels = stem.shape[:2]
    if channels != 4:
        raise InputError(f"{path} is a network for {channels} channels; expected 4: red, green, blue and depth.")
    multipliers = tuple(w.shape[0] // dim for w in resizes if w is not None)
    with torch.device("meta"):
        model = RgbdPatchUNet(dim, multipliers, channels)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    shapes = [name for name in expected.keys() & state.keys() if expected[name] != state[name].shape]
    if missing or unknown or shapes:
        raise InputError(
            f"{path} is not the authors' network of width {dim} with multipliers {multipliers}: averaged weights "
            f"missing {_listed(missing)}; unknown {_listed(unknown)}; of another shape {_listed(shapes)}."
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _listed(names: Any, limit: int = 5) -> str:
    names = sorted(map(str, names))
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest if names else "nothing"
