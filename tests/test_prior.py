"""PatchPrior: scores against closed forms, prior folders and what can be wrong with them."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import box_room
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

import diffusionerf_ns
from ddm_training.errors import InputError
from ddm_training.rgbd import RgbdSpec
from ddm_training.unet import make_scheduler, tau_to_timestep
from diffusionerf_ns.prior import PatchPrior, builtin_priors, find_prior

SIZE = 8


@pytest.fixture(scope="module")
def abar() -> torch.Tensor:
    return make_scheduler().alphas_cumprod


def test_the_noise_at_tau_is_that_of_the_cosine_schedule(abar):
    prior = PatchPrior(lambda x, t: x, abar, RgbdSpec())
    assert prior.sigma(0.1) == pytest.approx(0.167, abs=5e-4)
    assert prior.sigma(0.0) == pytest.approx(0.0139, abs=5e-5)

    def signal(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for tau, t in ((0.1, 99), (0.0, 3)):
        assert prior.sigma(tau) == pytest.approx(math.sqrt(1 - signal(t + 1) / signal(0)), rel=1e-3)


@pytest.fixture(scope="module")
def gaussian(abar):
    """A Gaussian over patches with correlated pixels, and the prior that its exact posterior mean defines."""
    generator = torch.Generator().manual_seed(0)
    n = 4 * SIZE * SIZE
    mean = 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    factor = torch.randn(n, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
    covariance = 0.2 * factor @ factor.T + 0.05 * torch.eye(n, dtype=torch.float64)

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """eps = (x - sqrt(abar) E[x0 | x]) / sqrt(1 - abar), the posterior mean by Gaussian conditioning."""
        assert t.dtype == torch.int64
        assert t.shape == x.shape[:1]
        a = abar[t[0]].double()
        x = x.double().flatten(1)
        marginal = a * covariance + (1 - a) * torch.eye(n, dtype=torch.float64)
        gain = a.sqrt() * torch.linalg.solve(marginal, covariance).T
        clean = mean + (x - a.sqrt() * mean) @ gain.T
        return ((x - a.sqrt() * clean) / (1 - a).sqrt()).reshape(-1, 4, SIZE, SIZE)

    return mean, covariance, PatchPrior(denoiser, abar, RgbdSpec(patch_size=SIZE))


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.1, 0.6])
def test_the_score_of_a_gaussian_prior_is_the_gradient_of_the_diffused_gaussians_log_density(gaussian, abar, tau):
    mean, covariance, prior = gaussian
    x = (0.5 * torch.randn(3, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1))).requires_grad_(True)
    a = abar[tau_to_timestep(tau)].double()
    flat = x.detach().double().flatten(1).requires_grad_(True)
    diffused = torch.distributions.MultivariateNormal(
        a.sqrt() * mean, a * covariance + (1 - a) * torch.eye(len(mean), dtype=torch.float64)
    )
    (expected,) = torch.autograd.grad(diffused.log_prob(flat).sum(), flat)
    score = prior.score(x, tau)
    assert score.dtype == torch.float32
    assert not score.requires_grad
    # 1 - abar in single precision is good to 3e-4 at the lowest noise.
    torch.testing.assert_close(score.double().flatten(1), expected, rtol=1e-3, atol=1e-3)


def test_the_clean_estimate_follows_the_score_by_the_variance_of_the_noise(gaussian):
    _, _, prior = gaussian
    x = torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(prior.clean_estimate(x, 0.1), x + prior.sigma(0.1) ** 2 * prior.score(x, 0.1))


def test_patches_of_a_batch_do_not_touch_each_other(gaussian):
    _, _, prior = gaussian
    x = torch.randn(3, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(prior.score(x, 0.1)[1:2], prior.score(x[1:2], 0.1))


def test_a_wrong_shape_raises(gaussian):
    _, _, prior = gaussian
    with pytest.raises(TypeCheckError):
        prior.score(torch.zeros(1, 3, SIZE, SIZE), 0.1)
    with pytest.raises(TypeCheckError):
        prior.score(torch.zeros(4, SIZE, SIZE), 0.1)
    with pytest.raises(TypeCheckError):
        prior.predict_noise(torch.zeros(2, 4, SIZE, SIZE), torch.zeros(1, dtype=torch.int64))


def test_a_prior_adds_nothing_to_the_state_of_the_module_that_holds_it(abar):
    module = nn.Linear(2, 2)
    before = set(module.state_dict())
    module.prior = PatchPrior(nn.Conv2d(4, 4, 1), abar, RgbdSpec())
    assert set(module.state_dict()) == before
    assert len(list(module.parameters())) == 2
    assert len(list(module.modules())) == 1


# Prior folders


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory) -> Path:
    """A prior folder with an untrained network of some thousand parameters."""
    folder = box_room.write_prior(tmp_path_factory.mktemp("prior") / "whole")
    RgbdSpec(patch_size=16, focal=60.0, focal_range=(50.0, 70.0), trained_on=("nothing",)).save(folder)
    return folder


@pytest.fixture
def folder(whole_folder, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole_folder, tmp_path / "prior"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_loaded_prior_gives_the_score_of_its_network_and_says_what_it_was_trained_on(whole_folder, abar):
    from diffusers.models.unets.unet_2d import UNet2DModel

    prior = PatchPrior.load(whole_folder)
    assert prior.spec.trained_on == ("nothing",)
    assert prior.spec.patch_size == 16
    torch.testing.assert_close(prior.alphas_cumprod, abar)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    network = UNet2DModel.from_pretrained(whole_folder / "unet").eval()
    with torch.no_grad():
        expected = -network(x, torch.tensor([99, 99])).sample / math.sqrt(1 - abar[99])
    prior.autocast = False
    torch.testing.assert_close(prior.score(x, 0.1), expected, rtol=1e-4, atol=1e-4)
    prior.autocast = True
    low = prior.score(x, 0.1)
    assert low.dtype == torch.float32
    assert (low - expected).norm() < 0.03 * expected.norm()


def test_a_loaded_network_is_frozen_and_in_evaluation_mode(whole_folder):
    network = PatchPrior.load(whole_folder).denoiser
    assert isinstance(network, nn.Module)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_a_prior_folder_is_found_by_its_path_as_text_too(whole_folder, monkeypatch):
    assert find_prior(str(whole_folder)) == whole_folder
    monkeypatch.chdir(whole_folder.parent)
    assert find_prior("whole").resolve() == whole_folder


def test_the_builtin_priors_are_the_folders_of_the_package_with_an_rgbd_json():
    root = Path(diffusionerf_ns.__file__).parent / "priors"
    expected = {path.parent.name for path in root.glob("*/rgbd.json")}
    assert set(builtin_priors()) == expected
    for name, folder in builtin_priors().items():
        assert find_prior(name) == folder
        assert folder.parent == root


def test_every_builtin_prior_loads_and_gives_finite_scores():
    for name in builtin_priors():
        prior = PatchPrior.load(name)
        size = prior.spec.patch_size
        score = prior.score(torch.zeros(1, 4, size, size), 0.1)
        assert bool(score.isfinite().all()), name
        assert score.abs().max() > 0, name


def without_spec(folder: Path) -> None:
    (folder / "rgbd.json").unlink()


def with_three_channels(folder: Path) -> None:
    edit(folder / "unet" / "config.json", in_channels=3, out_channels=3)


def with_weights_of_other_widths(folder: Path) -> None:
    edit(folder / "unet" / "config.json", block_out_channels=[8, 16])


def with_weights_of_more_layers(folder: Path) -> None:
    edit(folder / "unet" / "config.json", layers_per_block=2)


def with_pickled_weights_only(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")


def with_truncated_weights(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def with_another_network(folder: Path) -> None:
    edit(folder / "unet" / "config.json", _class_name="UNet1DModel")


def without_network(folder: Path) -> None:
    shutil.rmtree(folder / "unet")


def without_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def with_a_broken_scheduler(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text("{")


def with_another_prediction(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")


def with_another_encoding(folder: Path) -> None:
    edit(folder / "rgbd.json", encoding="log-depth")


def with_an_unknown_entry(folder: Path) -> None:
    edit(folder / "rgbd.json", depth_offset=1.0)


def with_a_broken_spec(folder: Path) -> None:
    (folder / "rgbd.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_spec, "has no rgbd.json"),
        (with_a_broken_spec, "not valid JSON"),
        (with_another_encoding, "log-depth"),
        (with_an_unknown_entry, "depth_offset"),
        (with_three_channels, "3 from 3 channels"),
        (with_weights_of_other_widths, "do not fit"),
        (with_weights_of_more_layers, "do not fit"),
        (with_pickled_weights_only, "never from pickled files"),
        (with_truncated_weights, "truncated"),
        (with_another_network, "UNet1DModel"),
        (without_network, "unet"),
        (without_scheduler, "scheduler"),
        (with_a_broken_scheduler, "scheduler"),
        (with_another_prediction, "v_prediction"),
    ],
)
def test_a_prior_folder_that_is_not_whole_is_refused_with_its_path_and_the_reason(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        PatchPrior.load(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_scheduler_of_a_folder_with_a_relative_path_is_not_looked_for_on_the_hub(folder, monkeypatch):
    """`DDPMScheduler.from_pretrained("prior/scheduler")` would take the path for a hub id."""
    without_scheduler(folder)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(InputError, match=r"scheduler_config\.json cannot be read"):
        PatchPrior.load(folder.name)


@pytest.mark.parametrize("source", ["no-such-prior", "/no/such/folder", "./no/such", "~/no-such-prior", "a/b/c"])
def test_a_source_that_is_neither_folder_nor_name_nor_hub_id_is_refused_without_asking_the_hub(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="neither a built-in name") as caught:
        find_prior(source)
    assert repr(source) in str(caught.value)


def test_a_hub_id_without_network_is_refused_with_the_reason():
    code = (
        "from diffusionerf_ns.prior import InputError, find_prior\n"
        "try:\n    find_prior('someone/no-such-prior')\nexcept InputError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.startswith("no folder 'someone/no-such-prior' here, and the Hugging Face hub gave no prior")
    assert "Check the name and the network" in result.stdout


def test_a_hub_id_is_fetched_at_its_revision_and_never_as_a_pickle(whole_folder, monkeypatch):
    asked = {}

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(whole_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_prior("someone/prior", "v2") == whole_folder
    assert (asked["repo_id"], asked["revision"]) == ("someone/prior", "v2")
    from huggingface_hub.utils import filter_repo_objects

    held = [str(p.relative_to(whole_folder)) for p in whole_folder.rglob("*") if p.is_file()]
    pickles = ["unet/diffusion_pytorch_model.bin", "unet/model.pt", "code.py"]
    kept = set(filter_repo_objects([*held, *pickles], allow_patterns=asked["allow_patterns"]))
    assert kept == set(held), "all of a prior folder, and nothing that can run code"
