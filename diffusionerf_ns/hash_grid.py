"""nerfstudio's torch hash grid, faster: the same table, the same numbers, no tinycudann.

Notation
    n       points                                  x in [0, 1]^3           [n, 3]
    l       levels, each with its own resolution                            scalings [l]
    T       entries of a level's table, a power of two
    f       features of an entry                    table                   [l * T, f]
    corner  one of the 8 grid points around x, with its entry's row and its trilinear weight

nerfstudio's version gathers the 8 corners one by one in 64-bit integers and differentiates every product of the
interpolation. Here one `embedding_bag` sums the weighted corners, hashes are 32 bits wide (only their low bits are
used), and the backward pass adds into the table alone. A CPU takes as many points at a time as its caches hold.
"""

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from nerfstudio.field_components.encodings import HashEncoding
from torch import Tensor, nn
from torch.nn import functional as F

# The primes of Instant-NGP (Mueller et al. 2022, eq. 4). As signed 32-bit integers: products wrap.
PRIMES = (1, 2654435761 - 2**32, 805459861)
CPU_POINTS = 1 << 13  # at a time: rows and weights take up to 1 kB a point, what they are made of as much again
GPU_POINTS = 1 << 19  # at a time, of a view: up to 3 kB a point


@torch.no_grad()
def corners(
    x: Float[Tensor, "n 3"],
    scalings: Float[Tensor, " l"],
    table_size: int,
    out: tuple[Int[Tensor, "n l 8"], Float[Tensor, "n l 8"]] | None = None,
) -> tuple[Int[Tensor, "n l 8"], Float[Tensor, "n l 8"]]:
    """Rows and trilinear weights of the 8 corners of x on every level; the 8 weights sum to 1.

    Args:
        x: points.
        scalings: resolution of each level.
        table_size: T.
        out: where both are written; None makes new tensors.
    """
    scaled = x.t()[:, :, None] * scalings
    floor = scaled.floor()
    high = scaled - floor
    wx, wy, wz = zip((1.0 - high).unbind(), high.unbind())
    # Python's numbers: a tensor of the primes would be copied to the device, and waited for, with every call.
    kx, ky, kz = (
        [key * prime & (table_size - 1) for key in keys]
        for prime, keys in zip(PRIMES, zip(floor.int().unbind(), scaled.ceil().int().unbind()))
    )
    # The level's first row is a multiple of T: joined to z's key, which is less, it is in every row.
    level = torch.arange(len(scalings), dtype=torch.int32, device=x.device) * table_size
    kz = [key | level for key in kz]
    keys = [a ^ b for a in kx for b in ky]
    products = [a * b for a in wx for b in wy]
    rows, weights = (None, None) if out is None else out
    rows = torch.stack([xy ^ z for z in kz for xy in keys], dim=-1, out=rows)
    return rows, torch.stack([xy * z for z in wz for xy in products], dim=-1, out=weights)


class _Encode(torch.autograd.Function):
    """sum_k weights[:, k] table[rows[:, k]], ``points`` at a time; the gradient reaches the table only."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, x: Tensor, scalings: Tensor, table_size: int, points: int, keep: bool
    ) -> Tensor:
        held = len(x) if keep else min(points, len(x))
        rows = torch.empty(held, len(scalings), 8, dtype=torch.int32, device=x.device)
        weights = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        features = []
        for i, part in enumerate(x.split(points)):
            start = i * points if keep else 0
            out = rows[start : start + len(part)], weights[start : start + len(part)]
            flat_rows, flat_weights = (value.view(-1, 8) for value in corners(part, scalings, table_size, out))
            features.append(F.embedding_bag(flat_rows, table, per_sample_weights=flat_weights, mode="sum"))
        if keep:
            ctx.save_for_backward(rows.view(-1), weights.view(-1, 8))
            ctx.shape = table.shape
        features = torch.cat(features) if len(features) > 1 else features[0]
        return features.reshape(len(x), len(scalings) * table.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        rows, weights = ctx.saved_tensors
        grad = grads[0].reshape(len(weights), ctx.shape[1])
        # Feature by feature: on the CPU adding scalars is several times faster than adding short rows.
        columns = [
            torch.zeros(ctx.shape[0], dtype=g.dtype, device=g.device).index_add_(0, rows, (weights * g).view(-1))
            for g in (grad[:, i, None] for i in range(ctx.shape[1]))
        ]
        return torch.stack(columns, dim=-1), None, None, None, None, None


def encode(grid: HashEncoding, x: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch features"]:
    """The encoding of x: a drop-in for `HashEncoding.pytorch_fwd`, without a gradient for x.

    Many points are encoded in parts: on a CPU because that is faster, on a GPU where no gradient is asked for, so that
    memory does not grow with the view.
    """
    if grid.scalings.device != x.device:
        grid.scalings = grid.scalings.to(x.device)  # no buffer in nerfstudio: it stays where it was made
    flat, keep = x.detach().reshape(-1, 3), torch.is_grad_enabled()
    points = CPU_POINTS if x.device.type == "cpu" else max(len(flat), 1) if keep else GPU_POINTS
    features = _Encode.apply(grid.hash_table, flat, grid.scalings, grid.hash_table_size, points, keep)
    return features.reshape(*x.shape[:-1], features.shape[-1])


def speed_up_hash_grids(module: nn.Module) -> int:
    """Let all torch hash grids of a module use `encode`, and return how many there are.

    Parameters and checkpoints stay as they are. Not for models that need the gradient with respect to position
    (nerfacto's `predict_normals` and `camera_optimizer`).
    """
    grids = [m for m in module.modules() if isinstance(m, HashEncoding) and m.tcnn_encoding is None]
    for grid in grids:
        grid.pytorch_fwd = MethodType(encode, grid)
    return len(grids)
