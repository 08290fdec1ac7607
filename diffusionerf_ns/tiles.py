"""Judging a view of any size by a network that looks at squares: overlapping tiles, blended smoothly."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Judge = Callable[[Float[Tensor, "b c i j"]], Float[Tensor, "b d i j"]]
PIXELS_PER_BATCH = 16 * 48 * 48


def over_tiles(x: Float[Tensor, "c h w"], size: int, multiple: int, judge: Judge) -> Float[Tensor, "d h w"]:
    """The judgement of a whole view.

    A view no larger than a tile is one input, its sides brought to a multiple by repeating the last row and column.

    Args:
        x: the view.
        size: side of a tile, a multiple of ``multiple``.
        multiple: the network takes sides that are multiples of this.
        judge: the network, on a batch of tiles.
    """
    height, width = x.shape[1:]
    sides = [min(size, -(-length // multiple) * multiple) for length in (height, width)]
    more = [max(side - length, 0) for side, length in zip(sides, (height, width))]
    x = F.pad(x[None], (0, more[1], 0, more[0]), mode="replicate")[0]
    corners = [(top, left) for top in _starts(x.shape[1], sides[0]) for left in _starts(x.shape[2], sides[1])]
    if len(corners) == 1:
        return judge(x[None])[0, :, :height, :width]
    ramps = [torch.sin(torch.pi * (torch.arange(side, device=x.device) + 0.5) / side).square() + 1e-3 for side in sides]
    window = ramps[0][:, None] * ramps[1]
    total, weight = None, torch.zeros_like(x[:1])
    for batch in _batches(corners, max(PIXELS_PER_BATCH // (sides[0] * sides[1]), 1)):
        judged = judge(torch.stack([x[:, v : v + sides[0], u : u + sides[1]] for v, u in batch]))
        if total is None:
            total = x.new_zeros(judged.shape[1], *x.shape[1:])
        for (v, u), tile in zip(batch, judged):
            total[:, v : v + sides[0], u : u + sides[1]] += window * tile
            weight[:, v : v + sides[0], u : u + sides[1]] += window
    assert total is not None
    return (total / weight)[:, :height, :width]


def _starts(length: int, size: int) -> list[int]:
    """Where tiles begin along an axis: two thirds of a tile apart, the last one flush with the end."""
    return [*range(0, length - size, max(2 * size // 3, 1)), length - size]


def _batches(items: list[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    return [items[i : i + count] for i in range(0, len(items), count)]
