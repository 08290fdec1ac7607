"""The one definition of the RGBD encoding that the diffusion model sees, both ways, and of `rgbd.json`.

Notation
    z      planar depth in metres, > 0            [..., h, w]
    rgb    colour in [0, 1]                       [..., 3, h, w]
    d      inverse depth, near / max(z, near)     (0, 1]
    x      a patch, (2 rgb - 1, 2 d - 1)          [..., 4, h, w], each channel in [-1, 1]; far away is d -> 0, x -> -1
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ddm_training.errors import InputError

NEAR = 0.2  # metres; the authors' value: nearer surfaces are encoded as if they were at this depth
SPEC_FILE = "rgbd.json"


def encode_depth(z: Float[Tensor, "*shape"], near: float = NEAR) -> Float[Tensor, "*shape"]:
    """x = 2 near / max(z, near) - 1, for planar depth ``z`` in metres. Zero gradient where z < near."""
    return 2.0 * near / z.clamp_min(near) - 1.0


def decode_depth(x: Float[Tensor, "*shape"], near: float = NEAR, far: float = 1000.0) -> Float[Tensor, "*shape"]:
    """z = 2 near / (x + 1) in metres, held in [near, far]: a noisy x can lie outside [-1, 1]."""
    return 2.0 * near / (x + 1.0).clamp(2.0 * near / far, 2.0)


def encode(
    rgb: Float[Tensor, "*batch 3 h w"], z: Float[Tensor, "*batch h w"], near: float = NEAR
) -> Float[Tensor, "*batch 4 h w"]:
    """Colour in [0, 1] and planar depth in metres -> patch with four channels in [-1, 1]."""
    return torch.cat([2.0 * rgb - 1.0, encode_depth(z, near).unsqueeze(-3)], dim=-3)


def decode(
    x: Float[Tensor, "*batch 4 h w"], near: float = NEAR, far: float = 1000.0
) -> tuple[Float[Tensor, "*batch 3 h w"], Float[Tensor, "*batch h w"]]:
    """Patch -> colour held in [0, 1] and planar depth in metres held in [near, far]."""
    return (0.5 * (x[..., :3, :, :] + 1.0)).clamp(0.0, 1.0), decode_depth(x[..., 3, :, :], near, far)


@dataclass(frozen=True, kw_only=True)
class RgbdSpec:
    """What a prior was trained on, as `rgbd.json` in its folder says it."""

    encoding: Literal["inverse-depth"] = "inverse-depth"
    """How depth becomes a channel; `encode_depth` is the only one."""
    near: float = NEAR
    """Depth in metres that is encoded as +1."""
    units: Literal["metres"] = "metres"
    """Units of depth before encoding."""
    patch_size: int = 48
    """Side of a patch in pixels."""
    focal: float = 175.0
    """Focal length in pixels of the camera whose image a patch is a window of (the paper: 175 at 256 x 192)."""
    focal_range: tuple[float, float] = (175.0, 175.0)
    """Smallest and largest focal length in pixels that was seen in training (crop scale augmentation)."""
    image_size: tuple[int, int] = (256, 192)
    """Width and height in pixels of the pseudo image that a patch is a window of, at `focal`; see `pseudo_image`."""
    disparity_quantiles: dict[str, float] = field(default_factory=dict)
    """Quantiles of 1/z in 1/metres over the training data, after depth augmentation; keys like "0.50"."""
    depth_scale_jitter: float = 1.0
    """Depth of a training patch was multiplied by a log-uniform factor in [1 / this, this]."""
    trained_on: tuple[str, ...] = ()
    """Names of the training data."""
    steps: int = 0
    """Optimiser steps of the training."""
    license: str = "unknown"
    """Licence of the weights."""

    def __post_init__(self) -> None:
        if self.encoding != "inverse-depth":
            raise InputError(f"encoding {self.encoding!r} is unknown; expected 'inverse-depth'.")
        if self.units != "metres":
            raise InputError(f"units {self.units!r} are unknown; expected 'metres'.")
        if not self.near > 0:
            raise InputError(f"near must be positive metres, found {self.near}.")
        if self.patch_size < 8 or self.patch_size % 8:
            raise InputError(f"patch_size must be a positive multiple of 8, found {self.patch_size}.")
        low, high = self.focal_range
        if not 0 < low <= self.focal <= high:
            raise InputError(
                f"focal lengths must satisfy 0 < low <= focal <= high, found {low}, {self.focal}, {high} pixels."
            )

    def save(self, folder: Path) -> None:
        """Write `rgbd.json` into a prior folder."""
        (folder / SPEC_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "RgbdSpec":
        """Read `rgbd.json` of a prior folder.

        Raises:
            InputError: the file is missing, is not JSON, or says something that this version does not know.
        """
        path = folder / SPEC_FILE
        if not path.is_file():
            raise InputError(
                f"{folder} is not a prior folder: it has no {SPEC_FILE}. `ddm train` and `ddm convert` write such "
                "folders; a plain diffusers model does not say how depth is encoded and cannot be used."
            )
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid JSON: {error}.") from error
        known = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or (unknown := set(content) - known):
            found = sorted(unknown) if isinstance(content, dict) else type(content).__name__
            raise InputError(f"{path} holds unknown entries {found}; known are {sorted(known)}.")
        for name, what in (("focal_range", "two numbers"), ("image_size", "two numbers"), ("trained_on", "names")):
            if name in content:
                value = content[name]
                if not isinstance(value, list) or (what == "two numbers" and len(value) != 2):
                    raise InputError(f"{path}: {name} must be a list of {what}, found {value!r}.")
                content[name] = tuple(value)
        try:
            return cls(**content)
        except (InputError, TypeError) as error:
            raise InputError(f"{path}: {error}") from error


def pseudo_image(focal: float) -> tuple[int, int]:
    """Width and height in pixels of the pseudo image at a focal length in pixels: the paper's field of view.

    256 x 192 times focal / 175.
    """
    scale = focal / RgbdSpec.focal
    width, height = (max(round(side * scale), 1) for side in RgbdSpec.image_size)
    return width, height
