"""What a model is built with and what its checkpoint holds: metric scale, bounds of rays, nothing of the prior."""

import copy
import dataclasses
import math
from typing import Any

import model_steps
import pytest
import torch
from model_steps import RAYS, SCORE_ALONE, TERMS_OFF, P, build, set_step, step, tie
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.callbacks import TrainingCallbackLocation

from ddm_training.errors import InputError
from diffusionerf_ns.bounds import StereoBounds
from diffusionerf_ns.contract import FACTS

folders, stereo_once = model_steps.folders, model_steps.stereo_once  # fixtures


# Metric scale


def test_a_scale_that_is_given_wins(folders):
    assert float(build(folders, metric_scale=0.37).model.metric_scale) == pytest.approx(0.37)


def test_stereo_puts_the_scene_at_the_depth_that_the_prior_knows(folders):
    pipeline = build(folders)
    found = pipeline.datamanager.train_dataset.metadata[FACTS].stereo
    # Disparity in metres is that in scene units divided by metres per unit; the prior's median is 0.45.
    assert found.median_disparity / float(pipeline.model.metric_scale) == pytest.approx(0.45)


def test_without_bounds_and_stereo_the_scale_is_read_off_the_rendered_depth(folders):
    options: dict[str, Any] = SCORE_ALONE | {"metric_scale_warmup": 0.2}
    pipeline = build(folders, **options)
    pipeline.model.set_metric_scale(math.nan)
    set_step(pipeline, 19)
    assert len(step(pipeline)[0]["rgb"]) == RAYS
    assert pipeline.model.metric_scale.isnan()
    set_step(pipeline, 20)
    outputs = step(pipeline)[0]
    assert len(outputs["rgb"]) == RAYS, "the first patch comes a step later"
    disparity = float((1 / outputs["depth"]).median())
    assert float(pipeline.model.metric_scale) == pytest.approx(disparity / 0.45, rel=1e-5)
    assert len(step(pipeline)[0]["rgb"]) == RAYS + P * P


# Checkpoints of other modules


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        ("field.table", "field.tcnn_encoding.params", "was trained with tinycudann, which is not used here"),
        ("field.tcnn_encoding.params", "field.table", "was trained without tinycudann, which is used here"),
        ("field.table", "field.other", "lacks 1 of the model's parameters, field.table among them"),
    ],
)
def test_a_checkpoint_without_a_parameter_of_the_model_is_refused(folders, here, there, words):
    """nerfstudio would load what fits and leave the rest as it was drawn."""
    pipeline = build(folders)
    state = pipeline.state_dict()
    owner, name = ("_model." + here).rsplit(".", 1)
    parent = pipeline.model.field
    if owner.endswith("tcnn_encoding"):
        parent.tcnn_encoding = torch.nn.Module()
        parent = parent.tcnn_encoding
    parent.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(InputError, match=words):
        pipeline.load_pipeline(state | {f"_model.{there}": torch.zeros(2)}, 7)
    pipeline.load_pipeline({f"module.{key}": value for key, value in pipeline.state_dict().items()}, 7)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("field.embedding_appearance.embedding.weight", r"embeddings of 5 images, but here are 4 .*Give --num-views"),
        ("field.mlp_base.2.layers.0.weight", r"is \[.*\] in the checkpoint and \[.*\] here: .*config\.yml"),
    ],
)
def test_a_parameter_of_another_shape_is_refused_with_what_to_give(folders, name, words):
    """torch would say it in its own words."""
    pipeline = build(folders, use_appearance_embedding=True)
    state = pipeline.state_dict()
    value = state[f"_model.{name}"]
    with pytest.raises(InputError, match=words):
        pipeline.load_pipeline(state | {f"_model.{name}": torch.cat([value, value[:1]])}, 7)
    pipeline.load_pipeline(state, 7)


def test_poses_of_another_number_of_images_are_refused_with_both(folders):
    pipeline = build(folders, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    state = pipeline.state_dict()
    name = "_model.camera_optimizer.pose_adjustment"
    here = len(state[name])
    words = f"has the poses of {here + 1} images, but here are {here} to train on. Give --num-views.*split.json"
    with pytest.raises(InputError, match=words):
        pipeline.load_pipeline(state | {name: torch.zeros(here + 1, 6)}, 7)
    pipeline.load_pipeline(state, 7)


def test_a_training_without_the_poses_that_were_learnt_is_refused_but_not_a_look_at_them(folders):
    """nerfstudio's trainer would stop at the optimiser of the poses, with a KeyError."""
    pipeline = build(folders)
    state = pipeline.state_dict() | {"_model.camera_optimizer.pose_adjustment": torch.zeros(3, 6)}
    with pytest.raises(InputError, match=r"poses of 3 images, but here it is off. Give .*camera-optimizer\.mode"):
        pipeline.load_pipeline(state, 7)
    pipeline.test_mode = "test"
    pipeline.load_pipeline(state, 7)


def test_a_scale_given_by_hand_wins_over_that_of_the_run_that_is_resumed(folders):
    state = build(folders, metric_scale=1.0).state_dict()
    for given, kept in ((2.0, 2.0), (None, 1.0)):
        pipeline = build(folders, metric_scale=given)
        pipeline.load_pipeline(state, 7)
        assert float(pipeline.model.metric_scale) == kept


# Bounds of rays


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e4])
def test_rays_of_a_scene_in_any_unit_hold_what_stereo_found(unit):
    config = all_methods["diffusionerf-tiny"].pipeline.model
    found = StereoBounds(2.0 * unit, 7.0 * unit, 1.0 / (4.0 * unit), centre=(0.0, 0.0, 0.0), radius=unit)
    assert config.ray_bounds(None, None, found) == pytest.approx((0.6 * 2.0 * unit, 3.0 * 7.0 * unit))
    assert config.ray_bounds(None, None, None) == (0.05, 1000.0)
    by_hand = dataclasses.replace(config, near_plane=1.5 * unit, far_plane=8.0 * unit)
    assert by_hand.ray_bounds(None, None, found) == pytest.approx((1.5 * unit, 8.0 * unit))
    assert by_hand.ray_bounds(0.5 * unit, 20.0 * unit, found) == pytest.approx((1.5 * unit, 8.0 * unit))
    assert by_hand.ray_bounds(4.0 * unit, 5.0 * unit, None) == pytest.approx((3.0 * unit, 6.25 * unit))
    assert config.ray_bounds(4.0 * unit, 5.0 * unit, None, 1.5)[1] == pytest.approx(7.5 * unit)
    with pytest.raises(InputError, match=r"begin at .* and end at"):
        config.ray_bounds(9.0 * unit, 1.0 * unit, None)


@pytest.mark.parametrize(("name", "value"), [("patch_size", 20), ("view_degrees", 7), ("patch_every", 0)])
def test_options_that_no_step_could_use_are_refused_before_the_first(name, value):
    config = all_methods["diffusionerf-tiny"].pipeline.model
    with pytest.raises(InputError, match=f"--pipeline.model.{name.replace('_', '-')} must be .*found {value}"):
        dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
    ("near", "far", "begin", "end"),
    [
        (None, None, 0.6 * 2.0, 3.0 * 7.0),
        (1.0, 10.0, 0.6 * 2.0, 1.3 * 10.0),
        (4.0, 10.0, 0.75 * 4.0, 1.3 * 10.0),
        (0.1, 1.0, 0.75 * 0.1, 1.3),  # stereo finds everything behind the far bound: one of them is wrong
    ],
)
def test_rays_begin_at_the_farther_of_what_the_capture_and_stereo_say_and_end_where_one_says(
    folders, near, far, begin, end
):
    pipeline = build(folders, far_margin=1.3)
    metadata = dict(pipeline.datamanager.train_dataset.metadata)
    metadata[FACTS].cameras.fx *= 2.0  # no corner of whose images is so far aside
    metadata[FACTS].cameras.fy *= 2.0
    found = dataclasses.replace(metadata[FACTS].stereo, near=2.0, far=7.0)
    metadata[FACTS] = dataclasses.replace(metadata[FACTS], stereo=found)
    metadata |= {} if near is None else {"near": near, "far": far}
    model = pipeline.config.model.setup(
        scene_box=pipeline.model.scene_box, num_train_data=4, metadata=metadata, device="cpu"
    )
    assert model.collider.bounds.tolist() == pytest.approx([begin, end])


def test_a_colour_network_that_died_begins_anew(folders, capsys):
    """Its sigmoid is so far out that no gradient comes back, and all that is opaque is black."""
    pipeline = build(folders, score_weight=0.0, average_init_density=100.0)
    model = pipeline.model
    before_step = model_steps.callbacks(pipeline)
    layers = [m for m in model.field.mlp_head.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        layers[-1].weight.zero_()
        layers[-1].bias.fill_(-60.0)
    for number in (49, 50):
        for callback in before_step:
            callback.run_callback_at_location(number, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        outputs, _, losses, _ = step(pipeline)
        sum(losses.values()).backward()
        died = float(outputs["rgb"].amax()) < 0.01
        assert died == (number == 49)
        assert ("begins anew" in " ".join(capsys.readouterr().out.split())) == (number == 50)


# The prior and the field


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


def test_a_prior_that_is_missing_is_refused_before_the_first_step_whatever_it_is_for(folders):
    with pytest.raises(InputError, match="no-such-prior"):
        build(folders, prior="no-such-prior", score_weight=0.0, refine_tau=0.07, completion="membrane")
    with pytest.raises(InputError, match="no-such-prior"):
        build(folders, prior="no-such-prior", score_weight=0.0, refine_tau=0.0)
    build(folders, prior="no-such-prior", score_weight=0.0, refine_tau=0.0, completion="membrane")


def test_a_run_without_a_gpu_says_once_that_tinycudann_is_not_used(folders, capsys):
    build(folders, implementation="tcnn", **TERMS_OFF)
    assert capsys.readouterr().out.count("Hash grids run in plain torch") == 1


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


def test_a_resumed_run_ends_its_schedules_where_the_whole_run_does(folders):
    pipeline = build(folders, **TERMS_OFF)
    tie(pipeline, 600, start=400)
    assert pipeline.model.total_steps == 1000
