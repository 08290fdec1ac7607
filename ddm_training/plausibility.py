"""Whether samples look like data, in numbers: statistics of a patch, their range in data, and histograms.

Notation
    x    encoded patches                                                         [n, 4, h, w]
    d    inverse depth near / z in [0, 1], (x_3 + 1) / 2 held in that range      [n, h, w]
    g    size of the forward difference to the right and below                   [n, h - 1, w - 1]

A sample is plausible when each of its `STATISTICS` lies between the 0.5 % and the 99.5 % quantile of that statistic
over patches of the data. Data itself does not quite reach a share of 1: the share of other data patches is given beside
that of the samples.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

STATISTICS = (
    "disparity mean",
    "disparity deviation",
    "disparity gradient mean",
    "disparity gradient 90 %",
    "colour mean",
    "colour deviation",
    "colour gradient mean",
    "colour gradient 90 %",
)
QUANTILES = (0.005, 0.995)
DEPTH_BINS = np.linspace(-1.0, 1.0, 65)  # the encoded depth channel; far is -1
GRADIENT_BINS = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 48)])


def gradient_size(v: Float[Tensor, "n h w"]) -> Float[Tensor, "n h_1 w_1"]:
    """g = sqrt((v[i, j + 1] - v[i, j])^2 + (v[i + 1, j] - v[i, j])^2)."""
    right = v[:, :-1, 1:] - v[:, :-1, :-1]
    below = v[:, 1:, :-1] - v[:, :-1, :-1]
    return (right.square() + below.square()).sqrt()


def patch_statistics(x: Float[Tensor, "n 4 h w"]) -> Float[Tensor, "n 8"]:
    """`STATISTICS` of each patch."""
    columns = []
    for value in (0.5 * (x[:, 3] + 1).clamp(0, 2), 0.5 * (x[:, :3].mean(dim=1) + 1).clamp(0, 2)):
        g = gradient_size(value).flatten(1)
        columns += [value.mean(dim=(1, 2)), value.flatten(1).std(dim=1), g.mean(dim=1), g.quantile(0.9, dim=1)]
    return torch.stack(columns, dim=1)


def plausible_share(samples: Float[Tensor, "n k"], data: Float[Tensor, "m k"]) -> tuple[float, Float[Tensor, " k"]]:
    """Share of samples all of whose statistics lie in the range of the data, and the share for each statistic."""
    low, high = torch.quantile(data, torch.tensor(QUANTILES, dtype=data.dtype), dim=0)
    inside = (samples >= low) & (samples <= high)
    return inside.all(dim=1).float().mean().item(), inside.float().mean(dim=0)


def histogram(values: Float[Tensor, "*shape"], bins: np.ndarray) -> Float[np.ndarray, " bins"]:
    """Share of values in each bin; values beyond the bins count in the outermost ones."""
    clipped = np.clip(values.cpu().numpy().ravel(), bins[0], bins[-1])
    counts, _ = np.histogram(clipped, bins)
    return counts / counts.sum()


def total_variation(p: Float[np.ndarray, " bins"], q: Float[np.ndarray, " bins"]) -> float:
    """Half the sum of |p - q|: 0 for equal histograms, 1 for disjoint ones."""
    return 0.5 * float(np.abs(p - q).sum())
