"""Made-up matches: where they are, how far they are off, and that they follow from the random numbers alone."""

import numpy as np
import pytest

from ddm_training import matches
from ddm_training.matches import MatchConfig, draw_matches, seen_from

FOCAL = 100.0
EXACT = MatchConfig(
    holes=0.0, pixel_noise=0.0, smooth_noise=0.0, fattening=0.0, wrong_patches=(0.0,), contrast=(1e-4, 1.0001e-4)
)


def box_before_a_wall() -> np.ndarray:
    """Planar depth of a box at 2 m before a wall at 4 m."""
    z = np.full((60, 80), 4.0, np.float32)
    z[20:40, 30:50] = 2.0
    return z


def textured(where: np.ndarray) -> np.ndarray:
    """Noise where asked, grey elsewhere."""
    rng = np.random.default_rng(0)
    grey = np.where(where, rng.random(where.shape), 0.5).astype(np.float32)
    return np.repeat(grey[None], 3, axis=0)


def test_a_second_camera_does_not_see_what_is_beside_its_image_nor_behind_a_box() -> None:
    z = box_before_a_wall()
    seen = seen_from(z, FOCAL, np.array([0.5, 0.0, 0.0]), np.array([0.5, 0.0, 4.0]))
    # The wall moves by 100 * .5 / 4 = 12.5 pixels to the left, the box by 25: it hides the 12 columns left of it.
    assert not seen[:, :12].any()
    assert seen[:, 14:16].all()
    assert seen[22:38, 31:49].all()
    assert not seen[24:36, 20:28].any()
    assert seen[24:36, 51:].all()
    assert seen[5:15, 14:].all()


def test_matches_without_mistakes_are_the_true_depth_and_lie_where_there_is_texture() -> None:
    z = box_before_a_wall()
    half = np.zeros(z.shape, bool)
    half[:, 40:] = True
    for seed in range(5):
        found = draw_matches(np.random.default_rng(seed), textured(half), z, np.ones_like(half), FOCAL, EXACT)
        known = found > 0
        assert known[:, 45:].mean() > 0.1
        assert known[:, :34].mean() < 0.02
        np.testing.assert_allclose(found[known], z[known], rtol=1e-6)


def test_nothing_is_known_where_depth_is_not_valid_or_there_is_no_texture() -> None:
    z = box_before_a_wall()
    valid = np.ones(z.shape, bool)
    valid[:, :40] = False
    found = draw_matches(np.random.default_rng(1), textured(np.ones_like(valid)), z, valid, FOCAL)
    assert (found[:, 40:] > 0).any()
    assert not (found[:, :40] > 0).any()
    plain = np.full((3, *z.shape), 0.5, np.float32)
    strict = MatchConfig(contrast=(10.0, 11.0), wrong_patches=(0.0,))
    assert not draw_matches(np.random.default_rng(1), plain, z, np.ones_like(valid), FOCAL, strict).any()


def test_mistakes_are_as_many_as_asked() -> None:
    z = box_before_a_wall()
    rgb, valid = textured(np.ones(z.shape, bool)), np.ones(z.shape, bool)

    def wrong(patches: float) -> float:
        config = MatchConfig(wrong_patches=(patches,), fattening=0.0, pixel_noise=0.0, smooth_noise=0.0, holes=0.0)
        share = []
        for seed in range(20):
            found = draw_matches(np.random.default_rng(seed), rgb, z, valid, FOCAL, config)
            known = found > 0
            share.append((np.abs(found / z - 1.0)[known] > 0.05).mean())
        return float(np.mean(share))

    assert wrong(0.0) == 0.0
    assert 0.0 < wrong(2.0) < wrong(10.0) < 0.5


def test_small_islands_go_and_large_ones_stay() -> None:
    known = np.zeros((20, 20), bool)
    known[2:4, 2:4] = known[10:14, 10:14] = True
    kept = matches.without_islands(known, least=8)
    assert kept.sum() == 16
    assert not kept[:5, :5].any()


@pytest.mark.parametrize("shape", [(48, 64), (17, 31), (96, 128)])
def test_a_smooth_field_has_the_shape_and_about_the_deviation_asked(shape) -> None:
    field = matches.smooth_field(np.random.default_rng(0), *shape, 12)
    assert field.shape == shape
    assert 0.3 < field.std() < 1.3
    assert np.abs(np.diff(field, axis=1)).max() < 5 * 12 / shape[1]


def test_the_same_random_numbers_give_the_same_matches() -> None:
    z, valid = box_before_a_wall(), np.ones((60, 80), bool)
    rgb = textured(valid)
    first, again = (draw_matches(np.random.default_rng(3), rgb, z, valid, FOCAL) for _ in range(2))
    np.testing.assert_array_equal(first, again)
