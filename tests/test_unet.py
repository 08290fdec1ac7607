"""Networks of the denoiser: their sizes and precision, loading from a prior folder, what is refused."""

import json
from pathlib import Path

import pytest
import torch
import toy_training
from toy_training import config

from ddm_training.errors import InputError
from ddm_training.train import train
from ddm_training.unet import (
    Predictor,
    Preset,
    load_scheduler,
    load_unet,
    make_scheduler,
    make_unet,
    tau_to_timestep,
    velocity_to_noise,
)

pytestmark = pytest.mark.usefixtures("one_thread")
store = toy_training.store  # a fixture


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("prototype", 1.7e6, 1.9e6), ("tiny", 3e6, 4.19e6), ("paper", 33e6, 39e6)]
)
def test_presets_have_the_sizes_that_they_promise(preset: Preset, low: float, high: float):
    """Tiny: at most 8 MiB in half precision. Paper: 36.25 M in the authors' code."""
    with torch.device("meta"):
        network = make_unet(preset)
    assert low <= sum(p.numel() for p in network.parameters()) <= high


def test_bf16_does_not_round_the_input_of_the_network():
    """The first convolution is the same to the bit under autocast; the output is fp32."""
    network = Predictor(make_unet("prototype", patch_size=16), bf16=True)
    x, t = torch.rand(1, 4, 16, 16), torch.tensor([3])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = network.unet.conv_in(x)
        assert network.unet.conv_out(first).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(first, network.unet.conv_in(x))
        assert network(x, t).dtype == torch.float32


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prior(store, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    train(config(store, output, max_train_steps=1))
    return output / "prior"


@pytest.fixture
def damaged(prior, tmp_path) -> Path:
    import shutil

    shutil.copytree(prior, tmp_path / "prior")
    return tmp_path / "prior"


def edit(path: Path, **changed) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_velocity_becomes_noise_by_the_schedule_of_its_own_folder(store, tmp_path):
    train(config(store, tmp_path, export_dtype="fp32", prediction_type="v_prediction"))
    edit(tmp_path / "prior" / "scheduler" / "scheduler_config.json", beta_schedule="linear")
    network = load_unet(tmp_path / "prior")
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([99])
    with torch.no_grad():
        expected = velocity_to_noise(network.unet(x, t).sample, x, load_scheduler(tmp_path / "prior").alphas_cumprod[t])
        assert torch.equal(network(x, t), expected)
        wrong = velocity_to_noise(network.unet(x, t).sample, x, make_scheduler().alphas_cumprod[t])
    assert (wrong - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("tau", "t"), [(0.1, 99), (0.05, 49), (0.01, 9), (0.0, 3), (0.004, 3), (0.005, 4), (0.5, 499), (1.0, 999)]
)
def test_tau_becomes_the_timestep_of_the_authors_code(tau, t):
    assert tau_to_timestep(tau) == t


def test_tau_stays_within_a_shorter_schedule():
    assert [tau_to_timestep(tau, 100) for tau in (0.0, 0.1, 1.0)] == [3, 9, 99]


def test_weights_that_do_not_fit_are_named(damaged):
    edit(damaged / "unet" / "config.json", block_out_channels=[16, 32, 48])
    with pytest.raises(InputError, match=r"do not fit config.json: .*conv_in"):
        load_unet(damaged)


def test_networks_of_other_channels_or_classes_are_refused(damaged):
    edit(damaged / "unet" / "config.json", in_channels=3)
    with pytest.raises(InputError, match="needs 4 and 4"):
        load_unet(damaged)
    edit(damaged / "unet" / "config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(InputError, match="'UNet2DConditionModel'"):
        load_unet(damaged)


def test_pickled_truncated_or_missing_weights_are_refused(damaged):
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="truncated or damaged"):
        load_unet(damaged)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="never from pickled files"):
        load_unet(damaged)
    with pytest.raises(InputError, match="expected a prior folder"):
        load_unet(damaged / "nowhere")


def test_a_scheduler_that_predicts_neither_noise_nor_velocity_is_refused(damaged):
    edit(damaged / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(InputError, match="predicts epsilon or v_prediction"):
        load_scheduler(damaged)
