"""The networks: presets of diffusers' `UNet2DModel`, the noise schedule, and loading from a prior folder.

Notation
    x_t    noisy patch, sqrt(abar_t) x + sqrt(1 - abar_t) eps      [b, 4, h, w]
    t      timestep, 0 ... 999                                     [b]
    abar   cumulative signal power of the cosine schedule          [1000]
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddm_training.authors_unet import CLASS_NAME, CONFIG_FILE, WEIGHTS_FILE, RgbdPatchUNet
from ddm_training.errors import InputError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

Preset = Literal["prototype", "tiny", "small", "paper"]
Prediction = Literal["epsilon", "v_prediction"]
TIMESTEPS = 1000
UNET_FOLDER, SCHEDULER_FOLDER = "unet", "scheduler"

# Widths of the levels, residual layers per level, and whether a level has attention. What `tiny` costs: docs/prior.md.
_PRESETS: dict[str, tuple[tuple[int, ...], int, tuple[bool, ...]]] = {
    "prototype": ((32, 64, 96), 1, (False, False, True)),
    "tiny": ((32, 64, 96, 128), 1, (False, False, False, True)),
    "small": ((64, 128, 192, 256), 2, (False, False, True, True)),
    "paper": ((64, 128, 256, 352), 2, (False, False, True, True)),
}


def unet_arguments(preset: Preset, patch_size: int) -> dict[str, Any]:
    """Arguments of `UNet2DModel` for a preset."""
    widths, layers, attention = _PRESETS[preset]
    return {
        "sample_size": patch_size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "norm_num_groups": 8 if preset in ("prototype", "tiny") else 32,
        "attention_head_dim": 32,
    }


def make_unet(preset: Preset, *, patch_size: int = 48) -> "UNet2DModel":
    """A freshly initialised network; call inside a seeded context for reproducible weights."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    return read_input_precisely(UNet2DModel(**unet_arguments(preset, patch_size)))


class PreciseConv2d(nn.Conv2d):
    """A convolution that autocast leaves alone."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def read_input_precisely(unet: "UNet2DModel") -> "UNet2DModel":
    """Keep the first convolution out of autocast; weights and their names stay as they are.

    At t = 3 the noise has deviation .0139, and bf16 rounds values near 1 to steps of .004. Depth loss at t = 3 of a
    `tiny` of 2,000 steps: fp32 .0503, autocast .0576, autocast but for this convolution .0509.
    """
    old = unet.conv_in
    with torch.device("meta"):
        new = PreciseConv2d(old.in_channels, old.out_channels, 3, padding=1)
    new.weight, new.bias = old.weight, old.bias
    unet.conv_in = new
    return unet


def make_scheduler(prediction: Prediction = "epsilon") -> "DDPMScheduler":
    """Cosine schedule (s = .008), 1000 steps (paper, section 3.1). Samples are held in [-1, 1].

    Args:
        prediction: what the network gives, noise (the paper's) or velocity; of no effect on the schedule itself.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=TIMESTEPS, beta_schedule="squaredcos_cap_v2", prediction_type=prediction, clip_sample=True
    )


def tau_to_timestep(tau: float, timesteps: int = TIMESTEPS) -> int:
    """t = T tau - 1, at least 3: tau 0.1 -> 99, tau 0 -> 3. The authors' code uses every fourth t alone: within 2."""
    return min(max(round(timesteps * tau) - 1, 3), timesteps - 1)


def velocity(
    x: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], abar: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """v = sqrt(abar) eps - sqrt(1 - abar) x (Salimans and Ho, ICLR 2022): nearly eps at low t, nearly -x at high t."""
    abar = abar[:, None, None, None]
    return abar.sqrt() * noise - (1 - abar).sqrt() * x


def velocity_to_noise(
    v: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], abar: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """eps = sqrt(abar) v + sqrt(1 - abar) x_t."""
    abar = abar[:, None, None, None]
    return abar.sqrt() * v + (1 - abar).sqrt() * x_t


def add_noise(
    x: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], abar: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """x_t = sqrt(abar) x + sqrt(1 - abar) eps."""
    abar = abar[:, None, None, None]
    return abar.sqrt() * x + (1 - abar).sqrt() * noise


def predict_clean(
    x_t: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], abar: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """x = (x_t - sqrt(1 - abar) eps) / sqrt(abar), not clipped."""
    abar = abar[:, None, None, None]
    return (x_t - (1 - abar).sqrt() * noise) / abar.sqrt()


class Predictor(nn.Module):
    """A network as a function (x_t, t) -> what it predicts in fp32, computed under bf16 autocast if so asked.

    Autocast ends at the network's border: noise, target and data stay fp32.
    """

    def __init__(self, unet: nn.Module, *, bf16: bool = False) -> None:
        super().__init__()
        self.unet = unet
        self.bf16 = bf16

    def forward(self, x_t: Float[Tensor, "b 4 h w"], t: Int[Tensor, " b"]) -> Float[Tensor, "b 4 h w"]:
        with torch.autocast(x_t.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            predicted = self.unet(x_t, t)
        return (predicted if isinstance(predicted, Tensor) else predicted.sample).float()


class NoisePredictor(Predictor):
    """A network as a function (x_t, t) -> eps, whatever it predicts by its scheduler."""

    abar: Tensor | None

    def __init__(self, unet: nn.Module, scheduler: "DDPMScheduler", *, bf16: bool = False) -> None:
        super().__init__(unet, bf16=bf16)
        gives_velocity = scheduler.config["prediction_type"] == "v_prediction"
        self.register_buffer("abar", scheduler.alphas_cumprod if gives_velocity else None, persistent=False)

    def forward(self, x_t: Float[Tensor, "b 4 h w"], t: Int[Tensor, " b"]) -> Float[Tensor, "b 4 h w"]:
        predicted = super().forward(x_t, t)
        return predicted if self.abar is None else velocity_to_noise(predicted, x_t, self.abar[t])


def load_weights(folder: Path, config: dict[str, Any]) -> "UNet2DModel":
    """A diffusers network and its weights, read strictly.

    Args:
        folder: with the weights, a safetensors file.
        config: content of its `config.json`.

    Raises:
        InputError: the weights are missing, damaged, or do not fit the config.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing: weights are read from safetensors only, never from pickled files.")
    try:
        state = load_file(path)
        with torch.random.fork_rng(devices=[]):  # what is drawn after loading shall not depend on the network
            unet = UNet2DModel.from_config(config)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} cannot be read ({error}): the file is truncated or damaged.") from error
    assert isinstance(unet, UNet2DModel)
    own = unet.state_dict()
    wrong = sorted(key for key in own.keys() | state.keys() if key not in own or key not in state)
    wrong += sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if wrong:
        raise InputError(
            f"the weights of {path} do not fit config.json: {len(wrong)} entries missing, unknown or of another shape: "
            f"{', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}."
        )
    unet.load_state_dict(state)
    return unet


def _load_diffusers(folder: Path, config: dict[str, Any]) -> nn.Module:
    if config.get("in_channels") != 4 or config.get("out_channels") != 4:
        raise InputError(
            f"{folder} predicts {config.get('out_channels')} from {config.get('in_channels')} channels; "
            "an RGBD prior needs 4 and 4."
        )
    return read_input_precisely(load_weights(folder, config))


def load_unet(folder: Path) -> nn.Module:
    """The network of a prior folder in evaluation mode, called as f(x [b, 4, h, w], t [b]) -> noise [b, 4, h, w].

    Its weights are float32, whatever those of the file.

    Args:
        folder: a prior folder; its `unet/config.json` says which class the network is.

    Raises:
        InputError: files are missing or damaged, the class is unknown, or the weights do not fit the config.
    """
    unet = folder / UNET_FOLDER
    try:
        config = json.loads((unet / CONFIG_FILE).read_text())
        name = config.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{unet / CONFIG_FILE} cannot be read ({error}): expected a prior folder.") from error
    if name == "UNet2DModel":
        network = _load_diffusers(unet, config)
    elif name == CLASS_NAME:
        network = RgbdPatchUNet.load(unet)
    else:
        raise InputError(f"{unet / CONFIG_FILE} names network {name!r}; known are 'UNet2DModel' and {CLASS_NAME!r}.")
    nn.Module.to(network, torch.float32)  # diffusers' own `to` warns of what is not our case
    return NoisePredictor(network, load_scheduler(folder)).eval().requires_grad_(False)


def load_scheduler(folder: Path) -> "DDPMScheduler":
    """The noise schedule of a prior folder.

    Raises:
        InputError: it is missing or damaged, or the network predicts neither noise nor velocity.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    path = folder / SCHEDULER_FOLDER / "scheduler_config.json"
    try:
        scheduler = DDPMScheduler.from_config(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read ({error}): expected a scheduler as diffusers saves it.") from error
    assert isinstance(scheduler, DDPMScheduler)
    if (found := scheduler.config["prediction_type"]) not in get_args(Prediction):
        raise InputError(f"{path}: prediction_type is {found!r}; a prior predicts {' or '.join(get_args(Prediction))}.")
    return scheduler
