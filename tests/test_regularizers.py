"""The loss terms, against their definitions written out in plain loops and against closed forms."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from ddm_training import rgbd
from diffusionerf_ns import regularizers


def rays_of(rays: int, samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights that sum to less than 1, and sorted interval edges, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(rays, samples, generator=generator, dtype=torch.float64)
    w = w / w.sum(-1, keepdim=True) * torch.rand(rays, 1, generator=generator, dtype=torch.float64)
    t = 0.5 + (0.01 + torch.rand(rays, samples + 1, generator=generator, dtype=torch.float64)).cumsum(-1)
    return w, t


def patches_of(count: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A score, a patch and its planar depth of up to 50 m."""
    generator = torch.Generator().manual_seed(1)
    score = 100.0 * torch.randn(count, 4, size, size, generator=generator)
    x = 2.0 * torch.rand(count, 4, size, size, generator=generator) - 1.0
    return score, x, 50.0 * torch.rand(count, size, size, generator=generator)


WEIGHTS = {"depth_weight": 4e-7, "rgb_weight": 2e-10, "rgb_norm": 3000.0, "max_depth": 20.0}


@pytest.mark.parametrize("count", [1, 4])
def test_the_gradient_that_reaches_the_patch_is_minus_weight_times_score_over_patches_exactly(count):
    score, x, z = patches_of(count)
    x.requires_grad_(True)
    weighted = regularizers.weigh_score(score, z, **WEIGHTS)
    regularizers.score_pseudo_loss(x, weighted).backward()

    expected = torch.empty_like(score)
    for b in range(count):
        norm = torch.sqrt(sum(score[b, c].double().square().sum() for c in range(3)))
        expected[b, :3] = 2e-10 * score[b, :3] * (3000.0 / norm)
        expected[b, 3] = 4e-7 * score[b, 3] * torch.minimum(z[b], torch.tensor(20.0))
    assert torch.equal(x.grad, -weighted / count), "exact for these counts, which are powers of two"
    torch.testing.assert_close(x.grad, -expected / count, rtol=1e-6, atol=0.0)


def test_a_step_against_the_gradient_goes_along_the_score():
    score, x, z = patches_of(2)
    x.requires_grad_(True)
    regularizers.score_pseudo_loss(x, regularizers.weigh_score(score, z + 0.1, **WEIGHTS)).backward()
    step = -x.grad
    assert ((step * score) > 0).all()


def test_the_gradient_reaches_depth_through_the_encoding_alone():
    """The factor z of the depth score is a weight, no path for gradients: dL/dz = dL/dx dx/dz, dx/dz = -2 near/z^2."""
    score, x, z = patches_of(1)
    z = (z + 0.5).requires_grad_(True)
    patch = rgbd.encode(0.5 * (x[:, :3] + 1.0), z)
    regularizers.score_pseudo_loss(patch, regularizers.weigh_score(score.requires_grad_(True), z, **WEIGHTS)).backward()
    expected = 4e-7 * score[:, 3] * z.clamp_max(20.0) * 2.0 * rgbd.NEAR / z.square()
    torch.testing.assert_close(z.grad, expected.detach(), rtol=1e-5, atol=0.0)
    assert score.grad is None, "the score is a constant"


def test_the_colour_score_of_each_patch_has_the_norm_asked_for_whatever_the_others_are():
    score, _, z = patches_of(3)
    score[1] *= 1e-3
    weighted = regularizers.weigh_score(score, z, **{**WEIGHTS, "rgb_weight": 1.0, "rgb_norm": 5.0})
    torch.testing.assert_close(weighted[:, :3].flatten(1).norm(dim=1), torch.full((3,), 5.0))


def test_a_colour_weight_of_zero_and_a_vanishing_score_give_zeros_and_no_nan():
    score, _, z = patches_of(1)
    assert (regularizers.weigh_score(score, z, **{**WEIGHTS, "rgb_weight": 0.0})[:, :3] == 0).all()
    assert (regularizers.weigh_score(torch.zeros_like(score), z, **WEIGHTS) == 0).all()


def test_without_a_norm_the_colour_score_is_only_weighted():
    score, _, z = patches_of(2)
    weighted = regularizers.weigh_score(score, z, **{**WEIGHTS, "rgb_weight": 0.5, "rgb_norm": None})
    assert torch.equal(weighted[:, :3], 0.5 * score[:, :3])


def test_chroma_counts_what_the_squared_error_counts_beside_brightness():
    """Errors of brightness cost nothing; mean square = that of the mean over channels + chroma."""
    difference = torch.rand(50, 3) - 0.5
    brightness = difference.mean(dim=1, keepdim=True)
    assert float(regularizers.chroma(brightness.expand(50, 3))) == pytest.approx(0.0, abs=1e-12)
    whole = difference.square().mean()
    torch.testing.assert_close(brightness.square().mean() + regularizers.chroma(difference), whole)


def test_foreground_is_zero_on_opaque_rays_one_on_empty_ones_and_the_mean_of_squares_between():
    assert regularizers.foreground(torch.full((5, 4), 0.25)) == 0.0
    assert regularizers.foreground(torch.zeros(5, 4)) == 1.0
    w = torch.tensor([[0.25, 0.25], [0.5, 0.5]])  # a ray of opacity .5, an opaque one
    assert regularizers.foreground(w).item() == pytest.approx(0.5 * 0.5**2)
    for opaque, cost in (([True, False], 0.5**2), ([False, True], 0.0), ([False, False], 0.0)):
        assert regularizers.foreground(w, torch.tensor(opaque)).item() == pytest.approx(cost)


def test_frustum_counts_the_views_that_are_missing_weighted():
    w = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125]])
    n = torch.tensor([[0, 1, 2], [3, 0, 1]])
    # Two views required: (2 * .5 + 1 * .25 + 0) and (0 + 2 * .25 + 1 * .125).
    assert regularizers.frustum(w, n, 2).item() == pytest.approx(0.5 * (1.25 + 0.625))
    # On patch rays only n = 0 counts.
    assert regularizers.frustum(w, n, torch.tensor([2, 1])).item() == pytest.approx(0.5 * (1.25 + 0.25))
    assert regularizers.frustum(w, n + 2, 2) == 0.0


def test_the_gradient_of_frustum_is_the_number_of_missing_views_over_rays():
    w, _ = rays_of(3, 5)
    n = torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(3))
    w.requires_grad_(True)
    regularizers.frustum(w, n, 2).backward()
    assert torch.equal(w.grad, (2 - n).clamp_min(0).double() / 3)


def distortion_by_definition(w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """mip-NeRF 360 equation 15 in its double sum."""
    total = torch.zeros(len(w), dtype=w.dtype)
    for r in range(len(w)):
        for i in range(w.shape[1]):
            m_i = (t[r, i] + t[r, i + 1]) / 2
            for j in range(w.shape[1]):
                total[r] += w[r, i] * w[r, j] * (m_i - (t[r, j] + t[r, j + 1]) / 2).abs()
            total[r] += w[r, i] ** 2 * (t[r, i + 1] - t[r, i]) / 3
    return total


def test_distortion_equals_the_double_sum_of_its_definition():
    w, t = rays_of(6, 17)
    torch.testing.assert_close(regularizers.distortion_per_ray(w, t), distortion_by_definition(w, t))


def test_the_gradient_of_distortion_equals_that_of_its_definition():
    w, t = rays_of(2, 9, seed=4)
    ours, theirs = w.clone().requires_grad_(True), w.clone().requires_grad_(True)
    regularizers.distortion_per_ray(ours, t).sum().backward()
    distortion_by_definition(theirs, t).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_distortion_of_all_weight_in_one_interval_is_a_third_of_its_length():
    t = torch.tensor([[1.0, 2.0, 2.5, 4.0]])
    assert regularizers.distortion_per_ray(torch.tensor([[0.0, 1.0, 0.0]]), t).item() == pytest.approx(0.5 / 3)


def test_distortion_in_single_precision_stays_close_far_from_the_origin():
    w, t = rays_of(32, 48, seed=5)
    t = t + 500.0
    single = regularizers.distortion_per_ray(w.float(), t.float()).double()
    # Prefix sums cancel: the error is that of single precision at the distance of the samples.
    assert (single - regularizers.distortion_per_ray(w, t)).abs().max() < 48 * 6e-8 * 550


def test_distortion_of_a_ray_grows_with_the_unit_of_length_and_the_term_does_not_depend_on_it():
    w, t = rays_of(6, 17)
    depth, far, a = t.mean(-1), 8.0, 37.0
    torch.testing.assert_close(
        regularizers.distortion_per_ray(w, a * t), a * regularizers.distortion_per_ray(w, t), rtol=1e-10, atol=0.0
    )
    torch.testing.assert_close(
        regularizers.distortion(w, a * t, a * depth, a * far), regularizers.distortion(w, t, depth, far)
    )


def test_distortion_divides_each_ray_by_its_depth_which_gets_no_gradient_and_holds_edges_below_far():
    w, t = rays_of(4, 7)
    far = float(t.median())
    depth = torch.arange(1.0, 5.0, dtype=torch.float64).requires_grad_(True)
    expected = sum(distortion_by_definition(w, t.clamp(max=far))[i] / (i + 1) for i in range(4)) / 4
    loss = regularizers.distortion(w.requires_grad_(True), t, depth, far)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert depth.grad is None
    assert w.grad is not None


@pytest.mark.parametrize(
    "call",
    [
        lambda: regularizers.score_pseudo_loss(torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8)),
        lambda: regularizers.score_pseudo_loss(torch.zeros(1, 4, 8, 9), torch.zeros(1, 4, 8, 9)),
        lambda: regularizers.weigh_score(torch.zeros(2, 4, 8, 8), torch.zeros(1, 8, 8), **WEIGHTS),
        lambda: regularizers.foreground(torch.zeros(8)),
        lambda: regularizers.frustum(torch.zeros(4, 8), torch.zeros(4, 7, dtype=torch.int64), 2),
        lambda: regularizers.frustum(torch.zeros(4, 8), torch.zeros(4, 8), 2),
        lambda: regularizers.frustum(torch.zeros(4, 8), torch.zeros(4, 8).long(), torch.zeros(8).long()),
        lambda: regularizers.distortion_per_ray(torch.zeros(4, 8, 1), torch.zeros(4, 9, 1)),
        lambda: regularizers.distortion(torch.zeros(4, 8), torch.zeros(4, 9), torch.zeros(4, 1), 1.0),
    ],
)
def test_a_wrong_shape_or_type_raises(call):
    with pytest.raises(TypeCheckError):
        call()


EDGES = torch.tensor([[1.0, 3.0, 5.0, 11.0]])  # midpoints 2, 4 and 8


def weights_at(*w: float) -> torch.Tensor:
    return torch.tensor([w])


def test_weight_that_is_not_at_the_known_depth_costs_by_its_logarithmic_distance():
    known = torch.tensor([4.0])
    log2 = math.log(2.0)
    assert float(regularizers.known_depth(weights_at(0.0, 1.0, 0.0), EDGES, known)) == pytest.approx(0.0)
    fog_and_wall = weights_at(0.5, 0.0, 0.25)  # a quarter reaches the end: the mean of the rest is 4
    assert float(regularizers.known_depth(fog_and_wall, EDGES, known)) == pytest.approx(0.5 * log2 + 0.5 * log2)
    assert float(regularizers.known_depth(fog_and_wall, 7.0 * EDGES, 7.0 * known)) == pytest.approx(log2)


def test_a_ray_that_meets_nothing_costs_as_one_that_ends_in_the_last_sample():
    known = torch.tensor([2.0])
    nothing, last = weights_at(0.0, 0.0, 0.0), weights_at(0.0, 0.0, 1.0)
    cost = regularizers.known_depth(nothing, EDGES, known)
    assert cost == regularizers.known_depth(last, EDGES, known)
    assert float(cost) == pytest.approx(math.log(4.0))
    margin = torch.tensor([0.2])
    cost = regularizers.coarse_depth(nothing, EDGES, known, margin)
    assert cost == regularizers.coarse_depth(last, EDGES, known, margin)
    assert float(cost) == pytest.approx(math.log(4.0 / 1.3))
    assert torch.equal(regularizers.whole_weights(weights_at(0.25, 0.5, 0.0)), weights_at(0.25, 0.5, 0.25))


def test_the_gradient_moves_weight_from_fog_and_from_behind_to_the_surface():
    w = weights_at(0.5, 0.25, 0.125).requires_grad_(True)
    regularizers.known_depth(w, EDGES, torch.tensor([4.0])).backward()
    # Against the light that goes through, which ends at 8: fog is no better, the surface is.
    assert w.grad is not None
    assert w.grad[0].tolist() == pytest.approx([0.0, -math.log(2.0), 0.0], abs=1e-6)


def test_weight_within_the_margin_costs_nothing_and_each_ray_has_its_own():
    def cost(at: int, coarse: float, margin: float) -> float:
        w = torch.eye(3)[at : at + 1]
        return float(regularizers.coarse_depth(w, EDGES, torch.tensor([coarse]), torch.tensor([margin])))

    assert cost(1, 4.0, 0.3) == cost(1, 5.6, 0.3) == cost(1, 2.8, 0.3) == 0.0
    assert cost(0, 4.0, 0.3) == pytest.approx(math.log(0.7 * 2.0))
    assert cost(2, 4.0, 0.3) == pytest.approx(math.log(2.0 / 1.45))
    w, edges = torch.tensor([[1.0, 0.0, 0.0]] * 3), EDGES.expand(3, 4)
    both = regularizers.coarse_depth(w, edges, torch.tensor([4.0, 4.0, 0.0]), torch.tensor([0.3, 0.1, 0.3]))
    assert float(both) == pytest.approx((math.log(1.4) + math.log(1.8)) / 3), "what is unknown costs nothing"


def test_an_unknown_depth_leaves_no_trace_in_the_gradient():
    w = weights_at(0.5, 0.25, 0.125).requires_grad_(True)
    regularizers.coarse_depth(w, EDGES, torch.tensor([0.0]), torch.tensor([0.3])).backward()
    assert w.grad is not None
    assert (w.grad == 0).all()
