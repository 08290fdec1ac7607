"""The optimiser and learning-rate schedule configs."""

import io
from itertools import pairwise

import pytest
import torch

from ddm_training.errors import InputError
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
    rates, *_ = run(130, ExponentialDecayConfig(lr_final=1e-4, max_steps=100))
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
