"""Samples and evaluation, against predictors whose answers are known in closed form."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddm_training import evaluate, plausibility, sheets
from ddm_training.errors import InputError
from ddm_training.export import export_prior, model_card, parameter_count
from ddm_training.frames import SceneWriter
from ddm_training.rgbd import RgbdSpec, encode_depth
from ddm_training.sample import SampleConfig, draw_samples
from ddm_training.unet import make_scheduler, make_unet
from ddm_training.validation import noise_losses

ABAR = make_scheduler().alphas_cumprod


pytestmark = pytest.mark.usefixtures("one_thread")


def write_store(root: Path, *, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    writer = SceneWriter(root, "a", split="val", source="toy", max_frames=3, height=40, width=48)
    for index in range(3):
        color = rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)
        depth = rng.uniform(1, 4, (40, 48)).astype(np.float32)
        writer.add(color, depth, rng.random((40, 48)) > 0.1, intrinsics=(150.0, 150.0, 24.0, 20.0), name=f"{index}")
    writer.close()
    return root


def write_prior(folder: Path, *, patch_size: int = 16) -> Path:
    torch.manual_seed(0)
    unet = make_unet("prototype", patch_size=patch_size)
    spec = RgbdSpec(patch_size=patch_size, focal=150.0, focal_range=(150.0, 150.0), steps=7, trained_on=("toy",))
    settings = {
        "preset": "prototype", "loss_type": "l2", "learning_rate": 1e-3, "mixed_precision": "no",
        "depth_loss_weight": 3.0, "timestep_bias": 0.5, "prediction_type": "epsilon",
    }  # fmt: skip
    card = model_card(spec, config=settings, parameters=parameter_count(unet), measured={}, sheet=False)
    export_prior(folder, unet=unet, scheduler=make_scheduler(), spec=spec, card=card, sheet=None)
    return folder


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 4, 16, 16, generator=generator) * 2 - 1
    return {
        "x": x,
        "mask": torch.rand(6, 16, 16, generator=generator) > 0.2,
        "noise": torch.randn(6, 4, 16, 16, generator=generator),
    }


def perfect(batch):
    """The predictor that knows the clean patches, told apart by their order within each call."""
    position = 0

    def denoise(x_t, t):
        nonlocal position
        x = batch["x"][position : position + len(t)]
        position = (position + len(t)) % len(batch["x"])
        abar = ABAR[t][:, None, None, None]
        return (x_t - abar.sqrt() * x) / (1 - abar).sqrt()

    return denoise


def zero(x_t, t):
    return torch.zeros_like(x_t)


def test_predicting_zero_costs_the_power_of_the_noise(batch):
    losses = noise_losses(zero, batch["x"], batch["mask"], batch["noise"], levels=(3, 900), abar=ABAR, batch=4)
    squared = batch["noise"].square()
    expected = squared[:, 3][batch["mask"]].mean().item()
    for level in ("3", "900"):
        assert losses[level]["depth"] == pytest.approx(expected, rel=1e-5)
        assert losses[level]["all"] == pytest.approx(1.0, abs=0.05)


def test_a_perfect_predictor_has_no_loss_and_no_depth_error(batch):
    given = (batch["x"], batch["mask"], batch["noise"])
    losses = noise_losses(perfect(batch), *given, levels=(20, 99), abar=ABAR, batch=4)
    assert max(losses["20"]["all"], losses["99"]["depth"]) < 1e-6
    errors = evaluate.depth_errors(perfect(batch), *given, levels=(20, 99), abar=ABAR, batch=4)
    assert errors["99"]["clean"] < 1e-5


def test_invalid_depth_does_not_count_in_an_evaluation(batch):
    noise = batch["noise"].clone()
    noise[:, 3][~batch["mask"]] = 1e6
    for measure in (noise_losses, evaluate.depth_errors):
        clean, broken = (
            measure(zero, batch["x"], batch["mask"], n, levels=(99,), abar=ABAR) for n in (batch["noise"], noise)
        )
        assert clean == broken


def test_the_noisy_error_is_sigma_over_root_abar(batch):
    """.0139 at t = 3 and .1695 at t = 99; predicting no noise leaves it as it is."""
    errors = evaluate.depth_errors(zero, batch["x"], batch["mask"], batch["noise"], levels=(3, 20, 49, 99), abar=ABAR)
    for level, figures in errors.items():
        sigma = ((1 - ABAR[int(level)]) / ABAR[int(level)]).sqrt().item()
        assert figures["noisy"] == pytest.approx(sigma, rel=0.06)
        assert figures["ratio"] == pytest.approx(1.0, rel=1e-5)
    assert errors["99"]["noisy"] == pytest.approx(0.1695, rel=0.06)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 50), ("ddpm", 200)])
def test_sampling_follows_the_score_of_a_known_distribution(sampler, steps, prediction):
    """For data N(m, s^2) the best noise prediction is linear in x_t; samples must have that mean and deviation.

    Whatever the network behind it predicts, it is given as a function that gives noise.
    """
    m, s = 0.3, 0.1

    def denoise(x_t, t):
        abar = ABAR[t][:, None, None, None]
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * m) / (abar * s**2 + 1 - abar)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 4, 8, 8, generator=generator)
    scheduler = make_scheduler(prediction)
    x = draw_samples(denoise, scheduler, noise, sampler=sampler, steps=steps, generator=generator)
    assert x.mean().item() == pytest.approx(m, abs=0.02)
    assert x.std().item() == pytest.approx(s, rel=0.15)


def test_gradient_size_of_a_ramp():
    ramp = torch.arange(6.0)[None, :] * 0.3 + torch.arange(5.0)[:, None] * 0.4
    assert torch.allclose(plausibility.gradient_size(ramp[None]), torch.tensor(0.5))


def test_other_draws_of_the_data_are_plausible_and_noise_is_not():
    def smooth(count):
        level = torch.rand(count, 4, 1, 1) - 0.5
        return (
            level + 0.2 * torch.rand(count, 4, 1, 1) * torch.linspace(-1, 1, 16) + 0.05 * torch.rand(count, 4, 16, 16)
        )

    torch.manual_seed(0)
    data = plausibility.patch_statistics(smooth(1000))
    same, each = plausibility.plausible_share(plausibility.patch_statistics(smooth(1000)), data)
    noise, _ = plausibility.plausible_share(plausibility.patch_statistics(torch.randn(100, 4, 16, 16)), data)
    assert same > 0.9
    assert len(each) == len(plausibility.STATISTICS)
    assert noise == 0.0


def test_histogram_distance_is_zero_for_equal_and_one_for_disjoint():
    a = plausibility.histogram(torch.full((10,), -0.9), plausibility.DEPTH_BINS)
    b = plausibility.histogram(torch.full((10,), 0.9), plausibility.DEPTH_BINS)
    assert plausibility.total_variation(a, a) == 0.0
    assert plausibility.total_variation(a, b) == pytest.approx(1.0)


def test_a_sheet_shows_colour_left_and_depth_right():
    x = torch.full((3, 4, 8, 8), -1.0)
    x[:, 0] = 1.0  # red
    x[:, 3] = encode_depth(torch.tensor(20.0))  # the far end of the colour map
    sheet = sheets.patch_sheet(x, columns=2, zoom=1)
    assert sheet.shape == (2 * 12, 2 * 20, 3)
    assert sheet[5, 5].tolist() == [255, 0, 0]
    assert sheet[5, 14].tolist() == sheets.color_depth(np.array([20.0])).squeeze().tolist()
    assert (sheet[14:22, 22:38] == 255).all()  # the fourth cell is empty


def test_eval_measures_each_prior_on_each_store(tmp_path, capsys):
    write_store(tmp_path / "rooms")
    for name in ("first", "second"):
        write_prior(tmp_path / name / "prior")
    evaluate.EvalConfig(
        prior=(tmp_path / "first" / "prior", tmp_path / "second" / "prior"),
        data=(tmp_path / "rooms",),
        output_dir=tmp_path / "out",
        num_patches=6,
        num_samples=4,
        num_inference_steps=2,
        device="cpu",
    ).main()
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(result["priors"]) == ["first", "second"]
    first, second = (result["priors"][name]["stores"]["rooms"] for name in ("first", "second"))
    assert first == second  # the same weights on the same patches with the same noise
    assert list(first["depth_rmse"]) == ["99", "49", "20", "3"]
    assert first["depth_rmse_by_tau"]["0.1"] == first["depth_rmse"]["99"]
    assert 0 <= result["priors"]["first"]["samples"]["plausible"] <= 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "denoising-first-rooms.png", "denoising-second-rooms.png", "denoising.png", "evaluation.json", "evaluation.md",
        "histograms-first.png", "histograms-second.png",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert f"{first['depth_rmse']['99']['clean']:.4f}" in printed


def test_stores_of_one_name_are_measured_apart(tmp_path):
    stores = write_store(tmp_path / "a" / "rooms"), write_store(tmp_path / "b" / "rooms", seed=1)
    prior = write_prior(tmp_path / "prior")
    result = evaluate.evaluate(
        evaluate.EvalConfig(
            prior=(prior,), data=stores, output_dir=tmp_path / "out", num_patches=2, num_samples=0, device="cpu"
        )
    )
    (measured,) = (prior["stores"] for prior in result["priors"].values())
    assert list(measured) == ["rooms", "rooms-2"]
    assert measured["rooms"] != measured["rooms-2"]
    assert len(list((tmp_path / "out").glob("denoising-*-rooms*.png"))) == 2


def test_a_linked_store_has_the_name_that_was_given(tmp_path):
    write_store(tmp_path / "store-17")
    (tmp_path / "rooms").symlink_to("store-17")
    assert evaluate.unique_names([tmp_path / "rooms", tmp_path / "rooms" / ".." / "store-17"]) == ["rooms", "store-17"]


def test_eval_refuses_priors_of_different_patch_sizes_and_empty_splits(tmp_path):
    store = write_store(tmp_path / "rooms")
    one, other = write_prior(tmp_path / "a"), write_prior(tmp_path / "b", patch_size=24)
    with pytest.raises(InputError, match="different patch sizes"):
        evaluate.evaluate(evaluate.EvalConfig(prior=(one, other), data=(store,), output_dir=tmp_path / "out"))
    with pytest.raises(InputError, match="no frames of split 'test'"):
        evaluate.evaluate(evaluate.EvalConfig(prior=(one,), data=(store,), output_dir=tmp_path / "out", split="test"))


def test_samples_are_written_as_a_sheet_and_repeat_with_their_seed(tmp_path):
    from PIL import Image

    prior = write_prior(tmp_path / "prior")
    pictures = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        SampleConfig(
            prior=prior, output=tmp_path / f"{name}.png", num_samples=3, num_inference_steps=2, seed=seed, device="cpu"
        ).main()
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": -1}, "--num-samples must be at least 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"focal": float("nan")}, "--focal must be positive"),
    ],
)
def test_settings_of_eval_out_of_range_name_their_flag(changed, message, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluate.EvalConfig(prior=(tmp_path,), data=(tmp_path,), output_dir=tmp_path, **changed)


def test_more_steps_of_sampling_than_timesteps_are_refused(tmp_path):
    prior, store = write_prior(tmp_path / "prior"), write_store(tmp_path / "rooms")
    message = "--num-inference-steps must be at most 1000, the timesteps of the prior, found 1001"
    with pytest.raises(InputError, match=message):
        SampleConfig(prior=prior, output=tmp_path / "a.png", num_inference_steps=1001, device="cpu").main()
    config = evaluate.EvalConfig(
        prior=(prior,), data=(store,), output_dir=tmp_path / "out", num_inference_steps=1001, device="cpu"
    )
    with pytest.raises(InputError, match=message):
        evaluate.evaluate(config)


def test_steps_of_ddim_that_do_not_divide_the_timesteps_are_refused(tmp_path):
    prior = write_prior(tmp_path / "prior")
    message = "--num-inference-steps must divide 1000, .* --sampler ddim, found 600: give 500, or --sampler ddpm"
    settings = {"prior": prior, "output": tmp_path / "a.png", "device": "cpu", "num_samples": 1}
    with pytest.raises(InputError, match=message):
        SampleConfig(**settings, sampler="ddim", num_inference_steps=600).main()
    SampleConfig(**settings, sampler="ddim", num_inference_steps=4).main()
    SampleConfig(**settings, sampler="ddpm", num_inference_steps=3).main()


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    prior, store = write_prior(tmp_path / "prior"), write_store(tmp_path / "rooms")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("ddm_training.unet.load_unet", None)
    with pytest.raises(InputError, match=r"--output: folder .*file cannot be made: .*Give another folder"):
        SampleConfig(prior=prior, output=tmp_path / "file" / "a.png", device="cpu").main()
    config = evaluate.EvalConfig(prior=(prior,), data=(store,), output_dir=tmp_path / "file" / "out", device="cpu")
    with pytest.raises(InputError, match=r"--output-dir .*out cannot be made: .*Give another folder"):
        evaluate.evaluate(config)


def test_a_sheet_that_cannot_be_written_is_named(tmp_path):
    prior = write_prior(tmp_path / "prior")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match=r"taken could not be written .*give another --output"):
        SampleConfig(prior=prior, output=tmp_path / "taken", num_samples=1, num_inference_steps=1, device="cpu").main()


@pytest.mark.parametrize("file", ["denoising-p-store.png", "denoising.png", "evaluation.json"])
def test_what_an_evaluation_cannot_write_is_told(tmp_path, file):
    store = write_store(tmp_path / "store")
    (tmp_path / "out" / file).mkdir(parents=True)
    config = evaluate.EvalConfig(
        prior=(write_prior(tmp_path / "p"),), data=(store,), output_dir=tmp_path / "out", num_patches=2,
        num_samples=0, device="cpu",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"out.* could not be written .*give another --output-dir"):
        evaluate.evaluate(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_cuda_without_one_says_so(tmp_path):
    with pytest.raises(InputError, match="no CUDA device"):
        SampleConfig(prior=write_prior(tmp_path / "prior"), device="cuda").main()
