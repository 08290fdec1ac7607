"""Everything is on the device that it should be on: trainings and views on a device that is not the CPU, simulated."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_runs import small_prior, wall_capture
from other_device import DEVICE, OtherTensor, other_device
from script_modules import load_script

pytestmark = [  # of the modes of torch, and of "meta", which has no values elsewhere
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
    pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning"),
]


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The simulated one."""
    with other_device() as device:
        yield device


@pytest.fixture
def checks(device, tmp_path) -> Any:
    """Those of `scripts/gpu_check.sh`, on it."""
    gpu_check: ModuleType = load_script("gpu_check")
    data, prior = wall_capture(tmp_path / "wall"), small_prior(tmp_path / "prior")
    config = gpu_check.GpuCheckConfig(data=data, prior=str(prior), steps=4, timed_steps=1)
    return gpu_check.Checks(config, str(device), tmp_path)


def test_what_lies_there_says_so_and_has_gradients(device):
    x = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
    assert x.device == DEVICE
    loss = (3.0 * x).square().sum()
    loss.backward()
    assert isinstance(x.grad, OtherTensor)
    assert x.grad.cpu().tolist() == [18.0, 36.0]
    assert torch.zeros(2).to(x).device == DEVICE
    assert x.detach().cpu().numpy().tolist() == [1.0, 2.0]


def test_tensors_of_two_devices_are_refused_but_for_scalars_copies_and_indices(device):
    x = torch.arange(4.0, device=device)
    for wrong in (
        lambda: x + torch.ones(4),
        lambda: torch.cat([x, torch.ones(1)]),
        lambda: torch.stack([x.sum(), torch.tensor(0.0)]),
        lambda: torch.tensor(0.0).add_(x.sum()),
        lambda: torch.ones(4)[x.long()],
        lambda: x.__setitem__(torch.tensor([1, 2]), torch.ones(2)),
        lambda: (x > 1.0).__setitem__(torch.tensor([1, 2]), torch.ones(2, dtype=torch.bool)),
    ):
        with pytest.raises((RuntimeError, TypeError), match=r"two devices|copy it to the CPU first"):
            wrong()
    assert (x * torch.tensor(2.0)).tolist() == [0.0, 2.0, 4.0, 6.0]
    assert x[torch.tensor([3, 1])].tolist() == [3.0, 1.0]
    x.copy_(torch.ones(4))
    assert x.tolist() == [1.0, 1.0, 1.0, 1.0]
    with pytest.raises(TypeError, match="copy it to the CPU first"):
        x.numpy()


def test_generators_belong_to_a_device(device):
    there, here = torch.Generator(device).manual_seed(1), torch.Generator().manual_seed(1)
    assert torch.rand(2, generator=there, device=device).tolist() == torch.rand(2, generator=here).tolist()
    for generator, place in ((there, "cpu"), (here, device)):
        with pytest.raises(RuntimeError, match="a generator on"):
            torch.rand(2, generator=generator, device=place)


@pytest.mark.slow
def test_a_step_has_the_losses_and_gradients_of_the_cpu(checks):
    step = checks.one_step("diffusionerf-tiny")
    assert step.passed, step


def test_a_training_with_views_and_their_evaluation(checks):
    training = checks.training("diffusionerf-tiny")
    assert "4 steps, 2 test images" in training.what


@pytest.fixture
def trainer(checks) -> Any:
    """After a step of training with the score."""
    from diffusionerf_ns.bench.job import make_trainer

    trainer = make_trainer(checks.trainer_config("diffusionerf-tiny", checks.device, "view", metric_scale=1.0))
    trainer.pipeline.train()
    trainer.train_iteration(0)
    trainer.pipeline.eval()
    assert {p.device for p in trainer.pipeline.model.parameters()} == {DEVICE}
    return trainer


def test_every_output_of_a_view(trainer, device):
    camera, _ = trainer.pipeline.datamanager.next_eval_image(0)
    outputs = trainer.pipeline.model.get_outputs_for_camera(camera.to(device))
    assert {"rgb", "MedianDepth", "PriorCleanDepth", "TrainingCameras"} <= set(outputs)
    assert outputs["rgb"].device == outputs["MedianDepth"].device == DEVICE
    for name in outputs:
        assert bool(outputs[name].isfinite().all()), name


def test_the_panel_of_the_last_patch_and_exported_depth(trainer, tmp_path):
    from diffusionerf_ns.export import ExportDepthConfig
    from diffusionerf_ns.viewer import patch_picture

    model = trainer.pipeline.model
    picture = patch_picture(model.last_patch, model.prior, 1.0, 9.0)
    assert bool(picture.cpu().isfinite().all())
    export = ExportDepthConfig(load_config=tmp_path / "unused", output_dir=tmp_path / "depth")
    dataset = trainer.pipeline.datamanager.eval_dataset
    frames = export._export_split(trainer.pipeline, dataset, "test", 1.0)
    assert len(frames) == len(list((tmp_path / "depth" / "depth").glob("*.npy"))) == len(dataset)


@pytest.mark.slow
def test_the_trainings_of_both_networks(checks, device, monkeypatch):
    import accelerate

    from ddm_training.train_completion import TrainCompletionConfig

    asked = []

    class Accelerator(accelerate.Accelerator):
        device = property(lambda self: asked.append(self) or device)

    monkeypatch.setattr(accelerate, "Accelerator", Accelerator)
    assert checks.denoiser().passed  # makes a store of rooms
    config = TrainCompletionConfig(
        data=(checks.folder / "store",),
        output_dir=checks.folder / "completion",
        size=(32, 24),
        train_batch_size=4,
        max_train_steps=2,
        validation_steps=1,
        validation_samples=4,
        dataloader_num_workers=0,
        lr_warmup_steps=1,
    )
    config.main()
    assert len(set(map(id, asked))) == 2
    assert (checks.folder / "completion" / "completion").is_dir()
