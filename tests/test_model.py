"""The loss of a step: gradients against closed forms, terms that are off, what a checkpoint holds, what stops a run."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import box_room
import pytest
import torch
from jaxtyping import TypeCheckError
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline

from ddm_training import rgbd
from ddm_training.completion import FOLDER, CompletionSpec, make_network, save_completer
from ddm_training.unet import make_scheduler
from diffusionerf_ns import inspection, regularizers, unseen
from diffusionerf_ns.datamanager import StereoBatch
from diffusionerf_ns.errors import InputError, NonFiniteLossError
from diffusionerf_ns.geometric_losses import stereo_losses
from diffusionerf_ns.model_config import DiffusioNeRFModelConfig
from diffusionerf_ns.prior import PatchPrior
from diffusionerf_ns.refine import ViewRefiner

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


# Depth


def test_planar_depth_is_the_differentiable_depth_along_the_optical_axis_in_metres(folders):
    pipeline = build(folders, metric_scale=2.5)
    rays, _ = pipeline.datamanager.next_train(0)
    outputs = pipeline.model(rays)
    expected = 2.5 * outputs["expected_depth"] / rays.metadata["directions_norm"]
    torch.testing.assert_close(outputs["planar_depth"], expected)
    outputs["planar_depth"].sum().backward()
    gradients = [p.grad for p in pipeline.model.field.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    assert not outputs["depth"].requires_grad, "nerfacto's depth is the median, for people"


def test_rays_without_an_optical_axis_have_depth_too(folders):
    """nerfstudio's --render-nearest-camera makes such rays."""
    pipeline = build(folders, metric_scale=1.0).eval()
    rays, _ = pipeline.datamanager.next_train(0)
    rays.metadata = {}
    outputs = pipeline.model.get_outputs(pipeline.model.collider(rays))
    torch.testing.assert_close(outputs["planar_depth"], outputs["expected_depth"])


# The score term


@pytest.mark.parametrize("scaling", ["none", "variance"])
def test_the_gradient_that_reaches_a_rendered_patch_is_the_weighted_score(folders, scaling):
    pipeline, known = with_known_prior(
        folders, share=0.0, score_scaling=scaling, score_rgb_norm=None, score_rgb_weight=3e-9
    )
    model, spec = pipeline.model, known.prior.spec
    outputs, batch, losses, _ = step(pipeline)
    losses["score_loss"].backward()
    first = batch["patches"].first_ray
    z = outputs["planar_depth"][first:].detach()
    rgb = outputs["rgb"][first:].detach()
    sigma = known.prior.sigma(0.1)
    c = model.config
    weight = c.score_weight * {"none": 1.0, "variance": sigma**2 / P**2}[scaling]
    # dL/dx = -w s with s = -c x / sigma and w = weight z; dx/dz = -2 near / z^2 beyond near.
    assert z.min() > spec.near
    x = 2 * spec.near / z - 1
    expected = (
        weight * c.score_depth_weight * z.clamp_max(c.score_max_depth) * known.c * x / sigma * (-2 * spec.near / z**2)
    )
    torch.testing.assert_close(outputs["planar_depth"].grad[first:], expected, rtol=1e-4, atol=0)
    # dx/drgb = 2
    expected = weight * 3e-9 * known.c * (2 * rgb - 1) / sigma * 2
    torch.testing.assert_close(outputs["rgb"].grad[first:], expected, rtol=1e-4, atol=1e-14)
    assert not outputs["rgb"].grad[:first].any(), "nothing reaches the pixel rays"
    assert not outputs["planar_depth"].grad[:first].any()


def test_the_colour_score_is_rescaled_to_its_norm(folders):
    pipeline, _ = with_known_prior(
        folders, share=0.0, score_scaling="none", score_rgb_norm=3000.0, score_rgb_weight=2e-10
    )
    outputs, batch, losses, _ = step(pipeline)
    losses["score_loss"].backward()
    gradient = outputs["rgb"].grad[batch["patches"].first_ray :]
    assert float(gradient.norm()) == pytest.approx(2.0 * pipeline.model.config.score_weight * 2e-10 * 3000.0, rel=1e-4)


def test_an_image_patch_gives_no_gradient_to_colour_but_does_to_depth(folders):
    pipeline, _ = with_known_prior(folders, share=1.0)
    outputs, batch, losses, _ = step(pipeline)
    assert batch["patches"].rgb[0] is not None
    losses["score_loss"].backward()
    assert outputs["rgb"].grad is None or not outputs["rgb"].grad.any()
    assert outputs["planar_depth"].grad[batch["patches"].first_ray :].abs().min() > 0


def test_the_prior_sees_the_colours_of_the_training_image(folders, monkeypatch):
    pipeline, known = with_known_prior(folders, share=1.0)
    seen = []
    plain = known.prior.score
    monkeypatch.setattr(known.prior, "score", lambda x, tau, **kw: seen.append(x.detach()) or plain(x, tau, **kw))
    outputs, batch, _, _ = step(pipeline)
    torch.testing.assert_close(seen[0][0, :3], 2 * batch["patches"].rgb[0].permute(2, 0, 1) - 1)
    z = outputs["planar_depth"][batch["patches"].first_ray :, 0].reshape(P, P).detach()
    torch.testing.assert_close(seen[0][0, 3], rgbd.encode_depth(z, known.prior.spec.near))


def test_all_patches_of_a_step_go_through_the_prior_at_once(folders):
    pipeline, known = with_known_prior(folders, patches_per_step=3)
    outputs, batch, losses, _ = step(pipeline)
    assert known.calls == 1
    assert len(outputs["rgb"]) == batch["patches"].first_ray + 3 * P * P
    assert losses["score_loss"].isfinite()


def test_the_logged_score_is_unweighted_and_the_loss_is_weighted(folders):
    logs, losses = [], []
    for weight in (1.0, 10.0):
        pipeline, _ = with_known_prior(folders, share=0.0, score_weight=weight)
        torch.manual_seed(1)
        _, _, loss, log = step(pipeline)
        logs.append(float(log["score_depth_rms"]))
        losses.append(float(loss["score_loss"]))
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-4)


def test_the_noise_level_and_the_weight_follow_their_schedules(folders):
    model = build(folders, score_start=0.1, score_fade_start=0.5, score_final=0.2, **SCORE_ALONE).model
    c = model.config
    weights, taus = {}, {}
    for at in (0, 9, 10, 50, 75, 100):
        model.step = at
        weights[at], taus[at] = model.score_factor / c.score_weight, model.tau
    assert weights == pytest.approx({0: 0.0, 9: 0.0, 10: 1.0, 50: 1.0, 75: 0.6, 100: 0.2})
    assert taus[0] == pytest.approx(c.tau_start)
    assert taus[100] == pytest.approx(c.tau_end)


# Terms that are off


def test_terms_that_are_off_are_not_computed_and_their_rays_not_drawn(folders, monkeypatch):
    pipeline = build(folders, share=1.0, **TERMS_OFF)
    for name in (
        "chroma",
        "foreground",
        "frustum",
        "distortion",
        "known_depth",
        "coarse_depth",
        "weigh_score",
        "score_pseudo_loss",
    ):
        monkeypatch.setattr(regularizers, name, lambda *a, _name=name, **k: pytest.fail(_name))
    monkeypatch.setattr(PatchPrior, "load", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(pipeline.model.frusta, "count", lambda *a: pytest.fail("counted"))
    for at in (0, 50, 99):
        set_step(pipeline, at)
        outputs, _, losses, _ = step(pipeline)
        assert len(outputs["rgb"]) == RAYS
        assert losses.keys() == {"rgb_loss", "interlevel_loss"}


def test_no_patch_is_drawn_while_the_schedule_keeps_the_prior_off(folders):
    pipeline = build(folders, metric_scale=1.0, score_start=0.5, **SCORE_ALONE)
    lengths = []
    for at in (0, 49, 50):
        set_step(pipeline, at)
        lengths.append(len(pipeline.datamanager.next_train(0)[0]))
    assert lengths == [RAYS, RAYS, RAYS + P * P]


def test_distortion_is_computed_from_its_start_on(folders):
    pipeline = build(folders, **TERMS_OFF | {"distortion_weight": 0.5}, distortion_start=0.3, distortion_full=0.8)
    values = {}
    for at in (29, 55, 80):
        set_step(pipeline, at)
        torch.manual_seed(2)
        _, _, losses, log = step(pipeline)
        values[at] = float(losses["distortion_loss"] / log["distortion"]) if "distortion_loss" in losses else 0.0
    assert values == pytest.approx({29: 0.0, 55: 0.25, 80: 0.5})


@pytest.mark.parametrize(("views", "asked"), [(1, 0), (2, 2)])
def test_pixel_rays_need_as_many_frusta_as_configured_and_patch_rays_one(folders, monkeypatch, views, asked):
    """Of one frustum nothing is asked of pixel rays: it would be their own."""
    on = TERMS_OFF | {"frustum_weight": 1.0, "score_weight": 1.0, "stereo_depth_weight": 0.1}
    pipeline = build(folders, metric_scale=1.0, frustum_views=views, **on)
    required = []
    plain = regularizers.frustum
    monkeypatch.setattr(regularizers, "frustum", lambda w, n, r: required.append(r) or plain(w, n, r))
    rays, batch = step(pipeline)[:2]
    between = batch["patches"].first_ray - RAYS  # rays through matched pixels
    patch_rays = len(rays["rgb"]) - RAYS - between
    assert required[0].tolist() == [asked] * RAYS + [0] * between + [1] * patch_rays


@pytest.mark.parametrize(("views", "computed"), [(1, False), (2, True)])
def test_without_patches_the_frustum_term_needs_two_frusta(folders, views, computed):
    pipeline = build(folders, metric_scale=1.0, frustum_views=views, **TERMS_OFF | {"frustum_weight": 1.0})
    _, _, losses, _ = step(pipeline)
    assert ("frustum_loss" in losses) == computed


def test_an_evaluation_batch_has_the_photometric_loss_alone(folders):
    pipeline = build(folders).eval()
    rays, batch = pipeline.datamanager.next_eval(0)
    with torch.no_grad():
        losses = pipeline.model.get_loss_dict(pipeline.model(rays), batch)
    assert losses.keys() == {"rgb_loss"}


# What a checkpoint holds


def test_the_state_holds_nothing_of_the_prior(folders):
    bare, full = build(folders, **TERMS_OFF), build(folders)
    step(full)
    assert full.model.prior.denoiser is not None
    assert full.state_dict().keys() == bare.state_dict().keys()
    shapes = [{k: v.shape for k, v in p.state_dict().items()} for p in (bare, full)]
    assert shapes[0] == shapes[1]
    networks = {id(p) for p in full.model.prior.denoiser.parameters()}
    assert not networks & {id(p) for p in full.parameters()}
    assert not networks & {id(p) for group in full.get_param_groups().values() for p in group}


def test_a_step_changes_nothing_of_the_prior(folders):
    pipeline = build(folders)
    before = copy.deepcopy(pipeline.model.prior.denoiser.state_dict())
    sum(step(pipeline)[2].values()).backward()
    for name, value in pipeline.model.prior.denoiser.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in pipeline.model.prior.denoiser.parameters())


# Metric scale


def test_a_scale_that_is_given_wins(folders):
    assert float(build(folders, metric_scale=0.37).model.metric_scale) == pytest.approx(0.37)


def test_stereo_puts_the_scene_at_the_depth_that_the_prior_knows(folders):
    pipeline = build(folders)
    found = pipeline.datamanager.train_dataset.metadata["stereo"]
    # Disparity in metres is that in scene units divided by metres per unit; the prior's median is 0.45.
    assert found["median_disparity"] / float(pipeline.model.metric_scale) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("near", "far", "begin", "end"),
    [
        (None, None, 0.6 * 2.0, 3.0 * 7.0),
        (1.0, 10.0, 0.6 * 2.0, 1.25 * 10.0),
        (4.0, 10.0, 0.75 * 4.0, 1.25 * 10.0),
        (0.1, 1.0, 0.75 * 0.1, 1.25),  # stereo finds everything behind the far bound: one of them is wrong
    ],
)
def test_rays_begin_at_the_farther_of_what_the_capture_and_stereo_say_and_end_where_one_says(
    folders, near, far, begin, end
):
    pipeline = build(folders)
    metadata = dict(pipeline.datamanager.train_dataset.metadata)
    metadata["stereo"] = metadata["stereo"] | {"near": 2.0, "far": 7.0}
    metadata |= {} if near is None else {"near": near, "far": far}
    model = pipeline.config.model.setup(
        scene_box=pipeline.model.scene_box, num_train_data=4, metadata=metadata, device="cpu"
    )
    assert model.collider.bounds.tolist() == pytest.approx([begin, end])


@pytest.mark.parametrize(
    ("confirmed", "error", "cost"),
    [
        (True, math.inf, math.log(0.9 * 5 / 4)),
        (False, math.inf, 0.0),
        (False, 0.05, math.log(0.9 * 5 / 4)),
        (True, 0.02, math.log(0.96 * 5 / 4)),
        (True, 0.2, math.log(0.9 * 5 / 4) / 4),  # four times as unsure as what is held firmly
    ],
)
def test_completed_depth_is_held_closer_where_another_image_or_its_network_is_sure(folders, confirmed, error, cost):
    off = TERMS_OFF | {"completed_depth_weight": 0.3, "completed_error_factor": 2.0, "completed_sure_error": 0.05}
    model = build(folders, confirmed_depth_margin=0.1, completed_depth_margin=0.3, **off).model
    known = StereoBatch(
        rays=slice(4, 4),
        distance=torch.zeros(0),
        completed=torch.full((4,), 5.0),
        confirmed=torch.full((4,), confirmed),
        error=torch.full((4,), error),
    )
    log: dict[str, Any] = {}
    frustums = SimpleNamespace(starts=torch.full((4, 1, 1), 3.5), ends=torch.full((4, 1, 1), 4.5))
    outputs = {"weights_list": [torch.ones(4, 1, 1)], "ray_samples_list": [SimpleNamespace(frustums=frustums)]}
    losses = stereo_losses(model.config, outputs, known, log)
    assert float(log["completed_depth"]) == pytest.approx(cost)
    assert float(losses["completed_depth_loss"]) == pytest.approx(0.3 * cost)


def test_the_data_manager_is_told_of_the_models_prior_unless_it_names_its_own(folders):
    config = copy.deepcopy(all_methods["diffusionerf-tiny"].pipeline)
    config.datamanager.data = folders[0]
    config.datamanager.stereo_rays_per_batch = 0
    config.model.prior, config.model.prior_revision = str(folders[2]), "v1"
    manager = config.setup(device="cpu", test_mode="val").datamanager.config
    assert (manager.completion_prior, manager.completion_revision) == (str(folders[2]), "v1")
    assert config.datamanager.completion_prior is None, "the configuration that is saved stays as it was given"
    config.datamanager.completion_prior = "another"
    assert config.setup(device="cpu", test_mode="val").datamanager.config.completion_prior == "another"


@pytest.mark.parametrize("name", ["completed_error_factor", "completed_sure_error"])
@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_an_error_factor_that_is_not_positive_is_refused(name, factor):
    with pytest.raises(InputError, match=f"{name.replace('_', '-')} must be positive"):
        DiffusioNeRFModelConfig(**{name: factor})


def test_a_step_with_depth_that_a_network_completed_has_a_finite_loss_and_its_errors(folders, tmp_path):
    prior = box_room.write_prior(tmp_path / "prior", P)
    torch.manual_seed(0)
    save_completer(prior / FOLDER, make_network(), CompletionSpec(size=(32, 24)))
    pipeline = build((*folders[:2], prior), score_weight=0.0)
    _, batch, losses, _ = step(pipeline)
    assert bool(batch["stereo"].error.isfinite().all())
    assert math.isfinite(float(losses["completed_depth_loss"]))


@pytest.mark.parametrize("name", ["completed_depth_margin", "confirmed_depth_margin"])
@pytest.mark.parametrize("margin", [-0.1, 1.0, math.nan])
def test_a_margin_that_is_no_share_of_the_depth_is_refused(name, margin):
    with pytest.raises(InputError, match=f"{name.replace('_', '-')} must be in .0, 1., found {margin}"):
        DiffusioNeRFModelConfig(**{name: margin})


@pytest.mark.parametrize(
    ("bounds", "shown"),
    [
        ({}, (2.0 / 1.2, 5.0 * 1.2)),
        ({"near": 3.0, "far": 3.5}, (0.75 * 3.0, None)),
        ({"near": 0.1, "far": 1.0}, (0.75 * 0.1, None)),  # stereo finds everything behind the far bound
        ({"near": 10.0, "far": 20.0}, (0.75 * 10.0, None)),  # or before the near one
    ],
)
def test_depth_is_coloured_over_the_surfaces_that_stereo_found_from_the_first_step(folders, bounds, shown):
    pipeline = build(folders)
    metadata = dict(pipeline.datamanager.train_dataset.metadata) | bounds
    metadata["stereo"] = metadata["stereo"] | {"near": 2.0, "far": 5.0}
    model = pipeline.config.model.setup(
        scene_box=pipeline.model.scene_box, num_train_data=4, metadata=metadata, device="cpu"
    )
    fog = {"depth": torch.full((4, 4, 1), 700.0)}  # an untrained field
    near, far = shown[0], shown[1] or float(model.collider.bounds[1])
    assert model.depth_colour_range(fog) == pytest.approx((near, far))


def test_without_bounds_and_stereo_the_scale_is_read_off_the_rendered_depth(folders):
    options: dict[str, Any] = SCORE_ALONE | {"metric_scale_warmup": 0.2}
    pipeline = build(folders, **options)
    pipeline.model.metric_scale.fill_(math.nan)
    set_step(pipeline, 19)
    assert len(step(pipeline)[0]["rgb"]) == RAYS
    assert pipeline.model.metric_scale.isnan()
    set_step(pipeline, 20)
    outputs = step(pipeline)[0]
    assert len(outputs["rgb"]) == RAYS, "the first patch comes a step later"
    disparity = float((1 / outputs["depth"]).median())
    assert float(pipeline.model.metric_scale) == pytest.approx(disparity / 0.45, rel=1e-5)
    assert len(step(pipeline)[0]["rgb"]) == RAYS + P * P


def test_a_model_is_built_without_its_prior_and_takes_the_scale_of_its_checkpoint(folders, tmp_path):
    known = build(folders, data=folders[1])
    config = copy.deepcopy(all_methods["diffusionerf-tiny"].pipeline)
    config.datamanager.data = folders[1]
    config.model.prior = str(tmp_path / "gone")
    later = config.setup(device="cpu", test_mode="test").eval()
    assert later.model.metric_scale.isnan()
    later.load_pipeline(known.state_dict(), 5)
    assert float(later.model.metric_scale) == float(known.model.metric_scale)
    assert later.model.collider.bounds.tolist() == known.model.collider.bounds.tolist()


def test_a_loaded_model_renders_what_the_trained_one_rendered(folders):
    """Whatever was found in the training images has to be in the checkpoint: it is not looked for again."""
    trained = build(folders)
    config = copy.deepcopy(all_methods["diffusionerf-tiny"].pipeline)
    config.datamanager.data = folders[0]
    config.model.prior, config.model.patch_size = str(folders[2]), None
    torch.manual_seed(5)
    loaded = config.setup(device="cpu", test_mode="test").eval()
    loaded.load_pipeline(trained.state_dict(), 5)
    trained.eval()
    rays, _ = trained.datamanager.next_eval(0)
    with torch.no_grad():
        before, after = trained.model(copy.copy(rays)), loaded.model(copy.copy(rays))
    for name in ("rgb", "depth", "planar_depth", "accumulation"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)


def view(pipeline: VanillaPipeline) -> dict[str, torch.Tensor]:
    pipeline.eval()
    return pipeline.model.get_outputs_for_camera(pipeline.datamanager.eval_dataset.cameras[:1])


def test_the_colours_of_a_view_are_the_priors_clean_estimate(folders):
    pipeline, known = with_known_prior(folders, refine_tau=0.07, fill_unseen=False)
    # photographs without any detail: all that a view has is grain
    pipeline.model.refine_view = ViewRefiner(lambda: known.prior, [(1.0, 0.0)])
    shown = view(pipeline)
    assert known.calls == 0, "only when it is looked at"
    assert not torch.equal(shown["rgb"], shown["rgb_rendered"])
    assert known.calls == 1
    # eps = c x: the clean estimate is (1 - c sigma) x, and x = 2 rgb - 1
    expected = 0.5 + (shown["rgb_rendered"] - 0.5) * (1.0 - known.c * known.prior.sigma(0.07))
    torch.testing.assert_close(shown["rgb"], expected)


def test_views_are_left_as_rendered_where_refinement_is_off_or_the_prior_is_missing(folders, capsys):
    pipeline, known = with_known_prior(folders, refine_tau=0.0, fill_unseen=False)
    shown = view(pipeline)
    assert known.calls == 0
    assert torch.equal(shown["rgb"], shown["rgb_rendered"])

    pipeline = build(folders, metric_scale=1.0, score_weight=0.0, refine_tau=0.07, fill_unseen=False)
    pipeline.model.config.prior = "no-such-prior"
    for _ in range(2):
        shown = view(pipeline)
        assert torch.equal(shown["rgb"], shown["rgb_rendered"])
    assert capsys.readouterr().out.count("left as rendered") == 1


def turned(cameras: Cameras, angle: float) -> Cameras:
    """A copy of the first camera, turned about its upright axis."""
    camera = copy.deepcopy(cameras[:1].to("cpu"))
    turn = torch.tensor(
        [[math.cos(angle), 0.0, math.sin(angle)], [0.0, 1.0, 0.0], [-math.sin(angle), 0.0, math.cos(angle)]]
    )
    camera.camera_to_worlds[0, :, :3] = camera.camera_to_worlds[0, :, :3] @ turn
    return camera


def test_a_view_is_filled_where_the_training_views_end_by_their_own_depth(folders):
    pipeline = build(folders, score_weight=0.0, refine_tau=0.0).eval()
    model, train = pipeline.model, pipeline.datamanager.train_dataset.cameras
    assert model.get_outputs_for_camera(train[:1])["unseen"].mean() < 0.02
    outputs = model.get_outputs_for_camera(turned(train, 0.6))
    hidden = outputs["unseen"][..., 0] > 0.0
    assert 0.1 < hidden.float().mean() < 0.9
    assert torch.equal(outputs["rgb"][~hidden], outputs["rgb_rendered"][~hidden])
    change = (outputs["rgb"] - outputs["rgb_rendered"]).abs().amax(dim=-1)
    assert (change[hidden] > 0.0).float().mean() > 0.9
    away = model.get_outputs_for_camera(turned(train, math.pi))
    assert away["unseen"].min() == 1.0
    assert torch.equal(away["rgb"], away["rgb_rendered"]), "there is nothing to go on from"


def test_what_a_crop_box_leaves_out_is_not_filled(folders):
    pipeline = build(folders, score_weight=0.0, refine_tau=0.0).eval()
    camera = turned(pipeline.datamanager.train_dataset.cameras, 0.3)
    box = OrientedBox.from_params((0.5, 0.0, 0.0), (0.0, 0.0, 0.0), (0.3, 0.3, 0.3))
    outputs = pipeline.model.get_outputs_for_camera(camera, obb_box=box)
    empty = ~(outputs["accumulation"][..., 0] > inspection.EMPTY)
    assert empty.float().mean() > 0.2
    assert (outputs["unseen"][..., 0][empty] == 0.0).all()
    torch.testing.assert_close(outputs["rgb"][empty], outputs["rgb_rendered"][empty], equal_nan=True)


def test_what_the_training_views_show_is_rendered_as_after_training_and_the_mode_kept(folders, monkeypatch):
    pipeline = build(folders, score_weight=0.0, refine_tau=0.0).train()
    model, modes = pipeline.model, []
    render = model.get_outputs
    monkeypatch.setattr(model, "get_outputs", lambda rays: modes.append(model.training) or render(rays))
    model.shown_surfaces()
    assert modes
    assert not any(modes)
    assert model.training


def test_what_the_training_views_show_is_found_once_until_the_field_changes(folders):
    pipeline = build(folders, score_weight=0.0, refine_tau=0.0)
    model, state = pipeline.eval().model, pipeline.state_dict()
    first = model.shown_surfaces()
    view(pipeline)["rgb"]
    assert model.shown_surfaces() is first
    for callback in callbacks(pipeline):
        callback.run_callback_at_location(3, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
    second = model.shown_surfaces()
    assert second is not first
    pipeline.load_pipeline(state, 3)
    assert model.shown_surfaces() is not second


@pytest.mark.parametrize("reason", ["switched off", "many views", "other cameras", "a viewer beside a training"])
def test_views_are_not_filled(folders, monkeypatch, reason):
    pipeline = build(folders, score_weight=0.0, refine_tau=0.0, fill_unseen=reason != "switched off")
    if reason == "many views":
        monkeypatch.setattr(unseen, "MAX_VIEWS", 1)
    if reason == "other cameras":
        pipeline.model.metadata["train_cameras"].camera_type[:1] = CameraType.FISHEYE.value
    if reason == "a viewer beside a training":
        callbacks(pipeline)
        assert "unseen" in view(pipeline), "an evaluation beside a training is filled"
        monkeypatch.setattr(inspection, "in_viewer", lambda: True)
    assert "unseen" not in view(pipeline)


def test_a_prior_that_is_missing_is_refused_before_the_first_step_whatever_it_is_for(folders):
    with pytest.raises(InputError, match="no-such-prior"):
        build(folders, prior="no-such-prior", score_weight=0.0, refine_tau=0.07, completion="membrane")
    with pytest.raises(InputError, match="no-such-prior"):
        build(folders, prior="no-such-prior", score_weight=0.0, refine_tau=0.0)
    build(folders, prior="no-such-prior", score_weight=0.0, refine_tau=0.0, completion="membrane")


def test_views_get_more_samples_than_training_rays(folders, monkeypatch):
    pipeline = build(folders, refine_tau=0.0, eval_samples_factor=3)
    rays, _ = pipeline.datamanager.next_train(0)
    samples = pipeline.model.config.num_nerf_samples_per_ray
    counts = []
    monkeypatch.setattr(
        pipeline.model.field, "forward", lambda ray_samples, **_: counts.append(ray_samples.shape[-1]) or 1 / 0
    )
    for mode in (pipeline.train, pipeline.eval, pipeline.train):
        with pytest.raises(ZeroDivisionError):
            mode().model(rays)
    assert counts == [samples, 3 * samples, samples]
    monkeypatch.setattr(inspection, "in_viewer", lambda: True)
    with pytest.raises(ZeroDivisionError):
        pipeline.eval().model(rays)
    assert counts[3:] == [samples], "a viewer beside a training is quick"
    for callback in callbacks(pipeline):
        callback.run_callback_at_location(step=99, location=TrainingCallbackLocation.AFTER_TRAIN)
    with pytest.raises(ZeroDivisionError):
        pipeline.model(rays)
    assert counts[4:] == [3 * samples], "and shows what it can once that is over"


def test_a_resumed_run_ends_its_schedules_where_the_whole_run_does(folders):
    pipeline = build(folders, **TERMS_OFF)
    tie(pipeline, 600, start=400)
    assert pipeline.model.total_steps == 1000


# A loss that is not finite


@pytest.mark.parametrize(("term", "value"), [("foreground", math.nan), ("known_depth", math.inf)])
def test_a_term_that_is_not_finite_is_named_with_its_step(folders, monkeypatch, term, value):
    pipeline = build(folders)
    set_step(pipeline, 17)
    plain: Callable[..., torch.Tensor] = getattr(regularizers, term)
    monkeypatch.setattr(regularizers, term, lambda *a: plain(*a) * value)
    name = {"foreground": "foreground_loss", "known_depth": "stereo_depth_loss"}[term]
    with pytest.raises(NonFiniteLossError, match=f"step 17: {name} is {value}") as caught:
        step(pipeline)
    assert "rgb_loss" not in str(caught.value), "only the terms that are at fault"


def test_a_prior_whose_score_is_not_finite_is_named(folders):
    pipeline, known = with_known_prior(folders)
    known.c = math.inf
    with pytest.raises(NonFiniteLossError, match="score_loss"):
        step(pipeline)


# Evaluation


def test_depth_is_judged_in_metres_whatever_scale_the_prior_was_given(folders, monkeypatch):
    monkeypatch.setattr("diffusionerf_ns.lpips.LpipsNetworks.distance", lambda *a: None)  # not asked for here
    values = []
    for scale in (0.5, 3.0):
        pipeline = build(folders, metric_scale=scale).eval()
        camera, batch = next(iter(pipeline.datamanager.fixed_indices_eval_dataloader))
        outputs = pipeline.model.get_outputs_for_camera(camera)
        values.append(pipeline.model.get_image_metrics_and_images(outputs, batch)[0])
    assert values[0]["depth_abs_rel"] == pytest.approx(values[1]["depth_abs_rel"], rel=1e-4)
    assert values[0]["depth_rmse"] == pytest.approx(values[1]["depth_rmse"], rel=1e-4)
    z = batch["depth_image"][..., 0]
    units = pipeline.datamanager.train_dataset.metadata["scene_units_per_metre"]
    metres = outputs["planar_depth"][..., 0] / 3.0 / units
    assert values[1]["depth_abs_rel"] == pytest.approx(float(((metres - z).abs() / z).mean()), rel=1e-4)


# Shapes


def test_a_wrong_shape_at_a_public_boundary_raises():
    with pytest.raises(TypeCheckError):
        regularizers.foreground(torch.zeros(3))
    with pytest.raises(TypeCheckError):
        regularizers.frustum(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int64), 2)
    with pytest.raises(TypeCheckError):
        regularizers.score_pseudo_loss(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 9))
    with pytest.raises(TypeCheckError):
        rgbd.encode(torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 8))


def test_a_run_without_a_gpu_says_once_that_tinycudann_is_not_used(folders, capsys):
    build(folders, implementation="tcnn", **TERMS_OFF)
    assert capsys.readouterr().out.count("Hash grids run in plain torch") == 1
