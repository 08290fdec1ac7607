"""`ddm convert`, against the outputs of the authors' network at width 8."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddm_training.authors_unet import RgbdPatchUNet, StandardizedConv, embed_timestep
from ddm_training.convert import ConvertConfig, read_checkpoint, scheduler_of
from ddm_training.errors import InputError
from ddm_training.rgbd import RgbdSpec

TIMESTEPS = (3, 99, 500)


@pytest.fixture(scope="module")
def checkpoint_path(real_data) -> Path:
    return real_data("reference/rgbd-patch-diffusion-dim8.pt")


@pytest.fixture(scope="module")
def reference(real_data) -> dict[str, torch.Tensor]:
    with np.load(real_data("reference/rgbd-patch-diffusion-dim8-io.npz")) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def prior(checkpoint_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "authors"
    ConvertConfig(checkpoint=checkpoint_path, output_dir=folder).main()
    return folder


@pytest.fixture
def content(checkpoint_path) -> dict:
    """The checkpoint's content without what is not used, to be damaged and written again."""
    loaded = torch.load(checkpoint_path, weights_only=True)
    return {"step": loaded["step"], "ema": loaded["ema"]}


def refuse(content: object, folder: Path, match: str) -> None:
    torch.save(content, folder / "bad.pt")
    with pytest.raises(InputError, match=match):
        ConvertConfig(checkpoint=folder / "bad.pt", output_dir=folder / "prior").main()
    assert [p.name for p in folder.iterdir()] == ["bad.pt"], "nothing is written for a checkpoint that is refused"


@pytest.mark.parametrize("t", TIMESTEPS)
def test_noise_and_clean_estimate_agree_with_the_reference_network(prior, reference, t):
    from diffusers import DDPMScheduler

    model, scheduler = RgbdPatchUNet.load(prior / "unet"), DDPMScheduler.from_pretrained(prior / "scheduler")
    x = reference["x"]
    with torch.no_grad():
        noise = model(x, torch.full((len(x),), t))
    clean = scheduler.step(noise, t, x).pred_original_sample
    assert (noise - reference[f"eps_t{t}"]).abs().max() < 1e-4
    assert (clean - reference[f"x0_t{t}"]).abs().max() < 1e-4


def test_alphas_agree_with_the_reference_and_are_the_cosine_schedule(prior, reference):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(prior / "scheduler")
    assert scheduler.config["beta_schedule"] == "squaredcos_cap_v2"
    assert scheduler.config["prediction_type"] == "epsilon"
    assert (scheduler.alphas_cumprod - reference["alphas_cumprod"]).abs().max() < 1e-5


def test_another_noise_schedule_is_kept_as_it_is(content, tmp_path):
    betas = torch.linspace(1e-4, 2e-2, 1000)
    alphas = (1 - betas).cumprod(0)
    content["ema"] |= {"ema_model.betas": betas, "ema_model.alphas_cumprod": alphas}
    torch.save(content, tmp_path / "linear.pt")
    scheduler = scheduler_of(read_checkpoint(tmp_path / "linear.pt"))
    assert (scheduler.alphas_cumprod - alphas).abs().max() < 1e-6


def test_the_averaged_weights_are_taken_and_not_the_online_ones(prior, checkpoint_path, tmp_path):
    loaded = torch.load(checkpoint_path, weights_only=True)
    name = "ema_model.model.final_conv.bias"
    loaded["ema"][name] = loaded["ema"][name] + 1.0
    torch.save(loaded, tmp_path / "shifted.pt")
    bias = read_checkpoint(tmp_path / "shifted.pt").model.final_conv.bias
    assert torch.equal(bias, RgbdPatchUNet.load(prior / "unet").final_conv.bias + 1.0)


def test_a_folder_that_is_loaded_and_saved_again_gives_identical_outputs(prior, tmp_path):
    first = RgbdPatchUNet.load(prior / "unet")
    first.save_pretrained(tmp_path / "unet")
    x, t = torch.randn(2, 4, 24, 32), torch.tensor([5.0, 700.0])
    with torch.no_grad():
        assert torch.equal(first(x, t), RgbdPatchUNet.load(tmp_path / "unet")(x, t))


def test_the_folder_says_what_the_prior_is(prior):
    assert {p.name for p in prior.iterdir()} == {"unet", "scheduler", "rgbd.json", "README.md"}
    spec = RgbdSpec.load(prior)
    assert (spec.near, spec.patch_size, spec.focal, spec.trained_on, spec.steps) == (0.2, 48, 175.0, ("hypersim",), 7)
    assert "MIT" in spec.license
    config = json.loads((prior / "unet" / "config.json").read_text())
    assert config == {"_class_name": "RgbdPatchUNet", "dim": 8, "multipliers": [1, 2, 4, 8], "channels": 4}
    card = (prior / "README.md").read_text()
    assert "683,556 parameters" in card
    assert "rgbd-patch-diffusion-dim8.pt" in card


def test_the_network_of_the_paper_has_36254980_parameters():
    with torch.device("meta"):
        model = RgbdPatchUNet(dim=64)
    assert sum(p.numel() for p in model.parameters()) == 36_254_980


def test_width_and_multipliers_are_inferred_from_the_shapes(tmp_path):
    """A checkpoint of another size, its names given by the authors' for ours."""
    model = RgbdPatchUNet(dim=16, multipliers=(1, 3))
    betas = torch.linspace(1e-4, 2e-2, 10)
    ema = {f"ema_model.model.{_authors_name(k, last=1)}": v for k, v in model.state_dict().items()}
    ema |= {"ema_model.betas": betas, "ema_model.alphas_cumprod": (1 - betas).cumprod(0)}
    torch.save({"step": 1, "ema": OrderedDict(ema)}, tmp_path / "small.pt")
    found = read_checkpoint(tmp_path / "small.pt").model
    assert (found.dim, found.multipliers) == (16, (1, 3))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([3])
    assert torch.equal(found(x, t), model(x, t))


def _authors_name(name: str, last: int) -> str:
    parts = name.split(".")
    if parts[0] == "time_mlp":
        parts[1] = {"0": "1", "2": "3"}[parts[1]]
    if parts[0] in ("downs", "ups"):
        index = parts[1]
        parts[2] = {"first": "0", "second": "1", "attention": "2", "resize": "3"}[parts[2]]
        if parts[2] == "3" and parts[0] == "ups" and index == str(last):
            del parts[3]
        if parts[2] == "2":
            parts[3:] = {"norm": ["fn", "norm", "g"], "out_norm": ["fn", "fn", "to_out", "1", "g"]}.get(
                parts[3], ["fn", "fn", *(["to_out", "0"] if parts[3] == "to_out" else [parts[3]]), parts[-1]]
            )
    if parts[0] == "mid_attn":
        parts[1:] = ["fn", "norm", "g"] if parts[1] == "norm" else ["fn", "fn", *parts[1:]]
    return ".".join(parts)


def test_patches_of_a_batch_do_not_mix(prior):
    model = RgbdPatchUNet.load(prior / "unet")
    x, t = torch.randn(3, 4, 48, 48), torch.tensor([3, 99, 500])
    with torch.no_grad():
        together, alone = model(x, t), torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_bf16_autocast_stays_near_the_reference(prior, reference):
    model = RgbdPatchUNet.load(prior / "unet")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        noise = model(reference["x"], torch.full((2,), 99))
    expected = reference["eps_t99"]
    assert (noise.float() - expected).norm() < 0.02 * expected.norm()


def test_standardised_filters_ignore_their_own_scale_and_offset():
    conv = StandardizedConv(8, 8, 3, padding=1, bias=False)
    x = torch.randn(1, 8, 6, 6)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(7.0).add_(0.3)
    torch.testing.assert_close(conv(x), before, atol=0.02, rtol=0.01)  # epsilon counts at the small first scale
    plain = F.conv2d(x, (conv.weight - conv.weight.mean((1, 2, 3), True)) / conv.weight.std((1, 2, 3), False, True))
    assert plain.shape[-1] == 4, "the reference has no padding: compare the inside only"
    torch.testing.assert_close(conv(x)[..., 1:-1, 1:-1], plain, atol=1e-3, rtol=0)


def test_timestep_zero_is_embedded_as_zeros_and_ones():
    e = embed_timestep(torch.tensor([0, 1]), 8)
    assert e[0].tolist() == [0] * 4 + [1] * 4
    assert e[1, 0] == pytest.approx(np.sin(1.0))
    assert e[1, 3] == pytest.approx(np.sin(1e-4))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        ConvertConfig(checkpoint=tmp_path / "none.pt", output_dir=tmp_path / "prior").main()


@pytest.mark.parametrize("data", [b"", b"not a checkpoint at all", b"PK\x03\x04 a damaged archive"])
def test_a_file_that_is_no_checkpoint_is_refused(data, tmp_path):
    (tmp_path / "bad.pt").write_bytes(data)
    with pytest.raises(InputError, match="not a PyTorch checkpoint, or is damaged") as refusal:
        read_checkpoint(tmp_path / "bad.pt")
    assert "weights_only" not in str(refusal.value), "torch's advice to load without protection is not passed on"


def test_a_truncated_checkpoint_is_refused(checkpoint_path, tmp_path):
    (tmp_path / "bad.pt").write_bytes(checkpoint_path.read_bytes()[:100_000])
    with pytest.raises(InputError, match="not a PyTorch checkpoint, or is damaged"):
        read_checkpoint(tmp_path / "bad.pt")


def test_pickled_objects_are_refused(content, tmp_path):
    refuse({**content, "config": SimpleNamespace(dim=8)}, tmp_path, "pickled objects")


def test_a_bare_tensor_is_refused(tmp_path):
    refuse(torch.zeros(3), tmp_path, "holds a Tensor")


def test_a_checkpoint_without_averaged_weights_is_refused(tmp_path):
    refuse({"step": 1, "model": {}}, tmp_path, "no averaged weights.*model, step")


def test_a_missing_averaged_weight_is_named(content, tmp_path):
    del content["ema"]["ema_model.model.mid_attn.fn.fn.to_out.bias"]
    refuse(content, tmp_path, "missing mid_attn.to_out.bias")


def test_an_unknown_averaged_weight_is_named(content, tmp_path):
    content["ema"]["ema_model.model.extra.weight"] = torch.zeros(1)
    refuse(content, tmp_path, "unknown extra.weight")


def test_an_averaged_weight_of_another_shape_is_named(content, tmp_path):
    content["ema"]["ema_model.model.final_conv.bias"] = torch.zeros(5)
    refuse(content, tmp_path, "another shape final_conv.bias")


def test_another_network_is_refused(content, tmp_path):
    ema = {k.replace("init_conv", "conv_in"): v for k, v in content["ema"].items()}
    refuse({"ema": ema}, tmp_path, "does not hold the authors' network")


def test_a_missing_noise_schedule_is_refused(content, tmp_path):
    del content["ema"]["ema_model.alphas_cumprod"]
    refuse(content, tmp_path, "lacks the noise schedule")


def test_a_network_for_colour_alone_is_refused(content, tmp_path):
    weight = content["ema"]["ema_model.model.init_conv.weight"]
    content["ema"]["ema_model.model.init_conv.weight"] = weight[:, :3].clone()
    refuse(content, tmp_path, "for 3 channels; expected 4")


def test_values_that_are_not_finite_are_refused(content, tmp_path):
    content["ema"]["ema_model.model.final_conv.bias"][0] = float("nan")
    refuse(content, tmp_path, "not finite, in final_conv.bias")


def test_an_existing_folder_is_replaced_only_when_told_and_only_if_it_is_a_prior(checkpoint_path, prior, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        ConvertConfig(checkpoint=checkpoint_path, output_dir=prior).main()
    ConvertConfig(checkpoint=checkpoint_path, output_dir=prior, overwrite=True).main()
    assert not prior.with_name("authors.part").exists()
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(InputError, match="not a prior folder"):
        ConvertConfig(checkpoint=checkpoint_path, output_dir=tmp_path, overwrite=True).main()
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_what_is_not_the_priors_own_stays_when_it_is_replaced(content, prior, tmp_path):
    folder = tmp_path / "prior"
    shutil.copytree(prior, folder)
    (folder / "completion").mkdir()
    for name in ("completion/rgbd.json", "notes.txt"):
        (folder / name).write_text("keep")
    for name in ("samples.png", "curves.png"):
        (folder / name).write_text("of the old prior")
    torch.save(content | {"step": 8}, tmp_path / "other.pt")
    ConvertConfig(checkpoint=tmp_path / "other.pt", output_dir=folder, overwrite=True).main()
    assert RgbdSpec.load(folder).steps == 8
    assert not list(folder.glob("*.png"))
    assert (folder / "completion" / "rgbd.json").read_text() == (folder / "notes.txt").read_text() == "keep"
    assert {p.name for p in tmp_path.iterdir()} == {"prior", "other.pt"}


@pytest.mark.parametrize("output", ["taken", "taken/prior"])
def test_a_prior_folder_that_cannot_be_made_is_named(checkpoint_path, tmp_path, output):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=f"{output} (exists already|could not be written)"):
        ConvertConfig(checkpoint=checkpoint_path, output_dir=tmp_path / output).main()


def test_a_damaged_prior_folder_is_refused(prior, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        RgbdPatchUNet.load(tmp_path)
    model = RgbdPatchUNet.load(prior / "unet")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dim": 16}))
    with pytest.raises(InputError, match="does not fit"):
        RgbdPatchUNet.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    with pytest.raises(InputError, match="class 'UNet2DModel'"):
        RgbdPatchUNet.load(tmp_path)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        RgbdPatchUNet.load(tmp_path)


def test_patches_that_do_not_fit_the_network_are_refused():
    model = RgbdPatchUNet(dim=8)
    with pytest.raises(InputError, match="multiples of 8"):
        model(torch.zeros(1, 4, 20, 24), torch.tensor([0]))
    with pytest.raises(InputError, match=r"\[b, 4, h, w\]"):
        model(torch.zeros(1, 3, 24, 24), torch.tensor([0]))
    with pytest.raises(InputError, match="multiple of 8"):
        RgbdPatchUNet(dim=12)
