"""Metrics against independent implementations (skimage, the lpips package, numpy), closed forms, official figures."""

import math

import numpy as np
import pytest
import torch
from noisy_image import images
from torch import Tensor

from ddm_training.errors import InputError
from diffusionerf_ns.metrics import (
    PROTOCOLS,
    average_error,
    colour_correct,
    evaluate_depth,
    evaluate_image,
    evaluate_view,
    masked_psnr,
    on_white,
    psnr,
    ssim,
    summarise,
)


def disc(h: int = 40, w: int = 52) -> Tensor:
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return (y - h / 2) ** 2 + (x - w / 2) ** 2 < 200


# Closed forms


@pytest.mark.parametrize(("difference", "decibel"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_psnr_of_constant_images_is_the_closed_form(difference, decibel):
    zero = torch.zeros(8, 9, 3, dtype=torch.float64)
    assert psnr(zero + difference, zero) == pytest.approx(decibel)


def test_psnr_of_known_noise_is_its_variance_in_decibel():
    true = torch.full((200, 200, 3), 0.5, dtype=torch.float64)
    noisy = true + 0.05 * torch.randn(true.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert psnr(noisy, true) == pytest.approx(-20 * math.log10(0.05), abs=0.1)


@pytest.mark.parametrize("protocol", ["llff-regnerf", "dtu-regnerf", "nerfstudio"])
def test_equal_images_are_perfect_under_every_protocol(protocol, alexnet):
    _, true = images()
    values = evaluate_image(protocol, true, true, disc(), alexnet if protocol == "nerfstudio" else None)
    assert values["psnr"] == math.inf
    assert values["ssim"] == pytest.approx(1.0)
    assert values.get("lpips", 0.0) == pytest.approx(0.0, abs=1e-6)


def test_ssim_of_constant_images_is_the_luminance_term():
    a, b = torch.full((9, 9, 3), 0.2), torch.full((9, 9, 3), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert evaluate_image("llff-regnerf", a, b)["ssim"] == pytest.approx(expected, rel=1e-6)


def test_average_is_the_geometric_mean_of_three_errors():
    assert average_error(psnr=20.0, ssim=0.75, lpips=0.2) == pytest.approx((0.01 * 0.5 * 0.2) ** (1 / 3))
    assert average_error(psnr=math.inf, ssim=1.0, lpips=0.0) == 0.0
    assert average_error(psnr=10.0, ssim=0.99, lpips=0.1) == pytest.approx(0.1)  # three equal errors


# Independent implementations


@pytest.mark.parametrize("seed", range(3))
def test_psnr_and_ssim_agree_with_skimage(seed):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    pred, true = images(seed, noise=0.05 * (seed + 1))
    values = evaluate_image("llff-regnerf", pred, true)
    a, b = pred.double().numpy(), true.double().numpy()
    assert values["psnr"] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), abs=1e-9)
    assert values["ssim"] == pytest.approx(structural_similarity(a, b, channel_axis=-1, data_range=1), abs=1e-9)


def test_ssim_is_not_the_inflated_one_of_data_range_two():
    from skimage.metrics import structural_similarity

    pred, true = images()
    inflated = structural_similarity(pred.numpy(), true.numpy(), channel_axis=-1, data_range=2)
    assert evaluate_image("llff-regnerf", pred, true)["ssim"] < inflated - 0.05


def test_masked_metrics_agree_with_plain_numpy_and_skimage():
    from skimage.metrics import structural_similarity

    (pred, true), mask = images(), disc()
    values = evaluate_image("dtu-regnerf", pred, true, mask)
    a, b, m = pred.double().numpy(), true.double().numpy(), mask.numpy()
    squares = [(a[i, j, c] - b[i, j, c]) ** 2 for i, j in zip(*np.nonzero(m)) for c in range(3)]
    assert values["psnr"] == pytest.approx(-10 * math.log10(sum(squares) / len(squares)), abs=1e-9)
    white = [image * m[..., None] + (1 - m[..., None]) for image in (a, b)]
    expected = structural_similarity(*white, channel_axis=-1, data_range=1)
    assert values["ssim"] == pytest.approx(expected, abs=1e-9)


def photograph() -> Tensor:
    """Smooth colours that fill the range without touching its ends."""
    v, u = torch.meshgrid(torch.linspace(0.0, 1.0, 40), torch.linspace(0.0, 1.0, 50), indexing="ij")
    return 0.1 + 0.7 * torch.stack([u, v, 0.5 * (u + torch.sin(6.0 * v).abs())], dim=-1)


def test_colour_correction_takes_out_exposure_and_white_balance_and_no_more():
    true = photograph()
    dark = true * torch.tensor([0.5, 0.8, 0.6]) + 0.02
    torch.testing.assert_close(colour_correct(dark, true), true, atol=1e-4, rtol=0.0)
    noise = 0.05 * torch.randn(true.shape, generator=torch.Generator().manual_seed(0))
    values = evaluate_view("nerfstudio", (dark + noise).clamp(0.0, 1.0), true, colour_corrected=True)
    assert values["psnr"] < 15.0
    assert 20.0 < values["cc_psnr"] < 26.0, "about the noise is left, enlarged by what brightens the render"
    assert values["cc_ssim"] < 0.9


def test_colour_correction_is_an_addition_and_takes_any_render():
    true = photograph()
    shifted = true.roll(5, dims=1)
    plain, both = (evaluate_view("nerfstudio", shifted, true, colour_corrected=c) for c in (False, True))
    assert plain.items() <= both.items()
    assert both.keys() - plain.keys() == {"cc_psnr", "cc_ssim"}

    assert math.isnan(
        evaluate_view("nerfstudio", torch.full_like(true, torch.nan), true, colour_corrected=True)["cc_psnr"]
    )


def test_psnr_within_a_mask_is_an_addition():
    true = photograph()
    mask = torch.zeros(true.shape[:2], dtype=torch.bool)
    mask[10:20, 10:20] = True
    pred = torch.where(mask[..., None], true + 0.1, torch.zeros_like(true))
    values = evaluate_view("nerfstudio", pred, true, mask)
    assert values["masked_psnr"] > values["psnr"]
    clipped = (pred.clamp(0, 1) - true)[mask].double().square().mean()
    assert values["masked_psnr"] == pytest.approx(-10 * math.log10(float(clipped)), abs=1e-3)
    assert "masked_psnr" not in evaluate_view("nerfstudio", pred, true, torch.zeros_like(mask))


def test_colour_correction_is_nerfstudios_where_that_has_one():
    from nerfstudio.model_components.lib_bilagrid import color_correct

    pred, true = images()
    pred = pred.clamp(0.0, 1.0) ** 1.4  # some are clipped
    torch.testing.assert_close(colour_correct(pred, true), color_correct(pred.double(), true.double()).float())


@pytest.mark.parametrize(
    "change",
    [
        lambda pred, true: (torch.full_like(pred, 0.25), true),
        lambda pred, true: (pred.mean(dim=-1, keepdim=True).expand_as(pred), true),
        lambda pred, true: (pred, true * torch.tensor([1.0, 1.0, 0.0])),
        lambda pred, true: (pred * torch.tensor([1.0, 0.0, 1.0]), true),
        lambda pred, true: (pred, torch.ones_like(true)),
        lambda pred, true: (torch.where(torch.rand(pred.shape[:2])[..., None] < 0.003, pred, 0.0), true),
    ],
    ids=["one colour", "grey", "photograph without blue", "render without green", "white photograph", "nearly black"],
)
def test_colours_that_determine_no_fit_are_not_made_worse(change):
    torch.manual_seed(0)
    pred, true = change(0.8 * photograph().roll(3, dims=0), photograph())
    values = evaluate_view("nerfstudio", pred, true, colour_corrected=True)
    assert values["cc_psnr"] > values["psnr"] - 1e-6


def test_the_nerfstudio_protocol_is_what_nerfacto_computes(alexnet):
    """nerfacto's own calls (get_image_metrics_and_images), with its channel order and precision."""
    from torchmetrics.functional import structural_similarity_index_measure
    from torchmetrics.image import PeakSignalNoiseRatio
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    pred, true = images(h=64, w=72)
    b, a = (torch.moveaxis(image, -1, 0)[None] for image in (pred, true))
    values = evaluate_image("nerfstudio", pred, true, lpips=alexnet)
    assert list(values) == ["psnr", "ssim", "lpips"]
    assert values["psnr"] == pytest.approx(float(PeakSignalNoiseRatio(data_range=1.0)(a, b)), abs=1e-5)
    assert values["ssim"] == pytest.approx(float(structural_similarity_index_measure(a, b)), abs=1e-5)
    expected = LearnedPerceptualImagePatchSimilarity(normalize=True)(a, b).detach()
    assert values["lpips"] == pytest.approx(float(expected), abs=1e-6)


# Properties


def test_a_whole_mask_changes_nothing():
    pred, true = images()
    whole = torch.ones(true.shape[:2], dtype=torch.bool)
    assert evaluate_image("dtu-regnerf", pred, true, whole) == pytest.approx(evaluate_image("llff-regnerf", pred, true))


def test_the_masked_protocol_does_not_see_the_background():
    (pred, true), mask = images(), disc()
    changed = torch.where(mask[..., None], pred, torch.rand(pred.shape))
    assert evaluate_image("dtu-regnerf", changed, true, mask) == evaluate_image("dtu-regnerf", pred, true, mask)
    assert evaluate_image("llff-regnerf", changed, true) != evaluate_image("llff-regnerf", pred, true)


def test_on_white_keeps_the_inside_and_whitens_the_rest():
    (pred, _), mask = images(), disc()
    white = on_white(pred, mask)
    assert torch.equal(white[mask], pred[mask])
    assert bool((white[~mask] == 1).all())


def test_psnr_and_ssim_are_symmetric_and_ssim_falls_with_noise():
    pred, true = (v.double() for v in images())
    noisier = images(noise=0.3)[0].double()
    assert psnr(pred, true) == pytest.approx(psnr(true, pred))
    assert ssim(pred, true) == pytest.approx(ssim(true, pred))
    assert ssim(noisier, true) < ssim(pred, true) < 1
    assert masked_psnr(noisier, true, disc()) < masked_psnr(pred, true, disc())


def test_colours_outside_the_range_are_held_in_it():
    pred, true = images()
    assert evaluate_image("llff-regnerf", 3 * pred - 1, true) == evaluate_image(
        "llff-regnerf", (3 * pred - 1).clamp(0, 1), true
    )


def test_a_render_that_is_not_finite_gives_nan_and_not_a_number_to_publish(alexnet):
    pred, true = images(h=64, w=64)
    pred[3, 3, 0] = math.nan
    values = evaluate_image("nerfstudio", pred, true, lpips=alexnet)
    assert math.isnan(values["psnr"])
    assert math.isnan(values["lpips"])
    assert math.isnan(evaluate_image("llff-regnerf", pred, true)["ssim"])


# Depth


def test_depth_errors_of_a_scaled_map_are_the_closed_form_and_vanish_after_alignment():
    true = torch.linspace(1, 5, 63).reshape(7, 9)
    values = evaluate_depth(1.5 * true, true)
    assert values["depth_abs_rel"] == pytest.approx(0.5)
    assert values["depth_rmse"] == pytest.approx(0.5 * float(true.double().square().mean().sqrt()), rel=1e-6)
    assert values["depth_delta"] == 0.0
    assert values["depth_abs_rel_aligned"] == pytest.approx(0.0, abs=1e-6)
    assert values["depth_rmse_aligned"] == pytest.approx(0.0, abs=1e-6)
    assert values["depth_delta_aligned"] == 1.0


def test_depth_errors_agree_with_plain_numpy_on_valid_pixels():
    generator = torch.Generator().manual_seed(3)
    true = 1 + 4 * torch.rand(20, 30, generator=generator)
    pred = true * torch.exp(0.3 * torch.randn(20, 30, generator=generator)) + 0.5
    mask = torch.rand(20, 30, generator=generator) < 0.7
    true[0, :5], true[1, :5], true[2, :5] = 0.0, math.nan, math.inf
    values = evaluate_depth(pred, true, mask)
    t, p = true.double().numpy(), pred.double().numpy()
    keep = mask.numpy() & np.isfinite(t) & (t > 0)
    t, p = t[keep], p[keep]
    for suffix, q in (("", p), ("_aligned", p * np.median(t) / np.median(p))):
        assert values[f"depth_abs_rel{suffix}"] == pytest.approx(np.mean(np.abs(q - t) / t))
        assert values[f"depth_rmse{suffix}"] == pytest.approx(np.sqrt(np.mean((q - t) ** 2)))
        assert values[f"depth_delta{suffix}"] == pytest.approx(np.mean(np.maximum(q / t, t / q) < 1.25))


def test_depth_of_zero_is_never_within_the_factor_and_cannot_be_aligned():
    values = evaluate_depth(torch.zeros(4, 4), torch.ones(4, 4))
    assert (values["depth_abs_rel"], values["depth_delta"]) == (1.0, 0.0)
    assert math.isnan(values["depth_delta_aligned"])


def test_depth_without_anything_to_compare_is_refused():
    with pytest.raises(InputError, match="no pixel"):
        evaluate_depth(torch.ones(4, 4), torch.zeros(4, 4))
    with pytest.raises(InputError, match=r"same size.*\(4, 4\), \(4, 5\)"):
        evaluate_depth(torch.ones(4, 4), torch.ones(4, 5))


# Summary and bad input


def test_the_summary_is_the_mean_over_images_and_not_the_metric_of_the_mean():
    per_image = [{"psnr": 20.0, "average": 0.1}, {"psnr": 30.0, "average": 0.3}]
    assert summarise(per_image) == pytest.approx({"psnr": 25.0, "average": 0.2})
    assert summarise([{"psnr": math.inf}, {"psnr": 1.0}]) == {"psnr": math.inf}


def test_a_metric_of_some_images_only_is_said():
    with pytest.warns(UserWarning, match="depth_rmse is a mean over 1 of 2 images"):
        assert summarise([{"psnr": 1.0, "depth_rmse": 4.0}, {"psnr": 3.0}]) == {"psnr": 2.0, "depth_rmse": 4.0}


def test_a_summary_of_nothing_is_refused():
    with pytest.raises(InputError, match="test split is empty"):
        summarise([])


def test_values_are_written_under_the_name_of_the_protocol():
    pred, true = images()
    mask = torch.zeros(40, 52, dtype=torch.bool)
    mask[10:30, 10:30] = True
    plain, judged = evaluate_image("nerfstudio", pred, true), evaluate_image("dtu-regnerf", pred, true, mask)
    named = {f"dtu-regnerf/{name}": value for name, value in judged.items()}
    assert evaluate_view("dtu-regnerf", pred, true, mask) == plain | named
    assert evaluate_view("dtu-regnerf", pred, true) == evaluate_view("nerfstudio", pred, true) == plain
    assert judged["psnr"] != plain["psnr"]
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())


def test_a_missing_an_empty_and_a_misfitting_mask_are_refused():
    pred, true = images()
    with pytest.raises(InputError, match="needs an object mask"):
        evaluate_image("dtu-regnerf", pred, true)
    with pytest.raises(InputError, match="mask is empty"):
        evaluate_image("dtu-regnerf", pred, true, torch.zeros(40, 52, dtype=torch.bool))
    with pytest.raises(InputError, match=r"\(40, 52\), found \(52, 40\)"):
        evaluate_image("dtu-regnerf", pred, true, disc(52, 40))


def test_images_of_different_or_too_small_sizes_are_refused():
    pred, true = images()
    with pytest.raises(InputError, match="same size"):
        evaluate_image("llff-regnerf", pred, true[:-1])
    with pytest.raises(InputError, match="7 x 7 pixels or more"):
        evaluate_image("llff-regnerf", pred[:6], true[:6])
