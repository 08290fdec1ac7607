"""Normalised cross-correlation of the windows about the pixels of two images: how alike they look."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

WINDOW = 5  # pixels


def box_mean(x: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 c h w"]:
    """Mean over the window, rows and columns one after the other; at the border over what there is."""
    half = WINDOW // 2
    x = F.avg_pool2d(x, (1, WINDOW), stride=1, padding=(0, half), count_include_pad=False)
    return F.avg_pool2d(x, (WINDOW, 1), stride=1, padding=(half, 0), count_include_pad=False)


Moments = tuple[Float[Tensor, "1 1 h w"], Float[Tensor, "1 1 h w"]]


def window_moments(grey: Float[Tensor, "1 1 h w"]) -> Moments:
    """Mean and variance of the window about each pixel."""
    mean = box_mean(grey)
    return mean, (box_mean(grey.square()) - mean.square()).clamp_min(0.0)


def normalised_cross_correlation(
    grey: Float[Tensor, "1 1 h w"], moments: Moments, other: Float[Tensor, "1 1 h w"], texture: float
) -> Float[Tensor, "1 1 h w"]:
    """Pixel by pixel, 2 cov / (var + var) of the windows of two images (Moravec 1977); about 0 where both are plain.

    With the product of the deviations below the line instead, a plain window can pass for an edge, however faint its
    correlation: walls are then matched with the outline of what stands before them.

    Args:
        grey: in [0, 1].
        moments: of ``grey``.
        other: in [0, 1].
        texture: variance of grey values of windows with much less of which the correlation says nothing.
    """
    mean, variance = moments
    m, square, product = box_mean(torch.cat([other, other.square(), grey * other], dim=1)).split(1, dim=1)
    spread = 0.5 * (variance + (square - m.square()).clamp_min(0.0))
    return (product - mean * m) / (spread + texture)
