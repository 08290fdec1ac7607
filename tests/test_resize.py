"""Shrinking RGBD frames."""

import numpy as np
import pytest

from ddm_training.errors import InputError
from ddm_training.resize import check_size, resize_color, resize_depth, scale_intrinsics


def plane(width: int, height: int, intrinsics: tuple[float, float, float, float]) -> np.ndarray:
    """Planar depth of the plane .1 X + .3 Y + Z = 3, from its intersection with each pixel's ray."""
    fx, fy, cx, cy = intrinsics
    x = (np.arange(width) + 0.5 - cx) / fx
    y = (np.arange(height) + 0.5 - cy) / fy
    return (3.0 / (0.1 * x[None, :] + 0.3 * y[:, None] + 1.0)).astype(np.float32)


def test_a_slanted_plane_stays_that_plane_seen_by_the_scaled_camera() -> None:
    source, target, k = (128, 96), (32, 24), (110.0, 111.0, 66.0, 47.0)
    depth = plane(*source, k)
    small, mask = resize_depth(depth, np.ones_like(depth, bool), *target)
    assert mask.all()
    np.testing.assert_allclose(small, plane(*target, scale_intrinsics(k, source, target)), rtol=2e-6)


def test_no_depth_between_two_surfaces_is_made_up() -> None:
    rng = np.random.default_rng(0)
    depth = np.where(rng.random((64, 64)) < 0.5, 1.0, 3.0).astype(np.float32)
    small, mask = resize_depth(depth, np.ones_like(depth, bool), 16, 16)
    assert mask.all()
    assert set(np.unique(small.round(5)).tolist()) == {1.0, 3.0}


def test_the_surface_that_covers_most_of_a_pixel_wins() -> None:
    depth = np.full((4, 8), 5.0, np.float32)
    depth[:, :3] = 2.0  # 12 of 16 samples of the first pixel
    small, _ = resize_depth(depth, np.ones_like(depth, bool), 2, 1)
    np.testing.assert_allclose(small, [[2.0, 5.0]])


@pytest.mark.parametrize(("invalid", "kept"), [(7, True), (8, True), (9, False), (16, False)])
def test_a_pixel_is_invalid_where_more_than_half_of_its_samples_are(invalid: int, kept: bool) -> None:
    mask = np.ones(16, bool)
    mask[:invalid] = False
    depth = np.where(mask, 2.0, np.nan).astype(np.float32).reshape(4, 4)
    small, small_mask = resize_depth(depth, mask.reshape(4, 4), 1, 1)
    assert bool(small_mask[0, 0]) is kept
    assert small[0, 0] == (2.0 if kept else 0.0)


@pytest.mark.parametrize("garbage", [np.nan, 0.0, -3.0, np.inf, 1e-3])
def test_values_under_the_mask_have_no_influence(garbage: float) -> None:
    rng = np.random.default_rng(1)
    depth = rng.uniform(2.0, 2.05, (16, 16)).astype(np.float32)
    mask = rng.random((16, 16)) > 0.3
    clean, clean_mask = resize_depth(depth, mask, 4, 4)
    dirty, dirty_mask = resize_depth(np.where(mask, depth, np.float32(garbage)), mask, 4, 4)
    np.testing.assert_array_equal(clean, dirty)
    np.testing.assert_array_equal(clean_mask, dirty_mask)


def test_a_size_that_is_no_whole_fraction_keeps_a_plane_to_a_percent() -> None:
    source, target, k = (100, 75), (64, 48), (90.0, 90.0, 50.0, 37.5)
    depth = plane(*source, k)
    small, _ = resize_depth(depth, np.ones_like(depth, bool), *target)
    np.testing.assert_allclose(small, plane(*target, scale_intrinsics(k, source, target)), rtol=0.01)


def test_colour_is_averaged_over_the_area() -> None:
    color = np.random.default_rng(2).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    small = resize_color(color, 4, 3)
    expected = color.reshape(3, 4, 4, 4, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(small - expected).max() <= 1.0  # rounded once per axis


def test_the_same_size_changes_nothing_but_clears_masked_depth() -> None:
    depth = np.array([[1.0, np.nan]], np.float32)
    same, mask = resize_depth(depth, np.array([[True, False]]), 2, 1)
    assert same.tolist() == [[1.0, 0.0]]
    assert mask.tolist() == [[True, False]]


@pytest.mark.parametrize("target", [(64, 32), (128, 192), (32, 32), (0, 0)])
def test_enlarging_and_stretching_is_refused(target: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="cannot resize"):
        check_size((64, 48), target)
    check_size((270, 180), (240, 160))
