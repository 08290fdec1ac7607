"""Semi-global matching: depth of every pixel from its own matching cost and that of the pixels around it.

A pixel's cost alone says little where texture is weak or repeats. Summing, from four sides, the cheapest way to reach
each depth while neighbours rarely change theirs (Hirschmueller 2008) carries what is known into such places, and moves
changes of depth to where the image changes.

Notation
    C(p, d)   matching cost of pixel p at depth d
    L(p, d)   C(p, d) + min(L(q, d), L(q, d +- 1) + SMALL, min_k L(q, k) + P(p)) - min_k L(q, k), q the pixel before p
"""

import torch
from jaxtyping import Float
from torch import Tensor

SMALL = 0.05  # cost of one depth more or less than the neighbour's: slanted surfaces
LARGE = 0.6  # cost of any other change, where the image is flat
EDGE = 20.0  # how quickly that falls with the difference of grey values, in [0, 1]


def aggregate(cost: Float[Tensor, "depths h w"], grey: Float[Tensor, "h w"]) -> Float[Tensor, "depths h w"]:
    """Mean over four directions of L.

    Args:
        cost: C, about 0 to 1 where the images agree and do not.
        grey: the image, in [0, 1].
    """
    columns = _to_and_fro(cost.permute(2, 0, 1), grey.T).permute(1, 2, 0)
    rows = _to_and_fro(cost.permute(1, 0, 2), grey).permute(1, 0, 2)
    return (columns + rows) / 4.0


def _to_and_fro(cost: Float[Tensor, "n depths m"], grey: Float[Tensor, "n m"]) -> Float[Tensor, "n depths m"]:
    """Sum of L along the first dimension and against it."""
    penalty = (LARGE / (1.0 + EDGE * (grey[1:] - grey[:-1]).abs())).clamp_min(2.0 * SMALL)
    return _walk(cost, penalty) + _walk(cost.flip(0), penalty.flip(0)).flip(0)


def _walk(cost: Float[Tensor, "n depths m"], penalty: Float[Tensor, "n-1 m"]) -> Float[Tensor, "n depths m"]:
    """L along the first dimension."""
    out = torch.empty_like(cost)
    out[0] = before = cost[0]
    for i in range(1, len(cost)):
        least = before.min(dim=0).values
        reach = torch.minimum(before, least + penalty[i - 1])
        reach[1:] = torch.minimum(reach[1:], before[:-1] + SMALL)
        reach[:-1] = torch.minimum(reach[:-1], before[1:] + SMALL)
        out[i] = before = cost[i] + reach - least
    return out
