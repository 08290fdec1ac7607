"""Made-up matches: where they are, how far they are off, and that they follow from the random numbers alone."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from ddm_training import matches
from ddm_training.matches import MatchConfig, draw_matches, seen_from

pytestmark = pytest.mark.usefixtures("one_thread")

FOCAL = 100.0
USUAL = MatchConfig()
EXACT = MatchConfig(
    holes=0.0, pixel_noise=0.0, smooth_noise=0.0, fattening=0.0, wrong_patches=(0.0,), contrast=(1e-4, 1.0001e-4)
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def box_before_a_wall(count: int = 1) -> Tensor:
    """Planar depth of a box at 2 m before a wall at 4 m."""
    z = torch.full((count, 60, 80), 4.0)
    z[:, 20:40, 30:50] = 2.0
    return z


def textured(where: Tensor) -> Tensor:
    """Noise where asked, grey elsewhere."""
    grey = torch.where(where, torch.rand(where.shape, generator=seeded(0)), 0.5)
    return grey[:, None].repeat(1, 3, 1, 1)


def draw(seed: int, rgb: Tensor, z: Tensor, valid: Tensor, config: MatchConfig = USUAL) -> Tensor:
    return draw_matches(seeded(seed), rgb, z, valid, torch.full((len(z),), FOCAL), config)


def test_a_second_camera_does_not_see_what_is_beside_its_image_nor_behind_a_box() -> None:
    z = box_before_a_wall(2)
    focal, position = torch.full((2,), FOCAL), torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    target = torch.tensor([[0.5, 0.0, 4.0], [0.0, 0.0, 4.0]])
    seen, same = seen_from(z, focal, position, target)
    # The wall moves by 100 * .5 / 4 = 12.5 pixels to the left, the box by 25: it hides the 12 columns left of it.
    assert not seen[:, :12].any()
    assert seen[:, 14:16].all()
    assert seen[22:38, 31:49].all()
    assert not seen[24:36, 20:28].any()
    assert seen[24:36, 51:].all()
    assert seen[5:15, 14:].all()
    assert same.float().mean() > 0.95, "from the same place all is seen, but for pixels just beside the box"


def test_a_camera_that_is_turned_sees_the_side_that_it_looks_at() -> None:
    z, focal = torch.full((2, 60, 80), 4.0), torch.full((2,), FOCAL)
    left, right = seen_from(z, focal, torch.zeros(2, 3), torch.tensor([[-1.0, 0.0, 4.0], [1.0, 0.0, 4.0]]))
    assert left[25:35, :50].all()
    assert not left[:, 60:].any()
    assert torch.equal(right.flip(1)[:, :50], left[:, :50])


def test_matches_without_mistakes_are_the_true_depth_and_lie_where_there_is_texture() -> None:
    z = box_before_a_wall(8)
    half = torch.zeros(z.shape, dtype=torch.bool)
    half[..., 40:] = True
    found = draw(0, textured(half), z, torch.ones_like(half), EXACT)
    known = found > 0
    assert float(known[..., 45:].float().mean(dim=(1, 2)).amin()) > 0.1
    assert float(known[..., :34].float().mean()) < 0.02
    torch.testing.assert_close(found[known], z[known], rtol=1e-6, atol=0.0)


def test_nothing_is_known_where_depth_is_not_valid_or_there_is_no_texture() -> None:
    z = box_before_a_wall(4)
    valid = torch.ones(z.shape, dtype=torch.bool)
    valid[..., :40] = False
    found = draw(1, textured(torch.ones_like(valid)), z, valid)
    assert (found[..., 40:] > 0).flatten(1).any(dim=1).all()
    assert not (found[..., :40] > 0).any()
    plain = torch.full((4, 3, 60, 80), 0.5)
    strict = MatchConfig(contrast=(10.0, 11.0), wrong_patches=(0.0,))
    assert (draw(1, plain, z, torch.ones_like(valid), strict) > 0).float().mean() < 0.03
    many = MatchConfig(wrong_patches=(10.0,))
    assert not draw(1, textured(torch.ones_like(valid)), z, torch.zeros_like(valid), many).any()


def test_mistakes_are_as_many_as_asked() -> None:
    z = box_before_a_wall(20)
    valid = torch.ones(z.shape, dtype=torch.bool)
    rgb = textured(valid)

    def wrong(patches: float) -> float:
        config = MatchConfig(wrong_patches=(patches,), fattening=0.0, pixel_noise=0.0, smooth_noise=0.0, holes=0.0)
        found = draw(2, rgb, z, valid, config)
        return float(((found / z - 1.0).abs()[found > 0] > 0.05).float().mean())

    assert wrong(0.0) == 0.0
    assert 0.0 < wrong(2.0) < wrong(10.0) < 0.5


def test_holes_take_the_share_asked_and_fattening_widens_what_is_near() -> None:
    z = box_before_a_wall(200)
    valid = torch.ones(z.shape, dtype=torch.bool)
    kept = matches._without_holes(seeded(0), 200, 60, 80, MatchConfig(holes=0.6)).float().mean(dim=(1, 2))
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.04)  # of a share that is uniform in [0, .6]
    assert float(kept.amin()) > 0.3
    assert float(kept.amax()) > 0.95
    fat = MatchConfig(holes=0.0, pixel_noise=0.0, smooth_noise=0.0, fattening=1.0, wrong_patches=(0.0,))
    found = draw(3, textured(valid), z, valid, fat)
    known = found > 0
    torch.testing.assert_close(found[known & (z < 3)], z[known & (z < 3)], rtol=1e-6, atol=0.0)
    too_near = known & (found < 3) & (z > 3)
    near = torch.nn.functional.max_pool2d((z < 3).float(), 5, stride=1, padding=2) > 0
    assert too_near.any()
    assert not (too_near & ~near).any(), "by more than two pixels"


def test_noise_is_within_its_range() -> None:
    z = box_before_a_wall(50)
    valid = torch.ones(z.shape, dtype=torch.bool)
    config = MatchConfig(holes=0.0, pixel_noise=0.01, smooth_noise=0.0, fattening=0.0, wrong_patches=(0.0,))
    found = draw(4, textured(valid), z, valid, config)
    log_error = torch.where(found > 0, (found / z).log(), torch.nan)
    spread = torch.tensor([row[~row.isnan()].std() for row in log_error])
    assert float(spread.amax()) < 0.0105
    assert float(spread.mean()) == pytest.approx(0.005, abs=0.001)


def test_small_islands_go_and_large_ones_stay() -> None:
    known = torch.zeros(1, 20, 20, dtype=torch.bool)
    known[:, 2:4, 2:4] = known[:, 10:14, 10:14] = True
    kept = matches.without_islands(known, least=8)
    assert kept.sum() == 16
    assert not kept[:, :5, :5].any()


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.45])
@pytest.mark.parametrize("least", [2, 8, 15])
def test_islands_are_those_of_connected_components(share, least) -> None:
    known = torch.rand(6, 40, 50, generator=seeded(0)) < share
    known[0, 5, :] = True  # a line, whose ends are far from each other
    for mask, kept in zip(known.numpy(), matches.without_islands(known, least).numpy()):
        islands: np.ndarray = ndimage.label(mask, np.ones((3, 3)))[0]  # pyright: ignore
        np.testing.assert_array_equal(kept, mask & (np.bincount(islands.ravel())[islands] >= least))


@pytest.mark.parametrize("shape", [(48, 64), (17, 31), (96, 128)])
def test_a_smooth_field_has_the_shape_and_about_the_deviation_asked(shape) -> None:
    for field in (matches.smooth_field(seeded(0), 3, *shape, 12), matches.mixed_field(seeded(0), 3, *shape, (3, 13))):
        assert field.shape == (3, *shape)
        assert 0.3 < field.std() < 1.3
        assert field.diff(dim=2).abs().max() < 5 * 12 / shape[1]


def test_fields_of_one_number_of_cells_are_smooth_fields() -> None:
    mixed, smooth = matches.mixed_field(seeded(5), 2, 48, 64, (11, 12)), matches.smooth_field(seeded(5), 2, 48, 64, 11)
    generator = seeded(5)
    torch.randint(11, 12, (2, 1), generator=generator)  # the number of cells
    torch.testing.assert_close(mixed, matches.smooth_field(generator, 2, 48, 64, 11), rtol=1e-4, atol=1e-4)
    assert not torch.equal(mixed, smooth)


def test_blurring_is_a_gaussian_filter() -> None:
    x, sigma = torch.rand(3, 20, 30, generator=seeded(0)), torch.tensor([0.5, 1.0, 1.5])
    expected = np.stack([ndimage.gaussian_filter(a, s) for a, s in zip(x.numpy(), sigma.tolist())])
    blurred = matches._blurred(x, sigma)
    np.testing.assert_allclose(blurred[:, 6:-6, 6:-6], expected[:, 6:-6, 6:-6], atol=2e-3)


def test_the_same_random_numbers_give_the_same_matches() -> None:
    z = box_before_a_wall(3)
    valid = torch.ones(z.shape, dtype=torch.bool)
    rgb = textured(valid)
    first, again, other = (draw(seed, rgb, z, valid) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1]), "nor do the frames of a batch share theirs"
