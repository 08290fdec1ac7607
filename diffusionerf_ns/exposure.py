"""How the exposures of the training images differ, by the colours of the surfaces that stereo matched between them.

Cameras that choose exposure and white balance anew for each photograph give one surface several colours. A NeRF then
explains them by what looks different from different sides: fog, and blotches where the images meet.

Notation
    c_i     colour of a surface in image i, in [0, 1]                       [3]
    e_i     exposure of image i: log c_i = log c + e_i for all surfaces     [3], mean 0 over images
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

DIFFERENT = 0.05  # of exposures, from which they are taken into account
RANGE = (0.05, 0.95)  # of colours that are compared: neither black nor burnt out
LEAST_PIXELS = 50  # of a pair of images

Pair = tuple[int, int, Float[Tensor, "n 3"], Float[Tensor, "n 3"]]
"""Two images, and the colours of the same surfaces in the first and in the second."""


def from_pairs(count: int, pairs: Iterable[Pair]) -> Float[Tensor, "images 3"]:
    """Exposures e of all images, by least squares over the median differences of pairs.

    Each pair counts as the square root of its pixels. Images that no chain of pairs links have each their own mean 0.

    Args:
        count: number of images.
        pairs: what is known of them.
    """
    rows, differences, weights = [], [], []
    low, high = RANGE
    for first, second, a, b in pairs:
        usable = ((a > low) & (a < high) & (b > low) & (b < high)).all(dim=-1)
        if int(usable.sum()) < LEAST_PIXELS:
            continue
        row = torch.zeros(count)
        row[first], row[second] = 1.0, -1.0
        rows.append(row)
        differences.append((a[usable].log() - b[usable].log()).median(dim=0).values)
        weights.append(float(usable.sum()) ** 0.5)
    if not rows:
        return torch.zeros(count, 3)
    weight = torch.tensor(weights)[:, None]
    # The solution of the smallest norm: its mean is 0.
    return torch.linalg.lstsq(weight * torch.stack(rows), weight * torch.stack(differences), driver="gelsd").solution


def differ(exposures: Float[Tensor, "images 3"]) -> bool:
    """Whether they differ by more than surfaces themselves look different from different sides."""
    return bool(exposures.abs().max() > DIFFERENT)
