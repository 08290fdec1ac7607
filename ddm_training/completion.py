"""The network that completes depth: colours and the few pixels whose depth is known in, depth of all pixels out.

Where the denoiser of patches knows what colour and depth look like together, this is the same knowledge asked the other
way: depth, and how far it may be off, given the colours of a whole image and some of its depth. One pass, no sampling.

It sees whole images in few pixels, as what is asked of it are walls, floors and the places of objects; what needs many
pixels, the matches have.

Notation
    s        known planar depth, any unit; 0 where unknown                                  [b, h, w]
    base     s interpolated to all pixels, see `membrane`                                   [b, h, w]
    m        median of log s: the network sees log s - m and log base - m, never a unit     [b]
    log_z    log base + the network's correction: the result                                [b, h, w]
    log_b    log of the expected |error| of log_z, the scale of a Laplace distribution      [b, h, w]
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ddm_training import membrane
from ddm_training.errors import InputError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

FOLDER = "completion"  # in a prior folder
SPEC_FILE = "completion.json"
CHANNELS = 6  # red, green, blue, log s - m, whether s is known, log base - m
STEM = 2  # pixels of a side that become channels: the network works at half the resolution
WIDTHS = (64, 96, 128)  # channels of its levels, by default
GROUPS, HEAD = 8, 32  # a level's channels are multiples of the first, those of the deepest of the second
MULTIPLE = STEM * 2 ** (len(WIDTHS) - 1)  # sides of what the network sees are multiples of this
LOG_RANGE = 3.0  # what it sees of depth is held within a factor of 20 of the median
LOG_B = (-6.0, 2.0)  # range of log_b


@dataclass(frozen=True, kw_only=True)
class CompletionSpec:
    """What a completion network was trained on, as `completion.json` says it."""

    size: tuple[int, int] = (64, 48)
    """Width and height in pixels of the images of the training: others are brought to about as many pixels."""
    trained_on: tuple[str, ...] = ()
    """Names of the training data."""
    steps: int = 0
    """Optimiser steps of the training."""
    license: str = "unknown"
    """Licence of the weights."""

    def __post_init__(self) -> None:
        if len(self.size) != 2 or any(not isinstance(n, int) or n < MULTIPLE or n % MULTIPLE for n in self.size):
            raise ValueError(f"size must be a width and a height in multiples of {MULTIPLE}, found {self.size}")


def network_input(
    rgb: Float[Tensor, "b 3 h w"], known: Float[Tensor, "b h w"], base: Float[Tensor, "b h w"]
) -> Float[Tensor, "b 6 h w"]:
    """What the network sees.

    Args:
        rgb: in [0, 1].
        known: planar depth, 0 where unknown.
        base: the same interpolated.
    """
    given = known > 0
    log_known = torch.where(given, known.clamp_min(1e-12).log(), torch.nan)
    middle = torch.nan_to_num(log_known.flatten(1).nanmedian(dim=1).values)[:, None, None]
    r = torch.where(given, log_known - middle, 0.0).clamp(-LOG_RANGE, LOG_RANGE)
    r_base = (base.log() - middle).clamp(-LOG_RANGE, LOG_RANGE)
    return torch.cat([2.0 * rgb - 1.0, torch.stack([r, given.float(), r_base], dim=1)], dim=1)


def check_widths(widths: tuple[int, int, int]) -> None:
    """Refuse channels that the network's groups and heads do not divide.

    Raises:
        InputError: names the flag.
    """
    if any(n < 1 or n % unit for n, unit in zip(widths, (GROUPS, GROUPS, HEAD))):
        raise InputError(
            f"--widths must be positive multiples of {GROUPS}, the last one of {HEAD}, "
            f"found {' '.join(map(str, widths))}."
        )


def make_network(widths: tuple[int, int, int] = WIDTHS) -> "UNet2DModel":
    """A freshly initialised network; call inside a seeded context for reproducible weights.

    Raises:
        InputError: widths that are no positive multiples of `GROUPS`, the last of `HEAD`.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    check_widths(widths)
    deep = len(widths) - 1
    network = UNet2DModel(
        in_channels=CHANNELS * STEM**2,
        out_channels=2 * STEM**2,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * deep + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * deep,
        norm_num_groups=GROUPS,
        attention_head_dim=HEAD,
    )
    nn.init.zeros_(network.conv_out.weight)  # it begins with the membrane
    return network


class DepthCompleter(nn.Module):
    """(rgb, known, base) -> (log_z, log_b) through a diffusers network, under bf16 autocast if so asked.

    Args:
        unet: of `make_network`. Its timestep, which has no meaning here, is always 0.
        spec: what it was trained on.
        bf16: precision inside the network.
    """

    def __init__(self, unet: nn.Module, spec: CompletionSpec, *, bf16: bool = False) -> None:
        super().__init__()
        self.unet, self.spec, self.bf16 = unet, spec, bf16

    def forward(
        self, rgb: Float[Tensor, "b 3 h w"], known: Float[Tensor, "b h w"], base: Float[Tensor, "b h w"]
    ) -> tuple[Float[Tensor, "b h w"], Float[Tensor, "b h w"]]:
        """Sides must be multiples of `MULTIPLE`; arguments as of `network_input`, depth in any unit."""
        x = F.pixel_unshuffle(network_input(rgb, known, base), STEM)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.unet(x, torch.zeros((), dtype=torch.int64, device=x.device)).sample
        correction, log_b = F.pixel_shuffle(out.float(), STEM).unbind(1)
        return base.log() + correction, log_b.clamp(*LOG_B)

    def see(self, rgb: Float[Tensor, "h w 3"], depth: Float[Tensor, "h w"]) -> "CompletionInput":
        """What `forward` takes, of an image of any size.

        Args:
            rgb: in [0, 1].
            depth: planar, 0 where unknown; some of it must be known.
        """
        height, width = depth.shape
        size = working_size(height, width, self.spec.size)
        mode = "area" if size[0] <= height else "nearest-exact"
        small = F.interpolate(rgb.permute(2, 0, 1)[None], size=size, mode=mode)
        known = shrink_known(depth[None], size)
        base = torch.from_numpy(membrane.interpolate(small[0].permute(1, 2, 0).numpy(), known[0].numpy()))
        return CompletionInput(small, known, base[None])

    def enlarge(
        self, log_z: Float[Tensor, "1 h w"], log_b: Float[Tensor, "1 h w"], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "_h _w"], Float[Tensor, "_h _w"]]:
        """Depth and its expected relative error in the pixels of the image, from what `forward` gave.

        Args:
            log_z: of `forward`.
            log_b: of `forward`.
            size: height and width of the image.
        """
        error = log_b.exp() + 0.5 * local_range(log_z)
        log_z, error = F.interpolate(torch.stack([log_z, error], dim=1), size=size, mode="bilinear")[0]
        return log_z.exp(), error

    @torch.no_grad()
    def complete(
        self, rgb: Float[Tensor, "h w 3"], depth: Float[Tensor, "h w"]
    ) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
        """Depth of all pixels of an image of any size, in the unit of ``depth``, and its expected relative error.

        Args:
            rgb: in [0, 1].
            depth: planar, 0 where unknown; some of it must be known.
        """
        log_z, log_b = self(*self.see(rgb, depth))
        return self.enlarge(log_z, log_b, (depth.shape[0], depth.shape[1]))


class CompletionInput(NamedTuple):
    """An image as `DepthCompleter.forward` takes it, in few pixels."""

    rgb: Float[Tensor, "1 3 h w"]
    known: Float[Tensor, "1 h w"]
    """Planar depth; 0 where unknown."""
    base: Float[Tensor, "1 h w"]
    """The same interpolated."""


def local_range(x: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Largest less smallest value among the 3 x 3 pixels about each: between two of them, enlarging makes up values."""
    high, low = (F.max_pool2d(sign * x, 3, stride=1, padding=1) for sign in (1.0, -1.0))
    return high + low


def working_size(height: int, width: int, trained: tuple[int, int]) -> tuple[int, int]:
    """Height and width near the image's shape, with about as many pixels as the training's, in multiples of 8."""
    scale = (trained[0] * trained[1] / (height * width)) ** 0.5
    return (
        max(round(height * scale / MULTIPLE), 1) * MULTIPLE,
        max(round(width * scale / MULTIPLE), 1) * MULTIPLE,
    )


def shrink_known(depth: Float[Tensor, "b h w"], size: tuple[int, int]) -> Float[Tensor, "b _h _w"]:
    """Known depth in fewer pixels: of the known ones under each new one the nearest surface, 0 where none is known."""
    inverse = torch.where(depth > 0, 1.0 / depth.clamp_min(1e-12), 0.0)
    nearest = F.adaptive_max_pool2d(inverse, size)
    return torch.where(nearest > 0, 1.0 / nearest.clamp_min(1e-12), 0.0)


def completion_loss(
    log_z: Float[Tensor, "b h w"],
    log_b: Float[Tensor, "b h w"],
    z: Float[Tensor, "b h w"],
    valid: Bool[Tensor, "b h w"],
    *,
    spread_weight: float,
) -> Float[Tensor, ""]:
    """Mean over valid pixels of |e| + spread_weight (|e| / b + log b) with e = log_z - log z.

    The second part is minus the log likelihood of a Laplace distribution. It teaches b alone: were it to teach z,
    pixels that are known well would count most.
    """
    error = (log_z - z.clamp_min(1e-12).log()).abs().clamp_max(LOG_RANGE)
    likelihood = error.detach() * torch.exp(-log_b) + log_b
    count = valid.sum().clamp_min(1)
    mean_error = torch.where(valid, error, 0.0).sum() / count
    return mean_error + spread_weight * torch.where(valid, likelihood, 0.0).sum() / count


def save_completer(folder: Path, unet: "UNet2DModel", spec: CompletionSpec) -> None:
    """Write network and spec into a folder, weights in the precision that they have."""
    unet.save_pretrained(folder, safe_serialization=True)
    (folder / SPEC_FILE).write_text(json.dumps(asdict(spec), indent=2) + "\n")


def load_completer(folder: Path) -> DepthCompleter:
    """The network of a folder that `save_completer` wrote, frozen, in fp32 on the CPU: an image needs it once.

    Raises:
        InputError: files are missing or damaged, or the weights do not fit.
    """
    from ddm_training.unet import load_weights

    try:
        content: dict[str, Any] = json.loads((folder / SPEC_FILE).read_text())
        content |= {name: tuple(content[name]) for name in ("size", "trained_on") if name in content}
        spec, config = CompletionSpec(**content), json.loads((folder / "config.json").read_text())
        channels = config["in_channels"], config["out_channels"]
        levels = len(config.get("block_out_channels", WIDTHS))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{folder} is no completion network ({error}): make it again with `ddm train-completion`."
        ) from error
    if channels != (CHANNELS * STEM**2, 2 * STEM**2):
        raise InputError(
            f"{folder} predicts {channels[1]} from {channels[0]} channels; this version completes depth with "
            f"{2 * STEM**2} from {CHANNELS * STEM**2}."
        )
    if levels != len(WIDTHS):
        raise InputError(f"{folder} has a network of {levels} levels; this version completes depth with {len(WIDTHS)}.")
    unet = nn.Module.to(load_weights(folder, config), torch.float32)  # diffusers' own `to` warns about another case
    return DepthCompleter(unet, spec).eval().requires_grad_(False)
