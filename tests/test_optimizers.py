"""The optimiser and learning-rate schedule configs, and what of a real trainer's schedules follows the run's length."""

import io
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import box_room
import numpy as np
import pytest
import torch
import tyro
import yaml
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.engine.trainer import Trainer, TrainerConfig

from ddm_training.errors import InputError
from diffusionerf_ns.gradients import NonFiniteLossError
from diffusionerf_ns.optimizers import ExponentialDecayConfig, FusedAdamConfig


def run(steps: int, config: ExponentialDecayConfig, lr: float = 1e-2):
    """Learning rate of every step, with the optimiser and the schedule at the end."""
    optimizer = FusedAdamConfig(lr=lr).setup([torch.nn.Parameter(torch.ones(3))])
    scheduler = config.setup().get_scheduler(optimizer, lr)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    return rates, optimizer, scheduler


def test_the_rate_decays_exponentially_from_lr_to_lr_final_and_stays_there():
    rates, *_ = run(130, ExponentialDecayConfig(lr_final=1e-4, max_steps=100, warmup_steps=0))
    assert rates[0] == 1e-2
    assert rates[50] == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(1e-4)
    assert rates[129] == rates[100]
    ratios = {round(b / a, 9) for a, b in pairwise(rates[:101])}
    assert len(ratios) == 1, "each step multiplies the rate by the same factor"


def test_the_warm_up_rises_linearly_and_ends_at_the_full_rate():
    rates, *_ = run(120, ExponentialDecayConfig(lr_final=1e-3, max_steps=100, warmup_steps=9))
    assert rates[:10] == pytest.approx([1e-3 * (i + 1) for i in range(10)])
    assert rates[10] < rates[9] == pytest.approx(1e-2)
    assert rates[100] == pytest.approx(1e-3)


def test_rates_are_python_floats_and_the_state_loads_with_weights_only():
    rates, optimizer, scheduler = run(5, ExponentialDecayConfig(lr_final=1e-3, max_steps=10, warmup_steps=2))
    assert {type(rate) for rate in rates} == {float}
    assert {type(rate) for rate in scheduler.get_last_lr()} == {float}
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["optimizer"]["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"]
    assert loaded["scheduler"]["last_epoch"] == 5


def test_fused_adam_takes_the_steps_of_plain_adam():
    parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)]
    fused = FusedAdamConfig(lr=1e-2, eps=1e-15, weight_decay=1e-3).setup([parameters[0]])
    plain = torch.optim.Adam([parameters[1]], lr=1e-2, eps=1e-15, weight_decay=1e-3, fused=False, foreach=False)
    assert fused.param_groups[0]["fused"] is True
    for _ in range(5):
        for parameter, optimizer in zip(parameters, (fused, plain)):
            optimizer.zero_grad()
            parameter.pow(4).sum().backward()
            optimizer.step()
    torch.testing.assert_close(parameters[0], parameters[1])


@pytest.mark.parametrize("lr_final", [0.0, -1e-3])
def test_a_final_rate_that_no_exponential_reaches_is_refused(lr_final):
    with pytest.raises(InputError, match="lr-final"):
        run(1, ExponentialDecayConfig(lr_final=lr_final))


# In a trainer


@pytest.fixture(scope="module")
def capture(tmp_path_factory) -> Path:
    return box_room.write_transforms(tmp_path_factory.mktemp("schedules") / "box")


def set_up(folder: Path, capture: Path, *flags: object, method: str = "diffusionerf-tiny") -> Trainer:
    """The trainer that ``ns-train`` makes of its command line, with small tables, few rays and no stereo."""
    # fmt: off
    small = [
        "--machine.device-type", "cpu", "--logging.local-writer.enable", "False", "--vis", "tensorboard",
        "--pipeline.datamanager.train-num-rays-per-batch", 16, "--pipeline.datamanager.stereo-rays-per-batch", 0,
        "--pipeline.model.log2-hashmap-size", 8, "--pipeline.model.score-weight", 0, "--pipeline.model.refine-tau", 0,
        "--pipeline.model.stereo-depth-weight", 0, "--pipeline.model.completed-depth-weight", 0,
    ]
    # fmt: on
    arguments = [method, "--data", capture, "--output-dir", folder, *small, *flags]
    return started(tyro.cli(AnnotatedBaseConfigUnion, args=list(map(str, arguments))))


def started(config: TrainerConfig) -> Trainer:
    """As ``ns-train`` starts it, but for the training."""
    config.set_timestamp()
    config.pipeline.datamanager.data = config.data
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


def rates_to_come(trainer: Trainer, name: str, steps: int) -> list[float]:
    """Learning rate of the next steps, and of the one after them, without training."""
    optimizer, scheduler = trainer.optimizers.optimizers[name], trainer.optimizers.schedulers[name]
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def rate(step: int, warmup: int, end: int) -> float:
    """1e-2 after the warm-up, 1e-3 from ``end`` on."""
    if step < warmup:
        return 1e-2 * (step + 1) / (warmup + 1)
    return 1e-2 * 0.1 ** min((step - warmup) / (end - warmup), 1.0)


def check_schedules(trainer: Trainer, *, warmup: int, end: int, proposals: int, start: int = 0) -> None:
    """Rates and intervals of all steps from ``start`` to ``end``, and of some beyond."""
    steps = range(start, end + 20)
    for name in ("fields", "proposal_networks"):
        rates = rates_to_come(trainer, name, len(steps) - 1)
        assert rates == pytest.approx([rate(step, warmup, end) for step in steps], rel=1e-12, abs=0)
    interval = trainer.pipeline.model.proposal_sampler.update_sched
    nerfacto = np.clip(np.interp(steps, [0, proposals], [0, 5]), 1, 5)
    assert [interval(step) for step in steps] == pytest.approx(nerfacto, rel=1e-12, abs=0)
    assert interval(proposals - 1) < 5 == interval(proposals)


@pytest.mark.parametrize(
    ("method", "flags", "corners"),
    [
        ("diffusionerf", (), {"warmup": 20, "end": 2000, "proposals": 1000}),
        ("diffusionerf-tiny", (), {"warmup": 10, "end": 1000, "proposals": 500}),
        ("diffusionerf-tiny", ("--max-num-iterations", 400), {"warmup": 4, "end": 400, "proposals": 200}),
    ],
)
def test_rates_and_proposal_updates_follow_the_length_of_the_run(tmp_path, capture, method, flags, corners):
    trainer = set_up(tmp_path, capture, *flags, method=method)
    assert trainer.config.max_num_iterations == corners["end"]
    check_schedules(trainer, **corners)


def test_numbers_on_the_command_line_win(tmp_path, capture):
    flags = ["--max-num-iterations", 400, "--pipeline.model.proposal-warmup", 70]
    flags += ["--optimizers.fields.scheduler.max-steps", 300]
    flags += ["--optimizers.proposal-networks.scheduler.max-steps", 300]
    flags += ["--optimizers.proposal-networks.scheduler.warmup-steps", 3]  # of the others, 1 %
    check_schedules(set_up(tmp_path, capture, *flags), warmup=3, end=300, proposals=70)


def test_a_warm_up_of_its_own_length_leaves_the_end_to_the_run(tmp_path, capture):
    flags = [
        flag for name in ("fields", "proposal-networks") for flag in (f"--optimizers.{name}.scheduler.warmup-steps", 0)
    ]
    check_schedules(set_up(tmp_path, capture, "--max-num-iterations", 400, *flags), warmup=0, end=400, proposals=200)


def test_a_run_resumed_for_longer_goes_on_at_the_rate_of_the_whole_run(tmp_path, capture):
    first = set_up(tmp_path / "first", capture, "--max-num-iterations", 4)
    first.train()
    assert first.optimizers.schedulers["fields"].get_last_lr() == pytest.approx([1e-3]), "at its end"
    resumed = set_up(tmp_path / "resumed", capture, "--max-num-iterations", 296, "--load-dir", first.checkpoint_dir)
    check_schedules(resumed, warmup=3, end=300, proposals=150, start=4)


def test_a_configuration_of_an_earlier_version_keeps_its_numbers(tmp_path, capture):
    config = yaml.load((Path(__file__).parent / "data" / "run_config.yml").read_text(), Loader=yaml.Loader)
    config.max_num_iterations, config.vis = 400, "tensorboard"
    config.data, config.output_dir = capture, tmp_path
    config.pipeline.datamanager.stereo_rays_per_batch = 0
    for name in ("score_weight", "refine_tau", "stereo_depth_weight", "completed_depth_weight"):
        setattr(config.pipeline.model, name, 0.0)
    check_schedules(started(config), warmup=10, end=1000, proposals=500)


def test_a_rate_that_stays_for_want_of_the_run_s_length_says_so():
    with pytest.warns(UserWarning, match="max-steps"):
        rates, *_ = run(3, ExponentialDecayConfig(lr_final=1e-3))
    assert rates == [1e-2] * 3


# The loss, scaled for tinycudann


def tie(trainer: Trainer, implementation: str) -> list[TrainingCallback]:
    """What a trainer asks for after a checkpoint is loaded, as if its model had this implementation."""
    trainer.pipeline.model.config.implementation = implementation
    attributes = TrainingCallbackAttributes(trainer.optimizers, None, trainer.pipeline, trainer)
    return trainer.pipeline.get_training_callbacks(attributes)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.pipeline.model.named_parameters()}


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)  # the order in which nerfstudio keeps the images


def trained(trainer: Trainer) -> Trainer:
    seed()
    trainer.train()
    return trainer


def test_a_training_with_a_scaled_loss_ends_with_the_same_weights_and_is_resumed(tmp_path, capture):
    few = ["--max-num-iterations", 4]
    seed()
    plain = trained(set_up(tmp_path / "plain", capture, *few))
    seed()
    scaled = set_up(tmp_path / "scaled", capture, *few)
    start = weights(scaled)
    tie(scaled, "tcnn")
    assert scaled.grad_scaler.is_enabled()
    trained(scaled)
    assert scaled.grad_scaler.get_scale() >= 1024.0
    expected, found = weights(plain), weights(scaled)
    assert any(not torch.equal(found[name], start[name]) for name in start)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    resumed = set_up(tmp_path / "resumed", capture, *few, "--load-dir", scaled.checkpoint_dir)
    tie(resumed, "tcnn")
    assert resumed.grad_scaler.is_enabled()
    trained(resumed)
    assert resumed.step == 7


@pytest.mark.parametrize("implementation", ["torch", "tcnn"])
def test_the_loss_is_left_alone_without_tinycudann_and_where_the_trainer_scales_it(tmp_path, capture, implementation):
    trainer = set_up(tmp_path, capture)
    if implementation == "tcnn":
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    own = trainer.grad_scaler
    tie(trainer, implementation)
    assert trainer.grad_scaler is own


def test_accumulated_gradients_are_not_scaled_which_is_said(tmp_path, capture):
    trainer = set_up(tmp_path, capture, "--gradient-accumulation-steps", "fields", 2)
    with pytest.warns(UserWarning, match=r"cannot scale the loss.*--pipeline.model.implementation torch"):
        tie(trainer, "tcnn")
    assert not trainer.grad_scaler.is_enabled()


def test_gradients_that_no_scale_makes_finite_stop_a_training(tmp_path, capture, monkeypatch):
    """The steps are left out, so that no loss would ever tell."""
    trainer = set_up(tmp_path, capture, "--max-num-iterations", 40)
    trainer.callbacks = tie(trainer, "tcnn")
    loss = trainer.pipeline.model.get_loss_dict

    def with_bad_gradients(*arguments: Any) -> dict[str, torch.Tensor]:
        losses = loss(*arguments)
        for value in losses.values():
            if value.requires_grad:
                value.register_hook(lambda gradient: gradient * math.nan)
        return losses

    monkeypatch.setattr(trainer.pipeline.model, "get_loss_dict", with_bad_gradients)
    with pytest.raises(NonFiniteLossError, match=r"at step 1\d: gradients have been NaN or infinite for many steps"):
        trainer.train()
