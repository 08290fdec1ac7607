"""The network of the authors' released prior, `rgbd-patch-diffusion.pt`, so that its weights can be used as they are.

It is a U-Net of the denoising-diffusion family, but of no published layout. What sets it apart was found by matching
the outputs of a reference network:

* 3x3 convolutions of the residual blocks are weight-standardised (each filter has mean 0 and variance 1);
* linear attention on every level divides its values by the number of positions and normalises its output;
* the attention in the middle compares queries and keys of unit length, where the length is taken over *positions* and
  not over the channels of a head, times a fixed 10. It looks like a slip, and the trained weights depend on it.

Notation
    b, h, w   batch, height and width; h and w are multiples of 2^(levels - 1)
    c         channels of a level; n = h w positions
    x         noisy patch                        [b, 4, h, w]
    t         timestep, 0 ... T - 1              [b]
    e         features of the timestep           [b, 4 dim]
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ddm_training.errors import InputError

CLASS_NAME = "RgbdPatchUNet"
CONFIG_FILE = "config.json"  # names as diffusers has them, so that one folder layout serves both kinds of network
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
EPSILON = 1e-5
GROUPS = 8
HEADS, HEAD_DIM = 4, 32
ATTENTION_SCALE = 10.0


class ChannelNorm(nn.Module):
    """Mean 0, variance 1 over the channels of each position, times a gain; no bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return _standardize(x, (1,)) * self.gain


class StandardizedConv(nn.Conv2d):
    """Convolution whose filters are brought to mean 0 and variance 1 before use (Qiao et al., arXiv 1903.10520)."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return self._conv_forward(input, _standardize(self.weight, (1, 2, 3)), self.bias)


class ConvBlock(nn.Module):
    """Standardised 3x3 convolution, group norm, optional x (1 + scale) + shift, SiLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.proj = StandardizedConv(channels_in, channels_out, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, channels_out)

    def forward(
        self, x: Float[Tensor, "b c h w"], modulation: Float[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b d h w"]:
        x = self.norm(self.proj(x))
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
            x = x * (1.0 + scale) + shift
        return F.silu(x)


class ResidualBlock(nn.Module):
    """Two `ConvBlock`s, the first modulated by the timestep, beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, time_features: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_features, 2 * channels_out))
        self.block1 = ConvBlock(channels_in, channels_out)
        self.block2 = ConvBlock(channels_out, channels_out)
        self.res_conv = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Float[Tensor, "b c h w"], e: Float[Tensor, "b f"]) -> Float[Tensor, "b d h w"]:
        return self.res_conv(x) + self.block2(self.block1(x, self.mlp(e)))


class _Attention(nn.Module):
    """What both attentions share: norm, projection to queries, keys and values of each head, and back, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_DIM, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * HEAD_DIM, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        b, _, h, w = x.shape
        q, k, v = self.to_qkv(self.norm(x)).reshape(b, 3, HEADS, HEAD_DIM, h * w).unbind(1)
        return x + self.project(self.attend(q, k, v).reshape(b, HEADS * HEAD_DIM, h, w))

    def attend(
        self, q: Float[Tensor, "b a d n"], k: Float[Tensor, "b a d n"], v: Float[Tensor, "b a d n"]
    ) -> Float[Tensor, "b a d n"]:
        raise NotImplementedError

    def project(self, x: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c h w"]:
        return self.to_out(x)


class LinearAttention(_Attention):
    """(v / n) softmax_n(k)^T softmax_d(q) / sqrt(d), linear in n (Shen et al., arXiv 1812.01243), normalised after."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.out_norm = ChannelNorm(channels)

    def attend(
        self, q: Float[Tensor, "b a d n"], k: Float[Tensor, "b a d n"], v: Float[Tensor, "b a d n"]
    ) -> Float[Tensor, "b a d n"]:
        q = q.softmax(dim=-2) / math.sqrt(HEAD_DIM)
        # Dividing by n looks idle before a norm, but it brings the variance near that norm's epsilon.
        context = (v / v.shape[-1]) @ k.softmax(dim=-1).mT
        return context @ q

    def project(self, x: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c h w"]:
        return self.out_norm(self.to_out(x))


class MiddleAttention(_Attention):
    """v softmax(10 q^T k)^T with each channel of q and k of unit length over positions (see the module's docstring)."""

    def attend(
        self, q: Float[Tensor, "b a d n"], k: Float[Tensor, "b a d n"], v: Float[Tensor, "b a d n"]
    ) -> Float[Tensor, "b a d n"]:
        similarity = ATTENTION_SCALE * F.normalize(q, dim=-1).mT @ F.normalize(k, dim=-1)
        return v @ similarity.softmax(dim=-1).mT


class Level(nn.Module):
    """What is done at one resolution, down or up: two residual blocks, attention, and the change of resolution."""

    def __init__(
        self, first: ResidualBlock, second: ResidualBlock, attention: LinearAttention, resize: nn.Module
    ) -> None:
        super().__init__()
        self.first, self.second, self.attention, self.resize = first, second, attention, resize


class RgbdPatchUNet(nn.Module):
    """The authors' noise predictor (paper section 4.1, layout of the authors' weights).

    Args:
        dim: base width, a multiple of 8; 64 in the released prior (36,254,980 parameters).
        multipliers: width of each level in units of ``dim``.
        channels: channels of a patch.

    Raises:
        InputError: the width does not divide into the 8 groups of the norms, or there is no level.
    """

    def __init__(self, dim: int = 64, multipliers: tuple[int, ...] = (1, 2, 4, 8), channels: int = 4) -> None:
        super().__init__()
        if dim < GROUPS or dim % GROUPS or not multipliers or min(multipliers) < 1:
            raise InputError(
                f"a network needs a width that is a multiple of {GROUPS} and positive multipliers, "
                f"found dim = {dim}, multipliers = {tuple(multipliers)}."
            )
        self.dim, self.multipliers, self.channels = dim, tuple(multipliers), channels
        features = 4 * dim
        widths = [dim, *(dim * m for m in multipliers)]
        pairs = list(itertools.pairwise(widths))
        last = len(pairs) - 1

        self.init_conv = nn.Conv2d(channels, dim, 7, padding=3)
        self.time_mlp = nn.Sequential(nn.Linear(dim, features), nn.GELU(), nn.Linear(features, features))
        self.downs = nn.ModuleList(
            Level(
                ResidualBlock(fine, fine, features),
                ResidualBlock(fine, fine, features),
                LinearAttention(fine),
                nn.Conv2d(fine, coarse, 3, padding=1) if i == last else nn.Conv2d(fine, coarse, 4, 2, 1),
            )
            for i, (fine, coarse) in enumerate(pairs)
        )
        self.mid_block1 = ResidualBlock(widths[-1], widths[-1], features)
        self.mid_attn = MiddleAttention(widths[-1])
        self.mid_block2 = ResidualBlock(widths[-1], widths[-1], features)
        self.ups = nn.ModuleList(
            Level(
                ResidualBlock(coarse + fine, coarse, features),
                ResidualBlock(coarse + fine, coarse, features),
                LinearAttention(coarse),
                nn.Sequential(
                    nn.Identity() if i == last else nn.Upsample(scale_factor=2),
                    nn.Conv2d(coarse, fine, 3, padding=1),
                ),
            )
            for i, (fine, coarse) in enumerate(reversed(pairs))
        )
        self.final_res_block = ResidualBlock(2 * dim, dim, features)
        self.final_conv = nn.Conv2d(dim, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Noise in the patches ``x`` at timesteps ``t`` (whole numbers of any dtype).

        Raises:
            InputError: number of channels, height or width does not fit the network.
        """
        step = 2 ** (len(self.multipliers) - 1)
        if x.shape[1] != self.channels or x.shape[2] % step or x.shape[3] % step:
            raise InputError(
                f"patches must be [b, {self.channels}, h, w] with h and w multiples of {step}, found {tuple(x.shape)}."
            )
        e = self.time_mlp(embed_timestep(t, self.dim).to(self.init_conv.weight.dtype))
        x = stem = self.init_conv(x)
        skips: list[Tensor] = []
        for level in cast("list[Level]", self.downs):
            x = level.first(x, e)
            skips.append(x)
            x = level.attention(level.second(x, e))
            skips.append(x)
            x = level.resize(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, e)), e)
        for level in cast("list[Level]", self.ups):
            x = level.first(torch.cat([x, skips.pop()], dim=1), e)
            x = level.second(torch.cat([x, skips.pop()], dim=1), e)
            x = level.resize(level.attention(x))
        return self.final_conv(self.final_res_block(torch.cat([x, stem], dim=1), e))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `config.json` and the weights (safetensors) into ``folder``, made when absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": CLASS_NAME,
            "dim": self.dim,
            "multipliers": list(self.multipliers),
            "channels": self.channels,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path | str) -> "RgbdPatchUNet":
        """Read what `save_pretrained` wrote, on the CPU, in evaluation mode.

        Raises:
            InputError: a file is missing or damaged, the config is of another network, or the weights do not fit it.
        """
        folder = Path(folder)
        config = _read_config(folder / CONFIG_FILE)
        try:
            with torch.device("meta"):
                model = cls(config["dim"], tuple(config["multipliers"]), config["channels"])
        except (KeyError, TypeError, InputError) as error:
            raise InputError(f"{folder / CONFIG_FILE} does not describe a {CLASS_NAME} ({error}).") from error
        path = folder / WEIGHTS_FILE
        try:
            model.load_state_dict(load_file(path), strict=True, assign=True)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}): convert the checkpoint again.") from error
        except RuntimeError as error:
            raise InputError(f"{path} does not fit {CONFIG_FILE} beside it: {error}") from error
        return model.eval()


def embed_timestep(t: Shaped[Tensor, " b"], dim: int) -> Float[Tensor, "b dim"]:
    """(sin(t w_i), cos(t w_i)) with w_i = 10000^(-i / (dim/2 - 1)), fp32 (Vaswani et al., arXiv 1706.03762)."""
    half = dim // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(i * (-math.log(10000.0) / (half - 1)))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def _standardize(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean 0 and variance 1 over ``dims``; in fp32 or better, since half precision hardly knows the epsilon."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=dims, correction=0, keepdim=True)
    return ((wide - mean) * (variance + EPSILON).rsqrt()).to(x.dtype)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected a folder that `ddm convert` wrote.") from error
    found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    if found != CLASS_NAME:
        raise InputError(f"{path} describes a network of class {found!r}, expected {CLASS_NAME!r}.")
    return config
