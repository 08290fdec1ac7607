"""What a model renders: depth in metres, views refined by the prior, what no training view shows filled."""

import copy
import dataclasses
import json
import math

import box_room
import model_steps
import numpy as np
import pytest
import torch
from model_steps import build, callbacks, with_known_prior
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from PIL import Image

from diffusionerf_ns import inspection, surfaces, unseen
from diffusionerf_ns import model as model_module
from diffusionerf_ns.contract import FACTS
from diffusionerf_ns.refine import ViewRefiner

folders, stereo_once = model_steps.folders, model_steps.stereo_once  # fixtures


def view(pipeline: VanillaPipeline) -> dict[str, torch.Tensor]:
    pipeline.eval()
    return pipeline.model.get_outputs_for_camera(pipeline.datamanager.eval_dataset.cameras[:1])


def turned(cameras: Cameras, angle: float) -> Cameras:
    """A copy of the first camera, turned about its upright axis."""
    camera = copy.deepcopy(cameras[:1].to("cpu"))
    turn = torch.tensor(
        [[math.cos(angle), 0.0, math.sin(angle)], [0.0, 1.0, 0.0], [-math.sin(angle), 0.0, math.cos(angle)]]
    )
    camera.camera_to_worlds[0, :, :3] = camera.camera_to_worlds[0, :, :3] @ turn
    return camera


# Where rays begin


def test_rays_of_a_view_nearer_to_the_scene_than_all_training_views_begin_nearer(folders, monkeypatch):
    pipeline = build(folders, fill_unseen=False).eval()
    model, starts = pipeline.model, []
    cameras = pipeline.datamanager.train_dataset.cameras
    depth = [torch.full((int(c.height), int(c.width)), 4.0) for c in unseen.small_cameras(cameras)]
    shown = unseen.ShownSurfaces(unseen.small_cameras(cameras), depth)
    monkeypatch.setattr(model.views.surfaces, "get", lambda announce: shown)
    render = model.get_outputs
    monkeypatch.setattr(model, "get_outputs", lambda rays: starts.append(float(rays.nears.mean())) or render(rays))
    near = copy.deepcopy(cameras[:1])
    near.camera_to_worlds[0, :, 3] -= 3.0 * near.camera_to_worlds[0, :, 2]
    for camera in (cameras[:1], near):
        model.get_outputs_for_camera(camera)
    begin = float(model.collider.bounds[0])
    assert starts[0] == pytest.approx(begin)
    assert 0.1 * begin < starts[-1] < 0.5 * begin


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
    found = dataclasses.replace(metadata[FACTS].stereo, near=2.0, far=5.0)
    metadata[FACTS] = dataclasses.replace(metadata[FACTS], stereo=found)
    model = pipeline.config.model.setup(
        scene_box=pipeline.model.scene_box, num_train_data=4, metadata=metadata, device="cpu"
    )
    fog = {"depth": torch.full((4, 4, 1), 700.0)}  # an untrained field
    near, far = shown[0], shown[1] or float(model.collider.bounds[1])
    assert model.views.depth_colour_range(fog) == pytest.approx((near, far))


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
    norm = camera.generate_rays(camera_indices=0, keep_shape=True).metadata["directions_norm"]
    metres = (outputs["depth"] / norm)[..., 0] / units
    assert values[1]["depth_abs_rel"] == pytest.approx(float(((metres - z).abs() / z).mean()), rel=1e-4)


@pytest.mark.parametrize("known", [0, 1])
def test_test_images_without_true_depth_are_left_out_of_the_means_of_depth(folders, monkeypatch, tmp_path, known):
    monkeypatch.setattr("diffusionerf_ns.lpips.LpipsNetworks.distance", lambda *a: None)  # not asked for here
    folder = box_room.write_transforms(tmp_path / "box")
    content = json.loads((folder / "transforms.json").read_text())
    del content["frames"][1]["depth_file_path"]  # the first test image
    (folder / "transforms.json").write_text(json.dumps(content))
    if not known:
        Image.fromarray(np.zeros((72, 96), dtype=np.uint16)).save(folder / "depth" / "003.png")
    pipeline = build(folders, data=folder, metric_scale=1.0)
    means = pipeline.get_average_eval_image_metrics(get_std=True)
    first, second = means["per_image"]
    assert "depth_abs_rel" not in first
    assert means["psnr"] == pytest.approx(0.5 * (first["psnr"] + second["psnr"]), rel=1e-5)
    if known:
        assert means["depth_abs_rel"] == pytest.approx(second["depth_abs_rel"], rel=1e-5)
    else:
        assert not [name for name in means if name.startswith("depth")]
        assert not [name for name in second if name.startswith("depth")]


def test_deviations_of_one_test_image_are_zero(folders, monkeypatch, tmp_path):
    monkeypatch.setattr("diffusionerf_ns.lpips.LpipsNetworks.distance", lambda *a: None)  # not asked for here
    folder = box_room.write_transforms(tmp_path / "box")
    content = json.loads((folder / "transforms.json").read_text())
    content["test_filenames"] = content["test_filenames"][:1]
    (folder / "transforms.json").write_text(json.dumps(content))
    means = build(folders, data=folder, metric_scale=1.0).get_average_eval_image_metrics(get_std=True)
    deviations = {name: value for name, value in means.items() if name.endswith("_std")}
    assert {"psnr_std", "ssim_std", "depth_abs_rel_std"} <= deviations.keys()
    assert set(deviations.values()) == {0.0}
    json.dumps(means, allow_nan=False)


@pytest.mark.parametrize("asked", [False, True])
def test_metrics_with_fitted_exposure_are_given_where_they_are_asked_for(folders, monkeypatch, asked):
    monkeypatch.setattr("diffusionerf_ns.lpips.LpipsNetworks.distance", lambda *a: None)  # not asked for here
    pipeline = build(folders, metric_scale=1.0, color_corrected_metrics=asked).eval()
    camera, batch = next(iter(pipeline.datamanager.fixed_indices_eval_dataloader))
    batch["image"] = 0.5 * batch["image"]
    outputs = pipeline.model.get_outputs_for_camera(camera)
    values = pipeline.model.get_image_metrics_and_images(outputs, batch)[0]
    assert ({"cc_psnr", "cc_ssim"} <= values.keys()) == asked
    assert not asked or values["cc_psnr"] > values["psnr"]


# Refined views


def test_the_colours_of_a_view_are_the_priors_clean_estimate(folders):
    pipeline, known = with_known_prior(folders, refine_tau=0.07, fill_unseen=False)
    # photographs without any detail: all that a view has is grain
    pipeline.model.views.refiner = ViewRefiner(lambda: known.prior, [(1.0, 0.0)])
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


# Filled views


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
    torch.testing.assert_close(outputs["rgb"][empty], outputs["rgb_rendered"][empty])


def test_a_crop_box_takes_away_what_is_outside_and_nothing_else(folders):
    """nerfstudio gives rays that miss a box an endless distance, and those that meet it no bounds of the scene."""
    pipeline = build(folders, metric_scale=1.0, fill_unseen=False).eval()
    camera = pipeline.datamanager.eval_dataset.cameras[:1]
    plain = pipeline.model.get_outputs_for_camera(camera)
    holds_all = OrientedBox.from_params((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1e4, 1e4, 1e4))
    cropped = pipeline.model.get_outputs_for_camera(camera, obb_box=holds_all)
    for name in ("rgb_rendered", "rgb", "depth", "planar_depth"):
        torch.testing.assert_close(cropped[name], plain[name])
    point = camera.camera_to_worlds[0, :, 3] - 3.0 * camera.camera_to_worlds[0, :, 2]
    part = OrientedBox.from_params(tuple(point.tolist()), (0.0, 0.0, 0.0), (0.4, 0.4, 0.4))
    cropped = pipeline.model.get_outputs_for_camera(camera, obb_box=part)
    outside = cropped["accumulation"][..., 0].abs() < 1e-5
    assert 0.2 < outside.float().mean() < 1.0
    for name in ("rgb_rendered", "rgb", "depth", "planar_depth"):
        assert cropped[name].isfinite().all(), name


def test_what_the_training_views_show_is_rendered_as_after_training_and_the_mode_kept(folders, monkeypatch):
    pipeline = build(folders, score_weight=0.0, refine_tau=0.0).train()
    model, modes = pipeline.model, []
    render = model.get_outputs
    monkeypatch.setattr(model, "get_outputs", lambda rays: modes.append(model.training) or render(rays))
    model.views.surfaces.get()
    assert modes
    assert not any(modes)
    assert model.training


def test_what_the_training_views_show_is_found_once_until_the_field_changes(folders):
    pipeline = build(folders, score_weight=0.0, refine_tau=0.0)
    model, state = pipeline.eval().model, pipeline.state_dict()
    first = model.views.surfaces.get()
    view(pipeline)["rgb"]
    assert model.views.surfaces.get() is first
    for callback in callbacks(pipeline):
        callback.run_callback_at_location(3, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
    second = model.views.surfaces.get()
    assert second is not first
    pipeline.load_pipeline(state, 3)
    assert model.views.surfaces.get() is not second


def test_frusta_are_of_perspective_cameras_alone(folders, monkeypatch):
    """Fisheye and panorama cameras see more than a pinhole's frustum, and would be told that nothing is seen there."""
    assert build(folders).model.frusta is not None
    monkeypatch.setattr(model_module, "are_perspective", lambda cameras: False)
    assert build(folders).model.frusta is None


@pytest.mark.parametrize("reason", ["switched off", "many views", "other cameras", "a viewer beside a training"])
def test_views_are_not_filled(folders, monkeypatch, reason):
    pipeline = build(folders, score_weight=0.0, refine_tau=0.0, fill_unseen=reason != "switched off")
    if reason == "many views":
        monkeypatch.setattr(surfaces, "MAX_VIEWS", 1)
    if reason == "other cameras":
        pipeline.model.metadata[FACTS].cameras.camera_type[:1] = CameraType.FISHEYE.value
    if reason == "a viewer beside a training":
        callbacks(pipeline)
        assert "unseen" in view(pipeline), "an evaluation beside a training is filled"
        monkeypatch.setattr(inspection, "in_viewer", lambda: True)
    assert "unseen" not in view(pipeline)
