"""The objective of the denoiser: schedule of the noise, loss, learning rate and average, against closed forms."""

import numpy as np
import pytest
import torch
import toy_training
from toy_training import config

from ddm_training import objective
from ddm_training.train import PatchTask
from ddm_training.unet import add_noise, make_scheduler, predict_clean, velocity, velocity_to_noise

pytestmark = pytest.mark.usefixtures("one_thread")
store = toy_training.store  # a fixture


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
