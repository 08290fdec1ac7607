"""Outputs on demand: values against closed forms, pictures with fixed colours, and no work that nobody asked for."""

import math
import threading

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.utils import colormaps
from nerfstudio.viewer.render_state_machine import RenderStateMachine

from ddm_training import rgbd
from ddm_training.errors import InputError
from ddm_training.rgbd import RgbdSpec
from ddm_training.unet import make_scheduler
from diffusionerf_ns import inspection
from diffusionerf_ns.prior import PatchPrior

SPEC = RgbdSpec(patch_size=16, focal=40.0, focal_range=(20.0, 50.0), image_size=(64, 48))
POSE = torch.eye(3, 4)


class CountingPrior:
    """A prior whose score is -x (a Gaussian's of unit variance), and how many patches it was shown."""

    def __init__(self, spec: RgbdSpec = SPEC) -> None:
        self.patches: list[torch.Tensor] = []
        abar = make_scheduler().alphas_cumprod

        def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self.patches.extend(x)
            return x * (1.0 - abar[t[0]]).sqrt()

        self.prior = PatchPrior(denoiser, abar, spec)


def camera(height: int, width: int, focal: float = 40.0, pose: torch.Tensor = POSE) -> Cameras:
    return Cameras(pose[None], fx=focal, fy=focal, cx=width / 2, cy=height / 2, width=width, height=height)


def rendered(height: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Outputs as a model gives them, a scene at 1 to 3 units."""
    draw = torch.Generator().manual_seed(seed)
    depth = 1.0 + 2.0 * torch.rand(height, width, 1, generator=draw)
    return {
        "rgb": torch.rand(height, width, 3, generator=draw),
        "accumulation": torch.ones(height, width, 1),
        "depth": depth,
        "expected_depth": depth + 0.1,
        "planar_depth": 2.0 * depth,
    }


def context(known: CountingPrior, **changes) -> inspection.ViewContext:
    """Metric scale 2, depth coloured from 1 to 3 units."""
    values = {
        "near": 1.0,
        "far": 3.0,
        "metric_scale": 2.0,
        "spec": lambda: known.prior.spec,
        "prior": lambda: known.prior,
        "count": lambda points: (points[:, 0] > 0).long() * 2,
        "hidden": lambda points: points[:, 1] < -0.2,
        "tau": 0.1,
    }
    return inspection.ViewContext(**(values | changes))


def view(height: int = 20, width: int = 30, seed: int = 0, cam: Cameras | None = None, **changes):
    prior = CountingPrior()
    ready = rendered(height, width, seed)
    return inspection.view_outputs(ready, cam or camera(height, width), context(prior, **changes)), prior, ready


def test_the_prior_judges_nothing_until_its_output_is_read_and_then_once():
    outputs, prior, _ = view()
    assert {"PriorCleanDepth", "prior_score_depth", "TrainingCameras"} <= set(outputs.keys())
    assert "PriorScoreDepth" in outputs
    for name in ("rgb", "depth", "MedianDepth", "Disparity", "TrainingCameras"):
        outputs[name]
    assert not prior.patches
    outputs["PriorScoreDepth"]
    seen = len(prior.patches)
    assert seen > 0
    outputs["PriorScoreDepth"], outputs["PriorCleanDepth"], outputs["prior_score_colour"]
    assert len(prior.patches) == seen, "one judgement serves all its outputs"


def test_every_output_has_the_shape_of_the_view():
    outputs, _, _ = view()
    for name, value in outputs.items():
        assert value.shape == (20, 30, 3 if name.startswith("rgb") or name in inspection.PICTURES else 1), name
    for name in inspection.PICTURES:
        assert outputs[name].min() >= 0, name
        assert outputs[name].max() <= 1, name


def test_the_tiled_score_of_a_pixelwise_prior_is_the_score_of_every_pixel():
    prior = CountingPrior()
    x = torch.rand(4, 37, 53) * 2 - 1
    score = inspection.tiled_score(x, prior.prior, 0.1, focal=40.0)
    torch.testing.assert_close(score, -x, atol=1e-4, rtol=1e-4)


def test_patches_overlap_and_cover_the_view():
    prior = CountingPrior()
    rows, columns = torch.meshgrid(torch.arange(37.0), torch.arange(53.0), indexing="ij")
    inspection.tiled_score(torch.stack([rows, columns, rows, rows]), prior.prior, 0.1, focal=40.0)
    seen = torch.zeros(37, 53)
    for patch in prior.patches:
        seen[patch[0].long().flatten(), patch[1].long().flatten()] += 1
    assert seen.min() >= 1
    assert len(prior.patches) * 16 * 16 > 1.4 * 37 * 53


@pytest.mark.parametrize(("focal", "side"), [(400.0, 40), (40.0, 400), (10.0, 800)])
def test_a_view_is_judged_at_the_priors_pixel_scale_whatever_its_size(focal, side):
    """Ten times the focal length is ten times the pixels of the same scene: the prior sees as many as before."""
    prior = CountingPrior()
    inspection.tiled_score(torch.rand(4, 400, 400), prior.prior, 0.1, focal=focal)
    expected = math.ceil((side - 16) / 10) + 1
    assert len(prior.patches) == expected**2


def test_a_view_of_one_pixel_has_all_outputs():
    outputs, _, ready = view(1, 1)
    for name, value in outputs.items():
        assert value.shape[:2] == (1, 1), name
        assert value.isfinite().all(), name
    torch.testing.assert_close(
        outputs["prior_score_depth"][0, 0, 0], rgbd.encode_depth(ready["planar_depth"]).abs()[0, 0, 0]
    )


def test_a_view_of_4096_pixels_is_judged_in_parts_of_bounded_size():
    sizes = []

    def count(points: torch.Tensor) -> torch.Tensor:
        sizes.append(len(points))
        return torch.zeros(len(points), dtype=torch.int64)

    outputs, prior, _ = view(96, 4096, cam=camera(96, 4096, focal=4096.0), count=count)
    assert outputs["TrainingCameras"].shape == (96, 4096, 3)
    assert sum(sizes) == 96 * 4096
    assert max(sizes) <= 1 << 18
    assert outputs["PriorCleanDepth"].shape == (96, 4096, 3)
    assert len(prior.patches) < 10


def test_clean_depth_is_the_decoded_clean_estimate_in_metres():
    outputs, prior, ready = view(cam=camera(20, 30))
    sigma = prior.prior.sigma(0.1)
    x = rgbd.encode_depth(ready["planar_depth"][..., 0])
    expected = rgbd.decode_depth(x - sigma**2 * x)
    torch.testing.assert_close(outputs["prior_clean_depth"][..., 0], expected, atol=1e-3, rtol=1e-3)


def test_disparity_is_what_the_prior_sees():
    outputs, _, ready = view()
    torch.testing.assert_close(outputs["disparity"], 0.2 / ready["planar_depth"].clamp_min(0.2))


def test_metres_stay_metres_after_a_raw_rendering_divided_depth_in_place():
    """ns-render dataset divides outputs called depth by the data parser's scale, in place."""
    outputs, _, ready = view()
    z = ready["planar_depth"].clone()
    outputs["planar_depth"].div_(7.0)
    outputs["depth"].div_(7.0)
    torch.testing.assert_close(outputs["z_metres"], z)
    torch.testing.assert_close(outputs["PlanarDepth"], depth_colours(z, 2.0, 6.0))


def depth_colours(depth: torch.Tensor, near: float, far: float) -> torch.Tensor:
    return colormaps.apply_depth_colormap(depth, torch.ones_like(depth), near_plane=near, far_plane=far)


def test_the_same_depth_has_the_same_colour_in_every_view():
    one, _, _ = view(seed=1)
    ready = rendered(20, 30, seed=2)
    ready["depth"][0, 0] = one["depth"][5, 5]
    ready["depth"][1:] = 50.0  # nerfstudio's own colours would be stretched by this
    other = inspection.view_outputs(ready, camera(20, 30), context(CountingPrior()))
    torch.testing.assert_close(other["MedianDepth"][0, 0], one["MedianDepth"][5, 5])
    assert not torch.allclose(one["MedianDepth"][0, 0], one["MedianDepth"][5, 5])


def test_no_picture_has_a_name_that_nerfstudio_takes_for_depth():
    assert not [name for name in inspection.PICTURES if "depth" in name]


def test_the_surface_point_of_a_pixel_is_counted_where_its_median_depth_is():
    """A camera at the origin looking along -z, counting points by the side of x = 0."""
    outputs, _, _ = view()
    count = outputs["training_cameras"][..., 0]
    assert (count[:, :15] == 0).all()
    assert (count[:, 15:] == 2).all()


def test_surface_points_lie_at_the_median_distance_along_the_ray():
    points = []
    outputs, _, ready = view(count=lambda p: (points.append(p), torch.zeros(len(p), dtype=torch.int64))[1])
    outputs["training_cameras"]
    torch.testing.assert_close(torch.cat(points).norm(dim=-1), ready["depth"].flatten())


def test_counts_have_the_colours_of_the_legend():
    count = torch.arange(6).repeat(64, 40)
    picture = inspection.count_picture(count)
    for i in range(6):
        torch.testing.assert_close(picture[40, i], torch.tensor(inspection.COUNT_COLOURS[min(i, 3)]))
    for i, colour in enumerate(inspection.COUNT_COLOURS):
        torch.testing.assert_close(picture[13, 24 * i + 20], torch.tensor(colour), atol=3e-3, rtol=0.0)
    small = inspection.count_picture(torch.zeros(10, 10, dtype=torch.int64))
    assert (small == torch.tensor(inspection.COUNT_COLOURS[0])).all(), "no room for a legend"


def test_without_training_cameras_there_is_no_count():
    outputs, _, _ = view(count=None)
    assert "TrainingCameras" not in outputs
    assert "training_cameras" not in outputs


def right(points: torch.Tensor) -> torch.Tensor:
    return points[:, 0] > 0.0


def test_colours_are_filled_after_they_are_refined_where_no_image_shows_the_surface():
    outputs, _, ready = view(refined=lambda rgb, z, view: 0.5 * rgb, hidden=right)
    torch.testing.assert_close(outputs["rgb"][:, :15], 0.5 * ready["rgb"][:, :15])
    assert outputs["rgb"][:, 15:].max() <= outputs["rgb"][:, :15].max(), "spread from what is refined"
    assert (outputs["rgb"][:, 15:].diff(dim=1).abs() < 0.2).all(), "and smooth"
    assert torch.equal(outputs["rgb_rendered"], ready["rgb"])
    assert torch.equal(outputs["unseen"][..., 0], (torch.arange(30) >= 15).float().expand(20, 30))
    red = outputs["Unseen"][..., 0] > 2.0 * outputs["Unseen"][..., 1]
    assert torch.equal(red, outputs["unseen"][..., 0] > 0)


def test_other_cameras_are_filled_but_not_refined():
    cam = camera(20, 30)
    cam.camera_type[:] = CameraType.FISHEYE.value
    outputs, _, ready = view(cam=cam, refined=lambda rgb, z, view: 0.5 * rgb, hidden=right)
    assert torch.equal(outputs["rgb"][:, :15], ready["rgb"][:, :15])
    assert not torch.equal(outputs["rgb"][:, 15:], ready["rgb"][:, 15:])


@pytest.mark.parametrize("fill_empty", [True, False])
def test_a_background_that_shall_be_seen_is_left_alone(fill_empty):
    ready = rendered(20, 30)
    ready["accumulation"][:10] = 0.0
    prior = CountingPrior()
    outputs = inspection.view_outputs(ready, camera(20, 30), context(prior, hidden=right, fill_empty=fill_empty))
    assert (outputs["unseen"][10:, 15:] == 1.0).all()
    assert (outputs["unseen"][:10, 15:] == float(fill_empty)).all()
    assert torch.equal(outputs["rgb"][:10], ready["rgb"][:10]) != fill_empty


def test_what_is_filled_of_an_object_takes_nothing_of_its_background():
    ready = rendered(20, 30)
    ready["rgb"][:10], ready["rgb"][10:] = 1.0, torch.tensor([0.9, 0.1, 0.1])
    ready["accumulation"][:10] = 0.0
    ready["rgb"][10:, 15:] = 0.0
    known = CountingPrior()
    outputs = inspection.view_outputs(ready, camera(20, 30), context(known, hidden=right, fill_empty=False))
    torch.testing.assert_close(outputs["rgb"][10:], torch.tensor([0.9, 0.1, 0.1]).expand(10, 30, 3))


def test_without_training_views_nothing_is_filled():
    outputs, _, ready = view(hidden=None)
    assert outputs["rgb"] is ready["rgb"]
    assert not {"unseen", "Unseen"} & set(outputs)


def gone():
    raise InputError("no prior 'lost'")


def test_evaluation_goes_on_without_the_prior_and_leaves_its_picture_out(capsys):
    outputs, _, _ = view(spec=gone, prior=gone)
    pictures = inspection.cheap_pictures(outputs)
    assert "Disparity" not in pictures
    assert {"MedianDepth", "ExpectedDepth", "PlanarDepth", "TrainingCameras", "Unseen"} == set(pictures)
    with pytest.raises(InputError, match="lost"):
        outputs["PriorCleanDepth"]


def test_the_verdict_of_another_than_a_perspective_camera_is_refused():
    cam = camera(20, 30)
    cam.camera_type[:] = CameraType.EQUIRECTANGULAR.value
    outputs, _, _ = view(cam=cam)
    with pytest.raises(InputError, match="perspective"):
        outputs["PriorScoreDepth"]


def test_what_is_said_once_keeps_its_square_brackets(capsys):
    for _ in range(2):
        inspection._say_once("no prior 'my [red] prior'")
    assert capsys.readouterr().out.count("'my [red] prior'") == 1


class RenderThread(RenderStateMachine):
    """Runs a function where the viewer would render."""

    def __init__(self, function) -> None:
        threading.Thread.__init__(self)
        self.function = function

    def run(self) -> None:
        self.result = self.function()


def in_render_thread(function):
    thread = RenderThread(function)
    thread.start()
    thread.join()
    return thread.result


def test_the_viewer_lists_pictures_and_still_finds_the_numbers_that_it_composites_with():
    outputs, _, ready = in_render_thread(view)
    assert list(outputs.keys()) == ["rgb", "rgb_rendered", "accumulation", *inspection.PICTURES]
    assert outputs["depth"] is ready["depth"]
    outputs["gl_z_buf_depth"] = ready["depth"]
    assert "gl_z_buf_depth" in outputs
    assert set(outputs.keys()) == {"rgb", "rgb_rendered", "accumulation", *inspection.PICTURES}


def test_a_lost_prior_is_a_grey_picture_in_the_viewer_and_a_message():
    outputs, _, _ = in_render_thread(lambda: view(spec=gone, prior=gone))
    assert (outputs["PriorCleanDepth"] == 0.5).all()


def test_a_range_read_off_a_view_stays_put_until_the_step_has_doubled():
    colours = inspection.DepthRange()
    assert colours.get(False, lambda: (1.0, 2.0), 0) == (1.0, 2.0)
    assert colours.get(False, lambda: (3.0, 4.0), 100) == (1.0, 2.0)
    assert colours.get(False, lambda: (3.0, 4.0), 101) == (3.0, 4.0)
    assert colours.get(False, lambda: (5.0, 6.0), 300) == (3.0, 4.0)
    assert colours.get(True, lambda: (7.0, 8.0), 300) == (7.0, 8.0), "known bounds are taken as they are"
    colours.by_hand = (0.5, 9.0)
    assert colours.get(True, lambda: (7.0, 8.0), 300) == (0.5, 9.0)


def test_a_copy_of_outputs_holds_values_and_not_promises():
    outputs, _, _ = view()
    copy = dict(outputs)
    assert all(isinstance(value, torch.Tensor) for value in copy.values())
    assert outputs.get("nothing") is None
