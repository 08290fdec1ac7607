"""Captures of other shapes than a few cameras side by side: rings, a close-up, a distant view, films, crowds."""

import math

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from test_stereo import FOCAL, HEIGHT, WIDTH, make_cameras, plane_view

from diffusionerf_ns import overlap, stereo
from diffusionerf_ns.views import View

TRIO = [(-0.4, 0.0, 0.0), (0.0, 0.1, 0.1), (0.4, 0.0, 0.0)]


def texture(points: np.ndarray) -> np.ndarray:
    """Smooth noise of fixed waves in space, in [0, 1]."""
    rng = np.random.default_rng(0)
    value = sum(np.sin(points @ (rng.normal(size=3) * 9.0) + rng.uniform(0, 6.3)) for _ in range(30))
    return 0.5 + 0.5 * np.tanh(value / 4.0)


def ball_on_a_ring(count: int, radius: float) -> tuple[Cameras, list[np.ndarray], torch.Tensor]:
    """Cameras at distance 2 all around a ball, in a hollow ball of radius 5; images and true planar depth."""
    v, u = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    local = np.stack([(u - WIDTH / 2) / FOCAL, -(v - HEIGHT / 2) / FOCAL, -np.ones_like(u)], axis=-1)
    poses, images, depths = [], [], []
    for angle in np.arange(count) * 2.0 * math.pi / count:
        back = np.array([math.cos(angle), math.sin(angle), 0.0])
        right = np.array([-math.sin(angle), math.cos(angle), 0.0])
        rotation, position = np.stack([right, [0.0, 0.0, 1.0], back], axis=1), 2.0 * back
        rays = local @ rotation.T
        a, b = (rays**2).sum(-1), rays @ position
        root = [np.sqrt(np.maximum(b * b - a * (4.0 - r * r), 0.0)) for r in (radius, 5.0)]
        hit = b * b - a * (4.0 - radius**2) > 0
        z = np.where(hit, (-b - root[0]) / a, (-b + root[1]) / a)
        grey = texture(position + rays * z[..., None])
        poses.append(np.concatenate([rotation, position[:, None]], axis=1))
        images.append((np.repeat(grey[..., None], 3, -1) * 255).astype(np.uint8))
        depths.append(z)
    cameras = Cameras(
        torch.tensor(np.stack(poses)).float(), FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT,
        camera_type=CameraType.PERSPECTIVE,
    )  # fmt: skip
    return cameras, images, torch.tensor(np.stack(depths)).float()


def test_the_near_side_of_what_cameras_stand_around_is_found():
    """Half of the cameras' largest distance is the centre of the ring, behind all that they see of the ball."""
    cameras, images, true = ball_on_a_ring(9, 0.8)
    views = [View.taken_by(cameras, i, image, WIDTH) for i, image in enumerate(images)]
    centres = cameras.camera_to_worlds[:, :, 3]
    depths = torch.stack(stereo._coarse_depth(views, torch.cdist(centres, centres)))
    known = depths > 0
    error = (depths / true - 1.0).abs()[known]
    assert float(known.float().mean()) > 0.2
    assert float(error.median()) < 0.05
    assert float((error > 0.1).float().mean()) < 0.1


def matched(centres: list[tuple[float, float, float]], depth: float) -> tuple[stereo.MatchedDepth, Cameras]:
    """Of the plane z = - depth."""
    cameras = make_cameras(centres)
    return stereo.match(cameras, [plane_view(c, depth, 0.0)[0] for c in centres], [None] * len(centres)), cameras


def test_a_distant_camera_takes_nothing_from_the_others_and_keeps_its_surfaces():
    found, cameras = matched([*TRIO, (2.0, 0.0, 17.0)], 3.0)
    assert (torch.bincount(found.view, minlength=4)[:3] > 0.3 * HEIGHT * WIDTH).all()
    assert float((found.depth[found.view == 0] / 3.0 - 1.0).abs().median()) < 0.01
    near, far = found.near_far(cameras)
    assert 2.5 < near < 3.1
    assert 19.0 < far < 21.0


def test_rays_of_a_close_up_do_not_begin_behind_its_surface():
    found, cameras = matched([*TRIO, (0.1, 0.0, -2.25)], 3.0)
    near, far = found.near_far(cameras)
    assert near == pytest.approx(0.75, rel=0.1)
    assert far < 3.5


def test_bounds_of_views_alike_are_those_of_all_matches():
    found, cameras = matched(TRIO, 3.0)
    assert found.near_far(cameras) == pytest.approx(np.quantile(found.depth.numpy(), [0.02, 0.98]).tolist())


@pytest.mark.parametrize(("depth", "expected"), [(1.0, 1.0), (1.45, 2.0), (None, 2.0)])
def test_depth_begins_with_what_stands_well_before_the_rest(depth: float | None, expected: float):
    """Something at ``depth`` that 1 % of the pixels show, before a scene that begins at 2."""
    known = torch.linspace(2.0, 4.0, 10_000)
    if depth is not None:
        known[:100] = depth
    assert overlap.near_end(2.0, known) == pytest.approx(expected, rel=0.01)
    assert overlap.near_end(2.0, known[:0]) == 2.0


def test_frames_of_a_film_are_compared_with_those_some_way_off():
    """The four next to a frame are a tenth of a pixel's depth away: any depth looks right."""
    centres = [(0.03 * i, 0.0, 0.0) for i in range(9)]
    found, _ = matched(centres, 2.0)
    assert len(found) > 0.1 * 9 * HEIGHT * WIDTH
    error = (found.depth / 2.0 - 1.0).abs()
    assert float((error > 0.1).float().mean()) < 0.1


def test_three_cameras_close_together_all_keep_their_depth():
    found, _ = matched([(0.2 * i, 0.0, 0.0) for i in (-1, 0, 1)], 3.0)
    assert (torch.bincount(found.view, minlength=3) > 0.3 * HEIGHT * WIDTH).all()
    assert float(((found.depth / 3.0 - 1.0).abs() > 0.1).float().mean()) < 0.1


def test_cameras_that_hardly_move_say_nothing():
    assert len(matched([(0.004 * i, 0.0, 0.0) for i in range(3)], 3.0)[0]) == 0


def test_of_many_images_some_that_are_far_apart_are_matched(monkeypatch):
    monkeypatch.setattr(stereo, "FINE_VIEWS", 3)
    centres = [*TRIO, (-0.39, 0.0, 0.0), (0.39, 0.0, 0.0)]
    found, _ = matched(centres, 3.0)
    pixels = torch.tensor([[i, HEIGHT // 2, WIDTH // 2] for i in range(5)])
    depth, confirmed, error = found.completed.at(pixels, torch.tensor([[HEIGHT, WIDTH]] * 5))
    assert len(set(found.view.tolist())) == 3
    used = depth > 0
    assert int(used.sum()) == 3
    assert not confirmed[~used].any()
    assert error[~used].isinf().all()


def test_cameras_are_chosen_from_everywhere():
    positions = torch.tensor([[x, 0.0, 0.0] for x in (0.0, 0.1, 0.2, 5.0, 5.1, 10.0)])
    assert overlap.farthest_point_sampling(positions, 3) in ([0, 3, 5], [0, 4, 5])
    assert overlap.farthest_point_sampling(positions, 6) == list(range(6))
    twice = torch.cat([positions, positions])  # cameras that turn on the spot
    assert len(set(overlap.farthest_point_sampling(twice, 9))) == 9


def test_neighbours_are_the_nearest_that_are_far_enough_else_the_farthest():
    positions = torch.tensor([[x, 0.0, 0.0] for x in (0.0, 0.1, 1.0, 2.0, 3.0, 4.0, 5.0)])
    distance = torch.cdist(positions, positions)
    found = overlap.neighbours(distance, [0.5, 0.5, 0.5, 9.0, 0.5, 0.5, 0.5])
    assert found[0] == [2, 3, 4, 5]
    assert set(found[3]) == {6, 0, 1, 5}
    assert overlap.neighbours(torch.zeros(2, 2), [0.0, 0.0]) == [[], []]


def test_a_view_has_its_own_range_where_that_of_all_leaves_no_room():
    own = [(2.1, 4.0), None, (0.5, 4.0), (2.0, 9.0)]
    assert overlap.widened(2.0, 5.0, own) == [(2.0, 5.0), (2.0, 5.0), (0.5, 5.0), (2.0, 9.0)]
