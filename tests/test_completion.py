"""Depth between known pixels: islands are taken out, the rest follows the image."""

import numpy as np
import pytest
import torch

from diffusionerf_ns import completion


def test_small_islands_are_taken_out_and_surfaces_stay() -> None:
    depth = torch.zeros(40, 60)
    depth[5:15, 5:15] = 2.0  # 100 pixels
    depth[20:24, 20:24] = 3.0  # 16 pixels
    depth[8:11, 8:11] = 1.0  # 9 wrong pixels in the midst of the surface
    kept = completion.without_speckle(depth, least=30)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert int((kept > 0).sum()) == 100 - 9
    torch.testing.assert_close(completion.without_speckle(depth, least=1), depth)


def test_a_slanted_surface_with_gaps_is_one_surface() -> None:
    depth = torch.linspace(3.0, 4.0, 100).repeat(10, 1)
    depth[:, ::2] = 0.0
    torch.testing.assert_close(completion.without_speckle(depth, least=400), depth)


def test_interpolation_follows_colours() -> None:
    rgb = torch.zeros(30, 60, 3)
    rgb[:, 30:] = 0.8
    depth = torch.zeros(30, 60)
    depth[10:20, 5], depth[10:20, 55] = 2.0, 5.0
    filled, error = completion.by_membrane(rgb, depth)
    assert bool(error.isinf().all()), "it does not know how far it is off"
    assert float((filled[:, :25] - 2.0).abs().max()) < 0.2
    assert float((filled[:, 35:] - 5.0).abs().max()) < 0.5
    assert bool((filled > 0).all())


def test_interpolation_is_linear_in_inverse_depth_on_a_plain_surface() -> None:
    depth = torch.zeros(20, 41)
    depth[:, 0], depth[:, 40] = 1.0, 4.0
    filled, _ = completion.by_membrane(torch.full((20, 41, 3), 0.3), depth)
    np.testing.assert_allclose(1.0 / filled[10], np.linspace(1.0, 0.25, 41), atol=0.05)
    assert float(filled[:, 0].mean()) == pytest.approx(1.0, rel=0.05)


def test_depth_maps_of_several_sizes_are_looked_up_by_pixels_of_larger_images() -> None:
    depths = [torch.arange(6.0).reshape(2, 3), 10.0 + torch.arange(8.0).reshape(4, 2)]
    maps = completion.DepthMaps.of(depths, [depth % 2 == 0 for depth in depths], [depth / 100 for depth in depths])
    sizes = torch.tensor([[4, 6], [4, 2]])
    pixels = torch.tensor([[0, 0, 0], [0, 3, 5], [0, 1, 2], [1, 0, 0], [1, 3, 1], [1, 2, 0]])
    depth, confirmed, error = maps.at(pixels, sizes)
    assert depth.tolist() == [0.0, 5.0, 1.0, 10.0, 17.0, 14.0]
    assert confirmed.tolist() == [True, False, False, True, False, True]
    torch.testing.assert_close(error, depth / 100)


def test_a_prior_without_a_network_for_it_completes_nothing(tmp_path) -> None:
    assert completion.find_network(str(tmp_path)) is None
