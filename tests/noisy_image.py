"""A small image and a noisy prediction of it."""

import torch
from torch import Tensor


def images(seed: int = 0, h: int = 40, w: int = 52, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """A smooth true image and a noisy prediction of it."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    true = torch.stack([0.5 + 0.4 * torch.sin(6 * x), y, 0.5 * (x + y)], -1)
    return (true + noise * torch.randn(h, w, 3, generator=generator)).clamp(0, 1), true
