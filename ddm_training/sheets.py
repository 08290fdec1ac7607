"""Pictures of patches: colour and depth side by side."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ddm_training import rgbd

DEPTH_SHOWN = (0.3, 20.0)  # metres, from the first to the last colour of the map, logarithmic


def color_depth(z: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Depth in metres as colours of one fixed logarithmic scale: near is red, far is blue."""
    from matplotlib import colormaps

    low, high = np.log(DEPTH_SHOWN)
    nearness = 1 - (np.log(np.clip(z, *DEPTH_SHOWN)) - low) / (high - low)
    return (colormaps["turbo"](nearness)[..., :3] * 255).round().astype(np.uint8)


def patch_sheet(
    x: Float[Tensor, "n 4 h w"], *, near: float = rgbd.NEAR, columns: int = 8, zoom: int = 2
) -> UInt8[np.ndarray, "height width 3"]:
    """Encoded patches as a picture of cells, each colour | depth."""
    rgb, z = rgbd.decode(x.detach().float().cpu(), near)
    colors = (rgb * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    cells = np.concatenate([colors, color_depth(z.numpy())], axis=2)
    cells = cells.repeat(zoom, axis=1).repeat(zoom, axis=2)
    cells = np.pad(cells, ((0, -len(cells) % columns), (2, 2), (2, 2), (0, 0)), constant_values=255)
    count, height, width, _ = cells.shape
    rows = cells.reshape(count // columns, columns, height, width, 3)
    return rows.transpose(0, 2, 1, 3, 4).reshape(-1, columns * width, 3)


def save_picture(path: Path, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write a PNG."""
    from PIL import Image

    Image.fromarray(picture).save(path, format="PNG")
