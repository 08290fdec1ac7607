"""Changes of colour that the networks see their samples with."""

from jaxtyping import Float
from torch import Tensor

EXPOSURE, BALANCE, GAMMA = 0.25, 0.06, 0.25  # largest logarithms of factors and exponents
SATURATION, GREY = (0.7, 1.25), 0.05  # range of the factor, and the share of samples without any


def adjust_colors(
    rgb: Float[Tensor, "b 3 h w"],
    *,
    gain: Float[Tensor, "b 3"],
    gamma: Float[Tensor, " b"],
    saturation: Float[Tensor, " b"],
) -> Float[Tensor, "b 3 h w"]:
    """Exposure and white balance, gamma, saturation; colours in [0, 1] and the same after each."""
    rgb = (rgb * gain[:, :, None, None]).clamp(0, 1) ** gamma[:, None, None, None]
    grey = rgb.mean(dim=1, keepdim=True)
    return (grey + saturation[:, None, None, None] * (rgb - grey)).clamp(0, 1)
