"""Depth between the pixels whose depth is known: inverse depth as a membrane that gives way where colours change.

Levin et al. 2004 spread colours along grey values in this way. The first guess of `completion`'s network, and what
there is without one.
"""

import numpy as np
from jaxtyping import Float
from scipy.linalg import solveh_banded

COLOUR_SIGMA = 0.02  # difference of colours, in [0, 1], across which depth may change
WEAKEST_LINK = 1e-3  # between pixels of different colours


def interpolate(rgb: Float[np.ndarray, "h w 3"], depth: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Depth of all pixels from those that are known.

    The inverse depth x that minimises sum over neighbours of w_ij (x_i - x_j)^2 plus sum over known pixels of
    (x_i - 1 / depth_i)^2, with w_ij = exp(-|c_i - c_j|^2 / (2 sigma^2)) + `WEAKEST_LINK` of the colours c.

    Args:
        rgb: in [0, 1].
        depth: planar, 0 where unknown; some of it must be known.

    Returns:
        Planar depth in the same units, close to ``depth`` where that is known and nowhere beyond the farthest of it.
    """
    if depth.shape[0] > depth.shape[1]:  # the band of the system is as wide as the columns are long
        return interpolate(rgb.transpose(1, 0, 2), depth.T).T
    colours, known = rgb.transpose(1, 0, 2).astype(np.float64), depth.T > 0
    inverse = np.divide(1.0, depth.T, where=known, out=np.zeros(known.shape))
    width, height = known.shape
    right, down = (
        np.exp(-(np.diff(colours, axis=axis) ** 2).sum(-1) / (2.0 * COLOUR_SIGMA**2)) + WEAKEST_LINK for axis in (0, 1)
    )
    diagonal = known.astype(np.float64)
    diagonal[1:] += right
    diagonal[:-1] += right
    diagonal[:, 1:] += down
    diagonal[:, :-1] += down
    band = np.zeros((height + 1, width, height))
    band[0] = diagonal
    band[1, :, :-1] -= down
    band[height, :-1] -= right
    band, target = band.reshape(height + 1, -1), (known * inverse).ravel()
    x = solveh_banded(band, target, lower=True, overwrite_ab=True, overwrite_b=True, check_finite=False)
    return (1.0 / x.reshape(width, height).clip(min=inverse[known].min())).T.astype(np.float32)
