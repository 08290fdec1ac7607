"""nerfstudio's torch hash grid, faster: the same table, the same numbers, no tinycudann.

Notation
    n       points                                  x in [0, 1]^3           [n, 3]
    l       levels, each with its own resolution                            scalings [l]
    T       entries of a level's table, a power of two
    f       features of an entry                    table                   [l * T, f]
    corner  one of the 8 grid points around x, with its entry's row and its trilinear weight

nerfstudio's version gathers the 8 corners one by one in 64-bit integers and differentiates every product of the
interpolation. Here one `embedding_bag` sums the weighted corners, hashes are 32 bits wide (only their low bits are
used), and the backward pass adds into the table alone.
"""

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from nerfstudio.field_components.encodings import HashEncoding
from torch import Tensor, nn
from torch.nn import functional as F

# The primes of Instant-NGP (Mueller et al. 2022, eq. 4); the first is 1. As signed 32-bit integers: products wrap.
PRIME_Y = 2654435761 - 2**32
PRIME_Z = 805459861
POINTS = 1 << 19  # of a view are encoded at a time: rows and weights take up to 3 kB a point


@torch.no_grad()
def corners(
    x: Float[Tensor, "n 3"], scalings: Float[Tensor, " l"], table_size: int
) -> tuple[Int[Tensor, "n l 8"], Float[Tensor, "n l 8"]]:
    """Rows and trilinear weights of the 8 corners of x on every level; the 8 weights sum to 1."""
    scaled = x[:, None, :] * scalings[:, None]
    floor = scaled.floor()
    high, low = (scaled - floor).unbind(-1), (1.0 - (scaled - floor)).unbind(-1)
    # Python's numbers: a tensor of the primes would be copied to the device, and waited for, with every call.
    low_key, high_key = (
        (i, j * PRIME_Y, k * PRIME_Z) for i, j, k in (floor.int().unbind(-1), scaled.ceil().int().unbind(-1))
    )

    def combine(operation: Any, low: Any, high: Any) -> Tensor:
        """The 8 ways to take one of (low, high) for each of x, y, z."""
        xy = torch.stack([operation(a, b) for a in (low[0], high[0]) for b in (low[1], high[1])], dim=-1)
        return torch.cat([operation(xy, low[2][..., None]), operation(xy, high[2][..., None])], dim=-1)

    level = torch.arange(len(scalings), dtype=torch.int32, device=x.device) * table_size
    rows = (combine(torch.bitwise_xor, low_key, high_key) & (table_size - 1)) + level[:, None]
    return rows, combine(torch.mul, low, high)


class _WeightedRows(torch.autograd.Function):
    """sum_k weights[:, k] table[rows[:, k]]; the gradient reaches the table only."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.shape = table.shape
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, weights = ctx.saved_tensors
        flat = rows.reshape(-1)
        # Feature by feature: on the CPU adding scalars is several times faster than adding short rows.
        columns = [
            torch.zeros(ctx.shape[0], dtype=g.dtype, device=g.device).index_add_(0, flat, (weights * g).reshape(-1))
            for g in (grads[0][:, i, None] for i in range(ctx.shape[1]))
        ]
        return torch.stack(columns, dim=-1), None, None


def encode(grid: HashEncoding, x: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch features"]:
    """The encoding of x: a drop-in for `HashEncoding.pytorch_fwd`, without a gradient for x.

    Many points are encoded in parts where no gradient is asked for, so that memory does not grow with the view.
    """
    if grid.scalings.device != x.device:
        grid.scalings = grid.scalings.to(x.device)  # no buffer in nerfstudio: it stays where it was made
    flat = x.detach().reshape(-1, 3)
    parts = [flat] if torch.is_grad_enabled() else flat.split(POINTS)
    features = torch.cat([_features(grid, part) for part in parts])
    return features.reshape(*x.shape[:-1], features.shape[-1])


def _features(grid: HashEncoding, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n features"]:
    rows, weights = corners(x, grid.scalings, grid.hash_table_size)
    features = _WeightedRows.apply(grid.hash_table, rows.reshape(-1, 8), weights.reshape(-1, 8))
    return features.reshape(len(x), -1)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def speed_up_hash_grids(module: nn.Module) -> int:
    """Let all torch hash grids of a module use `encode`, and return how many there are.

    Parameters and checkpoints stay as they are. Not for models that need the gradient with respect to position
    (nerfacto's `predict_normals` and `camera_optimizer`).
    """
    grids = [m for m in module.modules() if isinstance(m, HashEncoding) and m.tcnn_encoding is None]
    for grid in grids:
        grid.pytorch_fwd = MethodType(encode, grid)
    return len(grids)
