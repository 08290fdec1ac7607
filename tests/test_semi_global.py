"""Semi-global matching: the recurrence as it is written, and what it is for."""

import torch

from diffusionerf_ns import semi_global


def walk_plainly(cost: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """L along a line, one number at a time."""
    out = cost.clone()
    for i in range(1, len(cost)):
        before = out[i - 1]
        for d in range(cost.shape[1]):
            ways = [before[d], before.min() + penalty[i - 1]]
            ways += [before[k] + semi_global.SMALL for k in (d - 1, d + 1) if 0 <= k < cost.shape[1]]
            out[i, d] = cost[i, d] + min(ways) - before.min()
    return out


def test_a_walk_is_the_recurrence() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(9, 6, 2, generator=generator)
    penalty = 0.1 + 0.5 * torch.rand(8, 2, generator=generator)
    got = semi_global._walk(cost, penalty)
    for line in range(2):
        torch.testing.assert_close(got[:, :, line], walk_plainly(cost[:, :, line], penalty[:, line]))


def test_four_directions_have_equal_say() -> None:
    generator = torch.Generator().manual_seed(1)
    cost, grey = torch.rand(5, 7, 9, generator=generator), torch.rand(7, 9, generator=generator)
    whole = semi_global.aggregate(cost, grey)
    torch.testing.assert_close(semi_global.aggregate(cost.flip(1), grey.flip(0)).flip(1), whole)
    torch.testing.assert_close(semi_global.aggregate(cost.flip(2), grey.flip(1)).flip(2), whole)
    torch.testing.assert_close(semi_global.aggregate(cost.transpose(1, 2), grey.T).transpose(1, 2), whole)


def test_pixels_that_know_nothing_take_the_depth_of_their_surface_up_to_the_edge_of_the_image_content() -> None:
    cost = torch.full((8, 20, 40), 0.5)
    grey = torch.zeros(20, 40)
    grey[:, 20:] = 1.0
    cost[2, :, :6] = 0.0  # only the outer columns know their depth
    cost[6, :, 34:] = 0.0
    winner = semi_global.aggregate(cost, grey).min(dim=0).indices
    assert (winner[:, :20] == 2).all()
    assert (winner[:, 20:] == 6).all()
