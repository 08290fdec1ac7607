"""Training: runs, resume to the bit, stops, atomic checkpoints, and what a run leaves behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_training
from toy_training import assert_same_weights, config, flags, state

from ddm_training import checkpoints, devices, loop
from ddm_training.errors import InputError
from ddm_training.files import exclusive
from ddm_training.rgbd import RgbdSpec
from ddm_training.train import PatchTask, train
from ddm_training.unet import Prediction, load_scheduler, load_unet, make_scheduler, make_unet, velocity_to_noise

pytestmark = pytest.mark.usefixtures("one_thread")
store = toy_training.store  # a fixture


def command(arguments: list[str], **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "ddm_training.cli", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_prior_folder_a_log_and_the_last_checkpoints(store, tmp_path):
    train(config(store, tmp_path, num_validation_samples=2, validation_steps=3))
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [4, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".training.lock", "checkpoint-4", "checkpoint-6", "log.jsonl", "prior", "tensorboard",
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


def test_a_prior_of_another_focal_length_is_exported_with_the_same_field_of_view(store, tmp_path):
    train(config(store, tmp_path, max_train_steps=1, focal=140.0))
    assert RgbdSpec.load(tmp_path / "prior").image_size == (205, 154)


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


def test_stopping_and_running_again_ends_with_the_same_weights_to_the_bit(store, tmp_path):
    """n steps = k steps + restart + (n - k) steps; also with another number of loader processes."""
    train(config(store, tmp_path / "whole"))
    train(config(store, tmp_path / "parts", max_train_minutes=0.0))
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path / "parts")] == [1]
    train(config(store, tmp_path / "parts", dataloader_num_workers=1))
    assert_same_weights(state(tmp_path / "whole", 6), state(tmp_path / "parts", 6))
    assert [line["step"] for line in lines(tmp_path / "parts") if "loss" in line] == [1, 2, 4, 6]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_give_the_same_samples_however_they_are_started(store, tmp_path, monkeypatch, method):
    train(config(store, tmp_path / "none", max_train_steps=2))
    default, wanted = multiprocessing.context._default_context, multiprocessing.get_context(method)
    monkeypatch.setattr(default, "_actual_context", wanted)
    assert multiprocessing.get_start_method() == method
    train(config(store, tmp_path / "one", max_train_steps=2, dataloader_num_workers=1))
    assert_same_weights(state(tmp_path / "none", 2), state(tmp_path / "one", 2))


def test_a_finished_run_can_be_made_longer(store, tmp_path, capsys):
    train(config(store, tmp_path, max_train_steps=2))
    train(config(store, tmp_path, max_train_steps=4))
    assert "--max-train-steps is 4, was 2" in capsys.readouterr().err
    assert state(tmp_path, 4)["step"] == 4


def test_going_back_to_a_named_checkpoint_sets_the_later_ones_aside(store, tmp_path, capsys):
    train(config(store, tmp_path, checkpoints_total_limit=3))
    log = (tmp_path / "log.jsonl").read_text()
    back = config(store, tmp_path, resume_from_checkpoint="checkpoint-2", max_train_minutes=0.0, learning_rate=1e-3)
    train(back)
    said = capsys.readouterr().err
    assert "checkpoint-4, checkpoint-6 set aside" in said
    assert "stopped at step 3" in said
    assert "run the same command again, but without --resume-from-checkpoint, to go on" in said
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [2, 3]
    aside = tmp_path / "set-aside-1"
    assert sorted(p.name for p in aside.iterdir()) == ["checkpoint-4", "checkpoint-6", "log.jsonl"]
    assert (aside / "log.jsonl").read_text() == log
    assert state(aside, 6)["step"] == 6

    train(config(store, tmp_path, learning_rate=1e-3))
    assert "resuming from checkpoint-3" in capsys.readouterr().err
    train(config(store, tmp_path, resume_from_checkpoint="checkpoint-4", max_train_minutes=0.0))
    assert sorted(p.name for p in (tmp_path / "set-aside-2").glob("checkpoint-*")) == ["checkpoint-6"]
    train(config(store, tmp_path, resume_from_checkpoint=str(aside / "checkpoint-4"), max_train_minutes=0.0))
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [4, 5]
    assert len(list(aside.iterdir())) == 3


def test_a_finished_checkpoint_of_another_folder_is_not_told_of_as_if_it_lay_here(store, tmp_path, capsys):
    train(config(store, tmp_path / "first", max_train_steps=2))
    named = str(tmp_path / "first" / "checkpoint-2")
    capsys.readouterr()
    train(config(store, tmp_path / "second", max_train_steps=2, resume_from_checkpoint=named))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "finished at step 2, no step was left to make, exported to" in last
    assert checkpoints.list_checkpoints(tmp_path / "second") == []
    train(config(store, tmp_path / "first", max_train_steps=2))
    assert "finished at step 2, checkpoint-2, exported to" in capsys.readouterr().err


def test_a_resumed_run_takes_the_settings_of_adam_that_it_is_given(store, tmp_path, capsys):
    train(config(store, tmp_path, max_train_steps=1))
    train(config(store, tmp_path, max_train_steps=2, adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.1))
    assert "--adam-beta1 is 0.8, was 0.9" in capsys.readouterr().err
    groups = state(tmp_path, 2)["optimizer"]["param_groups"]
    assert [(tuple(group["betas"]), group["weight_decay"]) for group in groups] == [((0.8, 0.95), 0.1)]


def test_a_largest_norm_of_zero_clips_nothing(store, tmp_path):
    for name, largest in (("none", 0.0), ("large", 1e6), ("small", 1e-3)):
        train(config(store, tmp_path / name, max_train_steps=2, lr_warmup_steps=0, max_grad_norm=largest))
    assert_same_weights(state(tmp_path / "none", 2), state(tmp_path / "large", 2))
    with pytest.raises(AssertionError):
        assert_same_weights(state(tmp_path / "none", 2), state(tmp_path / "small", 2))


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


def test_the_precision_that_accelerate_is_configured_for_does_not_change_a_training(store, tmp_path, monkeypatch):
    """By whether the network is called under autocast, which the training's own flag decides."""
    from accelerate.state import AcceleratorState

    seen = set()
    wrap = PatchTask.wrap

    def watched(task: PatchTask, network: torch.nn.Module) -> torch.nn.Module:
        class Watched(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = wrap(task, network)

            def forward(self, *given: torch.Tensor) -> torch.Tensor:
                seen.add(torch.is_autocast_enabled("cpu"))
                return self.inner(*given)

        return Watched()

    AcceleratorState._reset_state(reset_partial_state=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(PatchTask, "wrap", watched)
    try:
        train(config(store, tmp_path, max_train_steps=1))
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)
    assert seen == {False}


@pytest.mark.parametrize("own", [True, False])
def test_bf16_is_emulated_by_cuda_devices_that_have_no_own(monkeypatch, own):
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or own

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert devices.emulates_bf16(torch.device("cuda")) is not own


@pytest.mark.parametrize(
    ("capabilities", "emulated"),
    [({"avx2": True, "avx512_bf16": False}, True), ({"avx512_bf16": True}, False), ({"amx_bf16": True}, False)],
)
def test_bf16_is_emulated_by_cpus_that_do_not_say_they_have_it(monkeypatch, capabilities, emulated):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert devices.emulates_bf16(torch.device("cpu")) is emulated
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert devices.emulates_bf16(torch.device("cpu"))  # an older torch


@pytest.mark.parametrize("emulated", [True, False])
def test_a_device_that_emulates_bf16_trains_in_fp32_and_says_so(store, tmp_path, monkeypatch, capsys, emulated):
    monkeypatch.setattr(loop, "emulates_bf16", lambda device: emulated)
    train(config(store, tmp_path, max_train_steps=1, mixed_precision="bf16"))
    saved = json.loads((tmp_path / "checkpoint-1" / checkpoints.CONFIG_FILE).read_text())
    used = "no" if emulated else "bf16"
    assert saved["mixed_precision"] == used
    assert f"learning rate 0.0005, {used} |" in (tmp_path / "prior" / "README.md").read_text()
    assert ("--mixed-precision no is used" in capsys.readouterr().err) is emulated


def test_gradient_accumulation_of_accelerate_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(InputError, match=r"4 gradient accumulation steps, .* makes 1: .*--train-batch-size"):
        train(config(store, tmp_path))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    train(config(store, tmp_path, max_train_steps=1))


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_weights_spread_over_devices_by_accelerate_are_refused(store, tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match=rf"accelerate is configured for .*ACCELERATE_USE_{name}.*accelerate config"):
        train(config(store, tmp_path))


def test_kinds_of_devices_that_a_training_does_not_know_are_refused(store, tmp_path, monkeypatch):
    from accelerate import DistributedType

    found = SimpleNamespace(distributed_type=DistributedType.MULTI_XPU)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: found)
    with pytest.raises(InputError, match="accelerate is configured for MULTI_XPU"):
        train(config(store, tmp_path))


def test_two_trainings_do_not_share_a_folder(store, tmp_path):
    with (
        exclusive(tmp_path, "training", "--output-dir"),
        pytest.raises(InputError, match=r"another training is writing into .*give another --output-dir"),
    ):
        train(config(store, tmp_path, max_train_steps=1))
    assert not (tmp_path / "log.jsonl").exists()


def test_the_folder_of_another_command_is_named_as_such(store, tmp_path):
    train(config(store, tmp_path, max_train_steps=1))
    path = tmp_path / "checkpoint-1" / checkpoints.CONFIG_FILE
    saved = json.loads(path.read_text())
    assert saved["command"] == "train"
    path.write_text(json.dumps({**saved, "command": "train-completion"}))
    with pytest.raises(InputError, match="checkpoint-1 is of `ddm train-completion`, and this is `ddm train`"):
        train(config(store, tmp_path))


def test_checkpoints_that_do_not_name_their_command_are_resumed(store, tmp_path, capsys):
    train(config(store, tmp_path, max_train_steps=1))
    path = tmp_path / "checkpoint-1" / checkpoints.CONFIG_FILE
    saved = json.loads(path.read_text())
    del saved["command"]
    path.write_text(json.dumps(saved))
    train(config(store, tmp_path, max_train_steps=2))
    said = capsys.readouterr().err
    assert "resuming from checkpoint-1" in said
    assert "--command" not in said


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": ()}, "--data needs at least one folder"),
        ({"train_batch_size": 0}, "--train-batch-size"),
        ({"timestep_bias": 1.5}, "--timestep-bias"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("inf")}, "--learning-rate"),
        ({"lr_warmup_steps": -1}, "--lr-warmup-steps"),
        ({"dataloader_num_workers": -1}, "--dataloader-num-workers"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**64}, "--seed"),
        ({"adam_beta1": 1.0}, "--adam-beta1"),
        ({"adam_beta2": -0.1}, "--adam-beta2"),
        ({"adam_weight_decay": -0.1}, "--adam-weight-decay"),
        ({"max_train_minutes": float("nan")}, "--max-train-minutes"),
        ({"num_validation_samples": -1}, "--num-validation-samples"),
        ({"depth_loss_weight": -3.0}, "--depth-loss-weight"),
        ({"depth_scale_jitter": float("inf")}, "--depth-scale-jitter"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm"),
        ({"max_grad_norm": float("nan")}, "--max-grad-norm"),
        ({"focal": 500.0}, "--focal"),
        ({"push_to_hub": True}, "--hub-model-id"),
        ({"patch_size": 20}, "--patch-size"),
    ],
)
def test_settings_out_of_range_name_their_flag(changed, message, store, tmp_path):
    with pytest.raises(InputError, match=message):
        config(store, tmp_path, **changed)
