"""The loss of a step: gradients against closed forms, terms that are off, what stops a run."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import box_room
import model_steps
import pytest
import torch
from jaxtyping import TypeCheckError
from model_steps import RAYS, SCORE_ALONE, TERMS_OFF, P, build, set_step, step, with_known_prior
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.method_configs import all_methods

from ddm_training import rgbd
from ddm_training.completion import FOLDER, CompletionSpec, make_network, save_completer
from ddm_training.errors import InputError
from diffusionerf_ns import regularizers
from diffusionerf_ns.geometric_losses import stereo_losses
from diffusionerf_ns.gradients import NonFiniteLossError
from diffusionerf_ns.model_config import DiffusioNeRFModelConfig
from diffusionerf_ns.prior import PatchPrior
from diffusionerf_ns.stereo_rays import StereoBatch

folders, stereo_once = model_steps.folders, model_steps.stereo_once  # fixtures


# The score term


def test_a_training_does_not_have_cudnn_time_each_size_of_a_view(folders, monkeypatch):
    """ns-train switches that on, and a viewer beside it draws in ever other sizes."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    build(folders)
    assert torch.backends.cudnn.benchmark is False


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


# Completed depth


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


def test_a_step_with_depth_that_a_network_completed_has_a_finite_loss_and_its_errors(folders, tmp_path):
    prior = box_room.write_prior(tmp_path / "prior", P)
    torch.manual_seed(0)
    save_completer(prior / FOLDER, make_network(), CompletionSpec(size=(32, 24)))
    pipeline = build((*folders[:2], prior), score_weight=0.0)
    _, batch, losses, _ = step(pipeline)
    assert bool(batch["stereo"].error.isfinite().all())
    assert math.isfinite(float(losses["completed_depth_loss"]))


@pytest.mark.parametrize("name", ["completed_error_factor", "completed_sure_error"])
@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_an_error_factor_that_is_not_positive_is_refused(name, factor):
    with pytest.raises(InputError, match=f"{name.replace('_', '-')} must be positive"):
        DiffusioNeRFModelConfig(**{name: factor})


@pytest.mark.parametrize("name", ["metric_scale", "grid_margin"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_not_positive_is_refused(name, value):
    with pytest.raises(InputError, match=f"--pipeline.model.{name.replace('_', '-')} must be positive and finite"):
        DiffusioNeRFModelConfig(**{name: value})


@pytest.mark.parametrize("name", ["completed_depth_margin", "confirmed_depth_margin"])
@pytest.mark.parametrize("margin", [-0.1, 1.0, math.nan])
def test_a_margin_that_is_no_share_of_the_depth_is_refused(name, margin):
    with pytest.raises(InputError, match=f"{name.replace('_', '-')} must be in .0, 1., found {margin}"):
        DiffusioNeRFModelConfig(**{name: margin})


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
    required, seen = [], []
    plain = regularizers.frustum
    monkeypatch.setattr(regularizers, "frustum", lambda w, n, r: required.append(r) or seen.append(n) or plain(w, n, r))
    rays, batch = step(pipeline)[:2]
    between = batch["patches"].first_ray - RAYS  # rays through matched pixels
    patch_rays = len(rays["rgb"]) - RAYS - between
    assert required[0].tolist() == [asked] * RAYS + [0] * between + [1] * patch_rays
    counts = pipeline.model.frusta.count(
        rays["ray_samples_list"][-1].frustums.get_positions().detach(), near=pipeline.model.collider.bounds[0]
    )
    assert torch.equal(seen[0][required[0] > 0], counts[required[0] > 0])
    assert len(seen[0][required[0] > 0].unique()) > 1


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


def test_poses_learn_where_they_are_asked_to(folders):
    """The grid that is faster in plain torch has no gradient with respect to position."""
    pipeline = build(folders, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"), score_weight=0.0)
    assert {"fields", "proposal_networks", "camera_opt"} <= all_methods["diffusionerf-tiny"].optimizers.keys()
    set_step(pipeline, 1)
    sum(step(pipeline)[2].values()).backward()
    gradient = pipeline.model.camera_optimizer.pose_adjustment.grad
    assert gradient is not None
    assert bool((gradient != 0.0).any())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_patches_do_not_move_the_cameras(folders, share):
    """Those that are rendered come from poses that no camera has."""
    options = {"camera_optimizer": CameraOptimizerConfig(mode="SO3xR3"), "share": share}
    pipeline, _ = with_known_prior(folders, **options)
    set_step(pipeline, 1)
    outputs, batch, losses, _ = step(pipeline)
    poses = pipeline.model.camera_optimizer.pose_adjustment
    first = batch["patches"].first_ray
    of_patches = losses["score_loss"] + outputs["rgb"][first:].sum() + outputs["expected_depth"][first:].sum()
    of_patches.backward(retain_graph=True)
    assert poses.grad is None or not bool(poses.grad.any())
    losses["rgb_loss"].backward()
    assert bool(poses.grad.any()), "pixel rays do"


def test_normals_learn_where_they_are_asked_for(folders):
    pipeline = build(folders, predict_normals=True, score_weight=0.0)
    losses = step(pipeline)[2]
    assert {"orientation_loss", "pred_normal_loss"} <= losses.keys()
    sum(losses.values()).backward()
    gradients = [p.grad for p in pipeline.model.field.mlp_pred_normals.parameters()]
    assert any(g is not None and bool((g != 0.0).any()) for g in gradients)
