"""Refinement of rendered views: closed forms, tiles against the whole, and when it is left out."""

import pytest
import torch
from test_inspection import CountingPrior
from torch.nn import functional as F

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


def test_tiles_give_what_the_whole_view_gives(monkeypatch):
    """A network that looks 3 pixels far, within the overlap of the tiles; it sees depth as well."""

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - F.avg_pool2d(x, 7, stride=1, padding=3, count_include_pad=False) + 0.1 * x[:, 3:]

    prior = PatchPrior(denoiser, make_scheduler().alphas_cumprod, RgbdSpec(patch_size=16))
    rgb, z = torch.rand(64, 80, 3), 1.0 + torch.rand(64, 80)
    whole = refine.refined_colours(rgb, z, prior, TAU)
    monkeypatch.setattr(refine, "TILE", 32)
    monkeypatch.setattr(refine, "OVERLAP", 8)
    torch.testing.assert_close(refine.refined_colours(rgb, z, prior, TAU), whole)
    assert (whole - rgb).abs().mean() > 0.001


def test_fine_detail_of_noise_is_its_deviation_and_of_a_shaded_wall_next_to_nothing():
    torch.manual_seed(0)
    assert refine.fine_detail(0.5 + 0.05 * torch.randn(101, 80, 3)) == pytest.approx(0.05, rel=0.03)
    assert refine.fine_detail(torch.linspace(0, 1, 80)[None, :, None].expand(101, 80, 3)) < 1e-6
    assert refine.fine_detail(torch.rand(1, 1, 3)) == 0.0


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


def test_grain_goes_and_the_image_stays():
    """The built-in prior takes most of the noise out of a smooth shaded wall."""
    torch.manual_seed(0)
    prior = PatchPrior.load("builtin")
    v, u = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 64), indexing="ij")
    wall = torch.stack([0.6 + 0.2 * u, 0.5 + 0.2 * v, 0.5 + 0.1 * u * v], dim=-1)
    grainy = (wall + 0.05 * torch.randn_like(wall)).clamp(0, 1)
    refined = refine.refined_colours(grainy, 2.0 + u, prior, TAU)
    assert (refined - wall).square().mean() < 0.25 * (grainy - wall).square().mean()
