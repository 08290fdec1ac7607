"""Training: objective, resume to the bit, atomic checkpoints, stops, and what a run leaves behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ddm_training import checkpoints, objective
from ddm_training.errors import InputError
from ddm_training.frames import SceneWriter
from ddm_training.progress import truncate_log
from ddm_training.rgbd import RgbdSpec
from ddm_training.train import PatchTask, TrainConfig, train
from ddm_training.unet import (
    Prediction,
    Predictor,
    Preset,
    add_noise,
    load_scheduler,
    load_unet,
    make_scheduler,
    make_unet,
    predict_clean,
    velocity,
    velocity_to_noise,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    for name, split in (("a", "train"), ("b", "val")):
        writer = SceneWriter(root, name, split=split, source="toy", max_frames=3, height=40, width=48)
        for index in range(3):
            depth = rng.uniform(1, 4, (40, 48)).astype(np.float32)
            color = rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)
            mask = rng.random((40, 48)) > 0.05
            writer.add(color, depth, mask, intrinsics=(150.0, 150.0, 24.0, 20.0), name=f"{index}")
        writer.close()
    return root


SMALL = {
    "preset": "prototype",
    "patch_size": 16,
    "train_batch_size": 2,
    "max_train_steps": 6,
    "checkpointing_steps": 2,
    "validation_steps": 100,
    "validation_patches": 4,
    "num_validation_samples": 0,
    "logging_steps": 2,
    "dataloader_num_workers": 0,
    "mixed_precision": "no",
    "device": "cpu",
}


def config(store: Path, output: Path, **changed) -> TrainConfig:
    return TrainConfig(data=(store,), output_dir=output, **{**SMALL, **changed})


def flags(store: Path, output: Path, **changed) -> list[str]:
    words = ["train", "--data", str(store), "--output-dir", str(output)]
    for key, value in {**SMALL, **changed}.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def command(arguments: list[str], **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "ddm_training.cli", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def state(folder: Path, step: int) -> dict:
    return torch.load(folder / f"checkpoint-{step}" / "state.pt", weights_only=True)


def assert_same_weights(first: dict, second: dict) -> None:
    for part in ("model", "ema"):
        assert first[part].keys() == second[part].keys()
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), key


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- the objective -------------------------------------------------------------------------------------------------


def test_the_noise_schedule_is_the_cosine_schedule():
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = make_scheduler().alphas_cumprod
    np.testing.assert_allclose(abar[:990], (f[1:] / f[0])[:990], rtol=1e-4)  # beyond, betas are held below .999
    np.testing.assert_allclose((1 - abar[[3, 99]]).sqrt(), [0.0139, 0.167], rtol=5e-3)


def test_the_clean_estimate_undoes_the_noise():
    x, eps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    abar = torch.tensor([0.9, 0.5, 0.1])
    assert torch.allclose(predict_clean(add_noise(x, eps, abar), eps, abar), x, atol=1e-5)


def test_velocity_and_noise_tell_the_same():
    x, eps, abar = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.999, 0.5, 0.001])
    v, x_t = velocity(x, eps, abar), add_noise(x, eps, abar)
    assert torch.allclose(velocity_to_noise(v, x_t, abar), eps, atol=1e-6)
    assert (v - eps)[0].abs().max() < 0.2  # next to the noise where there is little of it
    assert (v + x)[2].abs().max() < 0.2  # and to the patch where there is much


def test_what_minimises_the_loss_is_the_velocity(store, tmp_path):
    """A task that predicts velocity has no loss for it, and has one for the noise."""
    task = PatchTask(config(store, tmp_path, prediction_type="v_prediction"))
    batch = task.prepare(task.draw(step=0, first=0, count=4), step=0, first=0)
    abar = make_scheduler().alphas_cumprod[batch["t"]]
    v = velocity(batch["x"], batch["noise"], abar)
    assert task.loss(lambda x_t, t: v, batch) == 0
    assert task.loss(lambda x_t, t: batch["noise"], batch) > 0


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_invalid_depth_contributes_nothing_to_the_loss(kind):
    noise, predicted = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    mask = torch.rand(2, 8, 8) > 0.5
    predicted.requires_grad_(True)
    objective.masked_loss(predicted, noise, mask, kind=kind, depth_weight=3.0).backward()
    assert predicted.grad is not None
    assert (predicted.grad[:, 3][~mask] == 0).all()
    assert (predicted.grad[:, 3][mask] != 0).all()
    assert (predicted.grad[:, :3] != 0).all()


def test_loss_is_the_weighted_mean_of_channels_and_splits_over_processes():
    noise, predicted = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    mask = torch.rand(4, 8, 8) > 0.3
    loss = objective.masked_loss(predicted, noise, mask, kind="l2", depth_weight=3.0)
    squared = (predicted - noise) ** 2
    expected = (squared[:, :3].sum() + 3 * squared[:, 3][mask].sum()) / (6 * 4 * 64)
    assert torch.allclose(loss, expected)
    halves = [
        objective.masked_loss(predicted[part], noise[part], mask[part], kind="l2", depth_weight=3.0)
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert torch.allclose(sum(halves) / 2, loss)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [objective.learning_rate(n, peak=2.0, warmup=10, total=100) for n in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) < 2.0
    assert rates[50] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert objective.learning_rate(5000, peak=2.0, warmup=10, total=None) == 2.0


def test_the_average_moves_by_the_decay_and_faster_in_the_first_steps():
    network, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for step, decay in ((0, 1 / 10), (5, 6 / 15), (10**6, 0.999)):
        start = average.weight.detach().clone()
        objective.update_average(average, network, step, 0.999)
        torch.testing.assert_close(average.weight, decay * start + (1 - decay) * network.weight)


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


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_prior_folder_a_log_and_the_last_checkpoints(store, tmp_path):
    train(config(store, tmp_path, num_validation_samples=2, validation_steps=3))
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [4, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-4", "checkpoint-6", "log.jsonl", "prior", "tensorboard",
    ]  # fmt: skip
    prior = tmp_path / "prior"
    files = {str(p.relative_to(prior)) for p in prior.rglob("*") if p.is_file()}
    assert files == {
        "README.md", "curves.png", "rgbd.json", "samples.png", "scheduler/scheduler_config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    spec = RgbdSpec.load(prior)
    assert (spec.steps, spec.patch_size, spec.trained_on) == (6, 16, ("toy",))
    assert 1 / 4.0 / 1.5 <= spec.disparity_quantiles["0.05"] < spec.disparity_quantiles["0.95"] <= 1.5
    ticks = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in ticks] == [2, 3, 4, 6]
    assert all(line["patches_per_s"] > 0 and line["seconds_left"] >= 0 for line in ticks)
    validated = [line for line in lines(tmp_path) if "val" in line]
    assert [line["step"] for line in validated] == [3, 6]
    assert list(validated[0]["val"]) == ["3", "20", "49", "99", "250", "500", "900"]
    card = (prior / "README.md").read_text()
    assert f"{validated[-1]['val']['99']['depth']:.4f}" in card


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_exported_network_is_the_average_and_predicts_the_same_noise(store, tmp_path, prediction: Prediction):
    train(config(store, tmp_path, export_dtype="fp32", prediction_type=prediction))
    network = load_unet(tmp_path / "prior")
    own = make_unet("prototype", patch_size=16)
    own.load_state_dict(state(tmp_path, 6)["ema"])
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 990])
    with torch.no_grad():
        predicted = own(x, t).sample
        if prediction == "v_prediction":
            predicted = velocity_to_noise(predicted, x, make_scheduler().alphas_cumprod[t])
        assert torch.equal(network(x, t), predicted)
    assert load_scheduler(tmp_path / "prior").config["prediction_type"] == prediction
    assert not any(p.requires_grad for p in network.parameters())
    assert load_scheduler(tmp_path / "prior").config["beta_schedule"] == "squaredcos_cap_v2"
    half = load_unet(tmp_path / "prior", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


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


def test_stopping_and_running_again_ends_with_the_same_weights_to_the_bit(store, tmp_path):
    """n steps = k steps + restart + (n - k) steps; also with another number of loader processes."""
    train(config(store, tmp_path / "whole"))
    train(config(store, tmp_path / "parts", max_train_minutes=0.0))
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path / "parts")] == [1]
    train(config(store, tmp_path / "parts", dataloader_num_workers=1))
    assert_same_weights(state(tmp_path / "whole", 6), state(tmp_path / "parts", 6))
    assert [line["step"] for line in lines(tmp_path / "parts") if "loss" in line] == [1, 2, 4, 6]


def test_a_finished_run_can_be_made_longer(store, tmp_path, capsys):
    train(config(store, tmp_path, max_train_steps=2))
    train(config(store, tmp_path, max_train_steps=4))
    assert "--max-train-steps is 4, was 2" in capsys.readouterr().err
    assert state(tmp_path, 4)["step"] == 4


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_one_never_killed(store, tmp_path):
    settings = {"max_train_steps": 40, "checkpointing_steps": 3, "dataloader_num_workers": 1}
    assert command(flags(store, tmp_path / "whole", **settings)).wait(300) == 0
    killed = 0
    for _ in range(3):
        before = len(checkpoints.list_checkpoints(tmp_path / "killed"))
        newest = checkpoints.list_checkpoints(tmp_path / "killed")[-1][0] if before else 0
        run = command(flags(store, tmp_path / "killed", **settings))
        while run.poll() is None:
            found = checkpoints.list_checkpoints(tmp_path / "killed")
            if found and found[-1][0] > newest:
                break
            time.sleep(0.01)
        time.sleep(0.05 * killed)  # so that it does not always die at the same place
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            killed += 1
        run.wait()
    assert killed >= 1
    assert checkpoints.list_checkpoints(tmp_path / "killed")[-1][0] < 40
    assert command(flags(store, tmp_path / "killed", **settings)).wait(300) == 0
    assert_same_weights(state(tmp_path / "whole", 40), state(tmp_path / "killed", 40))
    steps = [line["step"] for line in lines(tmp_path / "killed") if "loss" in line]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_sigterm_stops_with_a_checkpoint(store, tmp_path):
    run = command(flags(store, tmp_path, max_train_steps=100_000, checkpointing_steps=100_000))
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(120) == 0
    assert len(checkpoints.list_checkpoints(tmp_path)) == 1
    assert run.stderr is not None
    assert "run the same command again" in run.stderr.read()


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one_with_the_joint_batch(store, tmp_path):
    train(config(store, tmp_path / "one", train_batch_size=4))
    arguments = flags(store, tmp_path / "two", train_batch_size=2)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "ddm_training.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300,
    )  # fmt: skip
    one, two = ([line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_next_checkpoint(store, tmp_path):
    train(config(store, tmp_path, max_train_steps=2))
    with pytest.raises(InputError, match=r"at step [34]: training stopped"):
        train(config(store, tmp_path, max_train_steps=8, learning_rate=1e30, lr_warmup_steps=0))
    assert checkpoints.list_checkpoints(tmp_path)[-1][0] == 2
    assert all(v.isfinite().all() for v in state(tmp_path, 2)["model"].values())


def test_a_checkpoint_of_another_preset_is_refused(store, tmp_path):
    train(config(store, tmp_path, max_train_steps=2))
    with pytest.raises(InputError, match=r"--preset prototype \(now tiny\)"):
        train(config(store, tmp_path, preset="tiny"))


def test_a_checkpoint_from_before_velocity_is_one_of_noise(store, tmp_path):
    """Its settings do not say what it predicts: it predicts noise, and its weights would fit without a complaint."""
    train(config(store, tmp_path, max_train_steps=2, prediction_type="epsilon"))
    path = tmp_path / "checkpoint-2" / checkpoints.CONFIG_FILE
    settings = json.loads(path.read_text())
    del settings["prediction_type"]
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"--prediction-type epsilon \(now v_prediction\)"):
        train(config(store, tmp_path, prediction_type="v_prediction"))
    train(config(store, tmp_path, max_train_steps=3, prediction_type="epsilon"))


def test_a_store_without_held_out_scenes_is_refused(store, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").symlink_to(store / "a")
    with (
        pytest.warns(UserWarning, match="not validated on"),
        pytest.raises(InputError, match="has scenes of split 'val'"),
    ):
        train(config(tmp_path / "store", tmp_path / "run"))


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoints.save_checkpoint(tmp_path, 1, {"model": torch.ones(3)}, {"preset": "tiny"}, limit=1)

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(InputError, match="No space left on device"):
        checkpoints.save_checkpoint(tmp_path, 2, {"model": torch.ones(3)}, {"preset": "tiny"}, limit=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    loaded, _ = checkpoints.load_checkpoint(tmp_path / "checkpoint-1", {"preset": "tiny"}, {"preset": None})
    assert torch.equal(loaded["model"], torch.ones(3))


def test_half_written_checkpoints_are_not_seen_and_are_cleared(tmp_path):
    checkpoints.save_checkpoint(tmp_path, 5, {}, {}, limit=2)
    (tmp_path / "checkpoint-7.part").mkdir()
    (tmp_path / "checkpoint-3.old.part").mkdir()
    found = checkpoints.find_checkpoint(tmp_path, "latest")
    assert found is not None
    assert found.name == "checkpoint-5"
    checkpoints.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path, 5, {"model": torch.ones(1000)}, {}, limit=2)
    content = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="checkpoint-5 is not a readable checkpoint"):
        checkpoints.load_checkpoint(path, {}, {})


def test_resume_choices(tmp_path):
    assert checkpoints.find_checkpoint(tmp_path, "latest") is None
    assert checkpoints.find_checkpoint(tmp_path, "none") is None
    path = checkpoints.save_checkpoint(tmp_path, 5, {}, {}, limit=2)
    for wanted in ("latest", "checkpoint-5", str(path)):
        assert checkpoints.find_checkpoint(tmp_path, wanted) == path
    with pytest.raises(InputError, match="would mix two runs"):
        checkpoints.find_checkpoint(tmp_path, "none")
    with pytest.raises(InputError, match="checkpoint-9 was not found"):
        checkpoints.find_checkpoint(tmp_path, "checkpoint-9")


def test_the_log_is_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_batch_size": 0}, "--train-batch-size"),
        ({"timestep_bias": 1.5}, "--timestep-bias"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"focal": 500.0}, "--focal"),
        ({"push_to_hub": True}, "--hub-model-id"),
        ({"patch_size": 20}, "--patch-size"),
    ],
)
def test_settings_out_of_range_name_their_flag(changed, message, store, tmp_path):
    with pytest.raises(InputError, match=message):
        config(store, tmp_path, **changed)
