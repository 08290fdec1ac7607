"""What few views change in nerfacto's fields: where the grid lies, when its fine levels join, and how far colour may
depend on the view.

Notation
    c, r    centre and half side of the cube that holds the scene's content     scene units
    a       number of hash levels switched on, not whole while one is fading in
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.field_components.mlp import MLP
from nerfstudio.field_components.spatial_distortions import SceneContraction
from nerfstudio.fields.nerfacto_field import NerfactoField
from nerfstudio.utils.external import TCNN_EXISTS
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn


def choose_implementation(wanted: Literal["tcnn", "torch"], on_cuda: bool) -> Literal["tcnn", "torch"]:
    """What is wanted if it can be had, else torch: tinycudann needs a CUDA device and to be installed."""
    if wanted == "tcnn" and not (TCNN_EXISTS and on_cuda):
        why = "tinycudann is not installed" if on_cuda else "no CUDA device"
        CONSOLE.print(f"[yellow]Hash grids run in plain torch: {why}.")
        return "torch"
    return wanted


class ContentContraction(SceneContraction):
    """mip-NeRF 360's contraction (L-infinity) of (x - c) / r instead of x.

    nerfstudio scales a scene by its cameras. In a forward-facing capture the cameras are close together and all content
    lies several scene units away, where the contraction leaves it a few percent of the grid. Here the uncontracted cube
    is where the content is.

    Args:
        centre: c; the origin keeps nerfstudio's own.
        radius: r; 1 keeps nerfstudio's own.
    """

    centre: Float[Tensor, "3"]
    radius: Float[Tensor, ""]

    def __init__(self, centre: tuple[float, float, float] = (0.0, 0.0, 0.0), radius: float = 1.0) -> None:
        super().__init__(order=float("inf"))
        # In checkpoints: they come from the training images, which rendering a finished run need not load.
        self.register_buffer("centre", torch.tensor(centre, dtype=torch.float32))
        self.register_buffer("radius", torch.tensor(radius, dtype=torch.float32))

    def forward(self, positions: Tensor) -> Tensor:
        """Positions in scene units -> (-2, 2) on each axis."""
        x = (positions - self.centre) / self.radius
        # as nerfstudio's; its norm over an axis of three takes several times as long on a CPU
        a, b, c = x.abs().unbind(-1)
        size = torch.maximum(torch.maximum(a, b), c)[..., None]
        return torch.where(size < 1.0, x, (2.0 - 1.0 / size) * (x / size))


class LevelMask(nn.Module):
    """Multiplies the features of hash level l (from 0) by min(max(a - l, 0), 1).

    Coarse to fine: with few views the fine levels can explain the images without any geometry (FreeNeRF, Yang et al.
    2023, does the same to the frequencies of a positional encoding).

    Args:
        levels: number of levels.
        features: features per level.
    """

    weights: Float[Tensor, " features"]

    def __init__(self, levels: int, features: int) -> None:
        super().__init__()
        self.levels, self.features = levels, features
        # In checkpoints: a run that is rendered half way must be rendered with the levels that it had.
        self.register_buffer("weights", torch.ones(levels * features))

    @torch.no_grad()
    def set_active(self, active: float) -> None:
        """Switch on the first ``active`` levels."""
        level = torch.arange(self.levels, device=self.weights.device)
        self.weights.copy_((active - level).clamp(0.0, 1.0).repeat_interleave(self.features))

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Features of all levels, masked."""
        return x * self.weights.to(x.dtype)


def insert_level_mask(field: NerfactoField, config: Any) -> LevelMask:
    """Rebuild the density network of nerfacto's field as hash grid, mask, MLP, and return the mask.

    Args:
        field: its `mlp_base` is replaced.
        config: a `NerfactoModelConfig`, for the sizes and for the implementation: as two modules, tinycudann's
            encoding and network work the same.
    """
    grid = HashEncoding(
        num_levels=config.num_levels,
        min_res=config.base_res,
        max_res=config.max_res,
        log2_hashmap_size=config.log2_hashmap_size,
        features_per_level=config.features_per_level,
        implementation=config.implementation,  # pyright: ignore[reportArgumentType]
    )
    mask = LevelMask(config.num_levels, config.features_per_level)
    network = MLP(
        in_dim=grid.get_out_dim(),
        num_layers=2,
        layer_width=config.hidden_dim,
        out_dim=1 + field.geo_feat_dim,
        activation=nn.ReLU(),
        out_activation=None,
        implementation=config.implementation,  # pyright: ignore[reportArgumentType]
    )
    field.mlp_base = nn.Sequential(grid, mask, network)  # pyright: ignore[reportAttributeAccessIssue]
    return mask


@torch.no_grad()
def draw_weights(field: nn.Module) -> None:
    """Draw the weights of a field's plain torch networks as tinycudann draws its own: Glorot and Bengio's, no biases.

    PyTorch's are smaller, from layer to layer more so: after five layers next to nothing of a colour's hue is left, and
    a run of a thousand steps ends with what is red or green still grey. tinycudann's own networks are left as they are.
    """
    for layer in field.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def restart(network: nn.Module) -> None:
    """Draw a network's weights anew, tinycudann's by itself. All processes of a run get those of the first."""
    draw_weights(network)
    for module in network.modules():
        native = getattr(module, "native_tcnn_module", None)
        if native is not None:
            params: Tensor = module.params  # pyright: ignore[reportAssignmentType]
            params.copy_(native.initial_params(int(torch.randint(2**31, ()))))
    if torch.distributed.is_initialized():
        for weights in network.parameters():
            torch.distributed.broadcast(weights, src=0)


def in_any_process(happened: bool, device: torch.device) -> bool:
    """Whether something happened in any process of a run."""
    if not torch.distributed.is_initialized():
        return happened
    count = torch.tensor(float(happened), device=device)
    torch.distributed.all_reduce(count)
    return bool(count > 0)


def colours_died(
    rgb: Float[Tensor, "rays 3"], true: Float[Tensor, "rays 3"], accumulation: Float[Tensor, "rays 1"]
) -> bool:
    """Whether all that is opaque is rendered black where it is not: a sigmoid so far out has no gradient any more.

    The first steps of an object that is dark before its background can drive all colours there at once.
    """
    opaque = accumulation[:, 0] > 0.99  # what is behind shines through by less than a hundredth
    if not bool(opaque.any()):
        return False
    return float(rgb[opaque].amax()) < 0.01 and float(true[opaque].amax()) > 0.2


def limit_view_dependence(field: NerfactoField, degrees: int) -> None:
    """Let colour depend on the view only through spherical harmonics of fewer than ``degrees`` degrees (at most 4).

    With few views, colour that depends freely on the view lets each view explain itself on any geometry.
    """
    keep = degrees**2

    def drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([output[..., :keep], torch.zeros_like(output[..., keep:])], dim=-1)

    if degrees < 4:
        field.direction_encoding.register_forward_hook(drop)


def use_contraction(fields: Sequence[nn.Module], contraction: ContentContraction) -> None:
    """Give fields a contraction in place of their own."""
    for field in fields:
        field.spatial_distortion = contraction
