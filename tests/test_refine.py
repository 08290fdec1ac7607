"""Refinement of rendered views: closed forms, tiles against the whole, and when it is left out."""

import pytest
import torch
from test_inspection import CountingPrior

from ddm_training.rgbd import RgbdSpec
from ddm_training.unet import make_scheduler
from diffusionerf_ns import refine
from diffusionerf_ns.prior import PatchPrior

TAU = 0.07


@pytest.mark.parametrize("size", [(1, 1), (8, 16), (37, 21)])
def test_a_gaussian_prior_shrinks_colours_towards_its_mean(size):
    """Score -x: the clean estimate is (1 - sigma^2) x, with x = 2 rgb - 1."""
    prior = CountingPrior().prior
    rgb, z = torch.rand(*size, 3), 1.0 + torch.rand(size)
    expected = 0.5 + (rgb - 0.5) * (1.0 - prior.sigma(TAU) ** 2)
    torch.testing.assert_close(refine.refined_colours(rgb, z, prior, TAU), expected)


def test_a_view_larger_than_a_tile_is_blended_from_tiles_of_one_size(monkeypatch):
    """A network whose answer depends on the whole of its input, as those with norms and attention do."""
    sizes = set()

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sizes.add(tuple(x.shape[2:]))
        return x - x.mean(dim=(2, 3), keepdim=True)

    monkeypatch.setattr(refine, "TILE", 32)
    prior = PatchPrior(denoiser, make_scheduler().alphas_cumprod, RgbdSpec(patch_size=16))
    u = torch.linspace(0.2, 0.8, 81).expand(37, 81)
    rgb = torch.stack([u, u, u], dim=-1)  # tiles have different means: cut hard, their borders would show
    change = refine.refined_colours(rgb, torch.full((37, 81), 2.0), prior, TAU) - rgb
    assert sizes == {(32, 32)}
    assert change.abs().max() > 0.01
    assert (change[:, 1:] - change[:, :-1]).abs().max() < 0.004


def test_a_network_that_takes_patches_only_is_shown_patches_only():
    sizes = set()

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sizes.add(tuple(x.shape[2:]))
        return torch.zeros_like(x)

    prior = PatchPrior(denoiser, make_scheduler().alphas_cumprod, RgbdSpec(patch_size=16), any_size=False)
    rgb = torch.rand(20, 40, 3)
    torch.testing.assert_close(refine.refined_colours(rgb, torch.ones(20, 40), prior, TAU), rgb)
    assert sizes == {(16, 16)}


def test_a_deeper_network_gets_sides_that_it_can_halve_as_often_as_it_does():
    sizes = set()

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sizes.add(tuple(x.shape[2:]))
        return torch.zeros_like(x)

    prior = PatchPrior(denoiser, make_scheduler().alphas_cumprod, RgbdSpec(patch_size=48), multiple=16)
    refine.refined_colours(torch.rand(72, 96, 3), torch.ones(72, 96), prior, TAU)
    assert sizes == {(80, 96)}


def test_a_clean_estimate_with_more_grain_than_the_view_is_not_taken():
    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(x)

    prior = PatchPrior(denoiser, make_scheduler().alphas_cumprod, RgbdSpec(patch_size=16))
    rgb = 0.5 + 0.02 * torch.randn(64, 64, 3)
    assert torch.equal(refine.refined_view(rgb, torch.ones(64, 64), prior, TAU, 0.0), rgb)


def test_the_photographs_detail_is_that_of_the_views_scale():
    torch.manual_seed(0)
    photographs = [(0.5 + 0.08 * torch.randn(64, 96, 3), None, 100.0)] * 2
    details = refine.detail_by_scale(photographs)
    assert [focal for focal, _ in details] == [100.0, 50.0, 25.0, 12.5]
    # the mean of 4 pixels has half the deviation
    assert [d for _, d in details] == pytest.approx([0.08, 0.04, 0.02, 0.01], rel=0.15)
    for focal, octave in ((1000.0, 0), (100.0, 0), (55.0, 1), (23.0, 2), (1.0, 3)):
        assert refine.detail_at(details, focal) == details[octave][1]
    assert len(refine.detail_by_scale([(torch.rand(3, 9, 3), None, 10.0)])) == 2


def test_fine_detail_of_noise_is_its_deviation_and_of_a_shaded_wall_next_to_nothing():
    torch.manual_seed(0)
    assert refine.fine_detail(0.5 + 0.05 * torch.randn(101, 80, 3)) == pytest.approx(0.05, rel=0.03)
    assert refine.fine_detail(torch.linspace(0, 1, 80)[None, :, None].expand(101, 80, 3)) < 1e-6
    assert refine.fine_detail(torch.rand(1, 1, 3)) == 0.0


def test_detail_is_that_of_a_cut_out_and_not_of_the_flat_colour_around_it():
    torch.manual_seed(0)
    rgb, inside = torch.ones(64, 96, 3), torch.zeros(64, 96, dtype=torch.bool)
    inside[17:47, 33:63] = True
    rgb[inside] = 0.5 + 0.04 * torch.randn(900, 3)
    assert refine.fine_detail(rgb) == 0.0
    assert refine.fine_detail(rgb, inside) == pytest.approx(0.04, rel=0.1)
    assert refine.fine_detail(rgb, ~inside) == 0.0
    assert refine.fine_detail(rgb, torch.zeros_like(inside)) == 0.0
    details = [detail for _, detail in refine.detail_by_scale([(rgb, inside, 100.0)])]
    assert details[:3] == pytest.approx([0.04, 0.02, 0.01], rel=0.3)


def test_a_view_is_refined_until_it_has_the_detail_of_the_photographs():
    torch.manual_seed(0)
    prior = CountingPrior().prior  # shrinks contrast, and with it the grain, by 1 - sigma^2
    rgb, z = 0.5 + 0.05 * torch.randn(64, 64, 3), torch.ones(64, 64)
    has, least = refine.fine_detail(rgb), refine.fine_detail(refine.refined_colours(rgb, z, prior, TAU))
    assert least < has
    wanted = 0.5 * (has + least)
    assert refine.fine_detail(refine.refined_view(rgb, z, prior, TAU, wanted)) == pytest.approx(wanted, rel=1e-3)
    assert torch.equal(refine.refined_view(rgb, z, prior, TAU, 1.01 * has), rgb)
    most = refine.refined_view(rgb, z, prior, TAU, 0.0)
    torch.testing.assert_close(most, refine.refined_colours(rgb, z, prior, TAU))


@pytest.mark.parametrize(
    ("share", "levels", "between"),
    [(0.5, [1, 1 / 3], (0, 1 / 3)), (1.5, [1, 1 / 3, 2 / 3], (1 / 3, 2 / 3)), (2.5, [1, 1 / 3, 2 / 3], (2 / 3, 1))],
)
def test_no_more_noise_is_assumed_than_it_takes_to_have_the_photographs_detail(monkeypatch, share, levels, between):
    """``share`` counts from the view's own detail (0) over those of the three estimates (1, 2, 3)."""
    torch.manual_seed(0)
    tried, real = [], refine.refined_colours
    prior = CountingPrior().prior
    rgb, z = 0.5 + 0.05 * torch.randn(64, 64, 3), torch.ones(64, 64)

    def at(level: float) -> torch.Tensor:
        return real(rgb, z, prior, level * TAU) if level else rgb

    def spy(rgb, z, prior, tau):
        tried.append(tau / TAU)
        return real(rgb, z, prior, tau)

    monkeypatch.setattr(refine, "refined_colours", spy)
    details = [refine.fine_detail(at(level)) for level in (0, 1 / 3, 2 / 3, 1)]
    assert sorted(details, reverse=True) == details
    wanted = 0.5 * (details[int(share)] + details[int(share) + 1])
    refined = refine.refined_view(rgb, z, prior, TAU, wanted)
    assert tried == pytest.approx(levels)
    assert refine.fine_detail(refined) == pytest.approx(wanted, rel=1e-3)
    torch.testing.assert_close(refined, torch.lerp(at(between[0]), at(between[1]), 0.5), atol=1e-4, rtol=0.0)


def test_grain_goes_and_the_image_stays():
    """The built-in prior takes most of the noise out of a smooth shaded wall."""
    torch.manual_seed(0)
    prior = PatchPrior.load("builtin")
    v, u = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 64), indexing="ij")
    wall = torch.stack([0.6 + 0.2 * u, 0.5 + 0.2 * v, 0.5 + 0.1 * u * v], dim=-1)
    grainy = (wall + 0.05 * torch.randn_like(wall)).clamp(0, 1)
    refined = refine.refined_colours(grainy, 2.0 + u, prior, TAU)
    assert (refined - wall).square().mean() < 0.25 * (grainy - wall).square().mean()
