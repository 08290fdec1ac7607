"""The fast hash grid is nerfstudio's, number for number."""

import pytest
import torch
from nerfstudio.field_components.encodings import HashEncoding

from diffusionerf_ns import hash_grid


def make_grid(features: int = 2) -> HashEncoding:
    torch.manual_seed(0)
    return HashEncoding(
        num_levels=6, min_res=4, max_res=200, log2_hashmap_size=9, features_per_level=features, implementation="torch"
    )


@pytest.mark.parametrize("features", [1, 2, 4])
def test_values_and_gradients_equal_those_of_nerfstudio(features: int) -> None:
    grid = make_grid(features)
    x = torch.rand(500, 3)
    x[:3] = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.25, 0.5, 0.75]])
    upstream = torch.randn(500, 6 * features)
    expected = grid.pytorch_fwd(x)
    expected.backward(upstream)
    expected_gradient = grid.hash_table.grad.clone()
    grid.hash_table.grad = None

    found = hash_grid.encode(grid, x)
    found.backward(upstream)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-5)
    torch.testing.assert_close(grid.hash_table.grad, expected_gradient, atol=1e-5, rtol=1e-5)


def test_parts_of_the_points_give_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, x, sizes = make_grid(), torch.rand(5, 7, 3), []
    corners = hash_grid.corners

    def encode_and_differentiate() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grid.hash_table.grad = None
        features = hash_grid.encode(grid, x)
        features.square().sum().backward()
        with torch.no_grad():
            return features, hash_grid.encode(grid, x), grid.hash_table.grad

    whole = encode_and_differentiate()
    monkeypatch.setattr(hash_grid, "CPU_POINTS", 16)
    monkeypatch.setattr(hash_grid, "corners", lambda part, *args: sizes.append(len(part)) or corners(part, *args))
    parts = encode_and_differentiate()
    assert sizes == 2 * [16, 16, 3]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_no_points_have_no_features() -> None:
    assert hash_grid.encode(make_grid(), torch.empty(0, 3)).shape == (0, 12)


def test_corner_weights_sum_to_one_and_rows_stay_in_their_level() -> None:
    grid = make_grid()
    rows, weights = hash_grid.corners(torch.rand(100, 3), grid.scalings, grid.hash_table_size)
    torch.testing.assert_close(weights.sum(-1), torch.ones(100, 6))
    assert ((rows // grid.hash_table_size) == torch.arange(6)[None, :, None]).all()


def test_it_keeps_the_shape_of_the_batch_and_the_state_dict() -> None:
    grid = make_grid()
    before = {k: v.clone() for k, v in grid.state_dict().items()}
    assert hash_grid.speed_up_hash_grids(torch.nn.Sequential(grid)) == 1
    assert grid(torch.rand(2, 5, 3)).shape == (2, 5, 12)
    after = grid.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
