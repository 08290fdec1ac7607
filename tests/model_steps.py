"""Steps of `diffusionerf-tiny` with few rays on a small box, and a prior whose score is known."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import box_room
import pytest
import torch
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.pipelines.base_pipeline import VanillaPipeline

from ddm_training import rgbd
from ddm_training.unet import make_scheduler
from diffusionerf_ns.prior import PatchPrior

RAYS, P = 32, 16
TERMS_OFF: dict[str, float] = {
    "chroma_weight": 0.0,
    "score_weight": 0.0,
    "frustum_weight": 0.0,
    "foreground_weight": 0.0,
    "distortion_weight": 0.0,
    "stereo_depth_weight": 0.0,
    "completed_depth_weight": 0.0,
}
SCORE_ALONE = {name: 0.0 for name in TERMS_OFF if name != "score_weight"} | {"score_weight": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A capture with transforms.json, the same views as LLFF, and a prior."""
    root = tmp_path_factory.mktemp("model")
    return (
        box_room.write_transforms(root / "box"),
        box_room.write_llff(root / "llff"),
        box_room.write_prior(root / "prior", P),
    )


@pytest.fixture(autouse=True)
def stereo_once(monkeypatch) -> None:
    box_room.remember_stereo(monkeypatch)


def build(
    folders: tuple[Path, Path, Path],
    *,
    data: Path | None = None,
    share: float = 0.25,
    completion: Literal["prior", "membrane"] = "prior",
    **options: Any,
):
    """The pipeline of `diffusionerf-tiny` with few rays; 100 steps long, at step 0."""
    config = copy.deepcopy(all_methods["diffusionerf-tiny"].pipeline)
    config.datamanager.data = data or folders[0]
    config.datamanager.train_num_rays_per_batch = RAYS
    config.datamanager.image_patch_share = share
    config.datamanager.stereo_rays_per_batch = 8
    config.datamanager.completion = completion
    ours = {
        "prior": str(folders[2]),
        "patch_size": None,
        "patch_every": 1,
        "score_weight": 1.0,
    }  # whatever the preset has
    for name, value in (ours | options).items():
        assert hasattr(config.model, name)
        setattr(config.model, name, value)
    torch.manual_seed(0)
    pipeline = config.setup(device="cpu", test_mode="val")
    tie(pipeline, 100)
    set_step(pipeline, 0)
    return pipeline.train()


def callbacks(pipeline: VanillaPipeline, steps: int = 100, start: int = 0) -> list[TrainingCallback]:
    """What a trainer calls."""
    trainer = SimpleNamespace(config=SimpleNamespace(max_num_iterations=steps), _start_step=start)
    attributes = TrainingCallbackAttributes(None, None, pipeline, trainer)  # pyright: ignore[reportArgumentType]
    return pipeline.model.get_training_callbacks(attributes)


def tie(pipeline: VanillaPipeline, steps: int, start: int = 0) -> None:
    """What a trainer does before the first step, as far as it concerns the prior."""
    callbacks(pipeline, steps, start)
    pipeline.datamanager.get_training_callbacks(TrainingCallbackAttributes(None, None, pipeline, None))


def set_step(pipeline: VanillaPipeline, step: int) -> None:
    pipeline.model.step = step


def step(pipeline: VanillaPipeline) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """Outputs, batch, losses and metrics of one step; gradients are kept on what the losses read."""
    rays, batch = pipeline.datamanager.next_train(0)
    model = pipeline.model
    outputs = model(rays)
    for name in ("rgb", "planar_depth", "expected_depth"):
        outputs[name].retain_grad()
    metrics = model.get_metrics_dict(outputs, batch)
    return outputs, batch, model.get_loss_dict(outputs, batch, metrics), metrics


class Known:
    """A prior whose score is a known linear function: eps = c x, so score = -c x / sqrt(1 - abar)."""

    c = 0.7

    def __init__(self, spec: rgbd.RgbdSpec) -> None:
        self.calls = 0
        self.prior = PatchPrior(self._noise, make_scheduler().alphas_cumprod, spec)

    def _noise(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.c * x


def with_known_prior(folders, **options: Any) -> tuple[VanillaPipeline, Known]:
    pipeline = build(folders, metric_scale=0.8, **SCORE_ALONE | options)
    known = Known(rgbd.RgbdSpec.load(folders[2]))
    pipeline.model.set_prior(known.prior)
    return pipeline, known
