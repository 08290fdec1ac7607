"""Ray bounds and the metric scale."""

import math

import pytest
import torch
from nerfstudio.cameras.rays import RayBundle

from ddm_training.errors import InputError
from ddm_training.rgbd import RgbdSpec
from diffusionerf_ns.bounds import BoundsCollider, metric_scale_from_bounds, metric_scale_from_disparity

SPEC = RgbdSpec(disparity_quantiles={"0.05": 0.2, "0.50": 0.5, "0.95": 0.8})


@pytest.mark.parametrize("a", [1e-3, 0.7, 42.0, 1e4])
@pytest.mark.parametrize(("near", "far"), [(1.0, 5.0), (0.3, 900.0), (12.0, 13.0)])
def test_a_scene_in_other_units_has_the_same_size_in_metres(near, far, a):
    """near and far times a -> metres per unit divided by a."""
    assert metric_scale_from_bounds(a * near, a * far, SPEC) == pytest.approx(
        metric_scale_from_bounds(near, far, SPEC) / a
    )


def test_the_middle_of_the_scene_in_log_depth_meets_that_of_the_prior():
    scale = metric_scale_from_bounds(2.0, 8.0, SPEC)
    assert scale * 4.0 == pytest.approx(1.0 / 0.4), "geometric means: 4 units, and a disparity of .4 per metre"
    # A scene that spans exactly the prior's range in metres has scale 1.
    assert metric_scale_from_bounds(1 / 0.8, 1 / 0.2, SPEC) == pytest.approx(1.0)


def test_a_far_bound_of_twenty_times_near_and_more_changes_nothing_further():
    assert metric_scale_from_bounds(1.0, 19.0, SPEC) > metric_scale_from_bounds(1.0, 20.0, SPEC)
    assert metric_scale_from_bounds(1.0, 20.0, SPEC) == metric_scale_from_bounds(1.0, 1e6, SPEC)


@pytest.mark.parametrize(("near", "far"), [(0.0, 5.0), (-1.0, 5.0), (5.0, 5.0), (1.0, math.nan), (1.0, math.inf)])
def test_bounds_that_bracket_nothing_are_refused(near, far):
    with pytest.raises(InputError, match=r"0 < near < far.*metric-scale"):
        metric_scale_from_bounds(near, far, SPEC)


def test_the_median_disparity_in_metres_becomes_the_priors():
    scale = metric_scale_from_disparity(2.0, SPEC)
    assert 2.0 / scale == pytest.approx(0.5)


def test_a_prior_that_does_not_tell_its_disparity_is_taken_for_one_of_rooms():
    scale = metric_scale_from_bounds(1.0, 4.0, RgbdSpec())
    assert 1.0 < scale * math.sqrt(1.0 * 4.0) < 5.0, "surfaces of a room lie some metres away"
    assert 1.0 < metric_scale_from_disparity(1.0, RgbdSpec()) < 5.0


@pytest.mark.parametrize("training", [True, False])
def test_every_ray_is_clipped_to_the_same_bounds_in_training_and_after_it(training):
    collider = BoundsCollider(0.75, 12.5).train(training)
    rays = RayBundle(origins=torch.randn(6, 3), directions=torch.randn(6, 3), pixel_area=torch.ones(6, 1))
    rays = collider(rays)
    assert torch.equal(rays.nears, torch.full((6, 1), 0.75))
    assert torch.equal(rays.fars, torch.full((6, 1), 12.5))


def test_rays_of_a_view_that_is_nearer_begin_nearer_and_stay_within_a_crop_box():
    rays = RayBundle(origins=torch.zeros(3, 3), directions=torch.ones(3, 3), pixel_area=torch.ones(3, 1))
    collider = BoundsCollider(0.8, 10.0)
    whole = collider.bound(rays, nearer=0.25)
    assert whole.nears.flatten().tolist() == pytest.approx([0.2] * 3)
    assert whole.fars.flatten().tolist() == [10.0] * 3
    rays.nears, rays.fars = torch.tensor([[0.0], [3.0], [1e10]]), torch.tensor([[2.0], [40.0], [1e10]])
    cropped = collider.bound(rays, nearer=0.25)
    assert cropped.nears.flatten().tolist() == pytest.approx([0.2, 3.0, 10.0])
    assert cropped.fars.flatten().tolist() == [2.0, 10.0, 10.0]


def test_bounds_travel_in_the_checkpoint():
    loaded = BoundsCollider(1.0, 2.0)
    loaded.load_state_dict(BoundsCollider(0.5, 40.0).state_dict())
    assert loaded.bounds.tolist() == [0.5, 40.0]
