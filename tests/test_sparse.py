"""Features matched and triangulated: against a box whose depth is known everywhere, and against exact matches."""

import box_room
import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from nerfstudio.cameras.cameras import Cameras

from diffusionerf_ns import sparse


def nerfstudio_cameras(views: list[box_room.Pinhole], **options: object) -> Cameras:
    first = views[0]
    return Cameras(
        camera_to_worlds=torch.tensor(np.stack([v.c2w for v in views])).float(),
        fx=first.focal,
        fy=first.focal,
        cx=first.width / 2,
        cy=first.height / 2,
        width=first.width,
        height=first.height,
        **options,
    )


@pytest.fixture(scope="module")
def box():
    """Four views of the textured box, and what was triangulated in them."""
    views = box_room.cameras(4, width=128, height=96, focal=88.0)
    cameras = nerfstudio_cameras(views)
    return views, cameras, sparse.triangulate(cameras, [box_room.render(v)[0] for v in views])


def true_depth(views: list[box_room.Pinhole], points: sparse.SparsePoints) -> np.ndarray:
    """Planar depth of the box at each feature, in each of its two views."""
    return np.array(
        [
            [float(box_room.planar_depth(views[v], *at)) for v, at in zip(pair, pixels)]
            for pair, pixels in zip(points.views, points.pixels)
        ]
    )


def test_triangulated_depth_is_the_true_depth_of_the_scene(box):
    views, _, points = box
    assert len(points) > 300
    error = np.abs(points.depth / true_depth(views, points) - 1.0)
    assert np.median(error) < 0.006
    assert np.quantile(error, 0.95) < 0.025


def test_triangulated_points_lie_on_the_walls(box):
    _, _, points = box
    off = np.abs(np.abs(points.xyz) - box_room.HALF).min(axis=1)
    assert np.median(off) < 0.012
    assert np.quantile(off, 0.95) < 0.05


def test_depth_statistics_bracket_the_scene(box):
    views, _, points = box
    near, far, disparity = sparse.depth_statistics(points)
    truth = np.concatenate([box_room.render(v)[1].ravel() for v in views])
    # Features need to be seen by two views, so the statistics are those of the common part.
    assert truth.min() * 0.97 < near < np.quantile(truth, 0.3)
    assert np.quantile(truth, 0.7) < far < truth.max() * 1.03
    assert 1.0 / disparity == pytest.approx(float(np.median(true_depth(views, points))), rel=0.01)


def test_depth_statistics_are_quantiles_of_all_observations():
    n = 50
    depth = np.arange(1.0, 2 * n + 1).reshape(n, 2)
    points = sparse.SparsePoints(np.zeros((n, 3)), np.zeros((n, 2), np.int64), depth, np.zeros((n, 2, 2)))
    near, far, disparity = sparse.depth_statistics(points)
    assert (near, far) == pytest.approx((1 + 0.02 * 99, 1 + 0.98 * 99))
    assert disparity == pytest.approx(1 / 50.5)


def test_too_few_points_have_no_statistics():
    n = sparse.MIN_POINTS - 1
    points = sparse.SparsePoints(np.zeros((n, 3)), np.zeros((n, 2), np.int64), np.ones((n, 2)), np.zeros((n, 2, 2)))
    with pytest.raises(ValueError, match=f"{n} points are too few.*{n + 1}"):
        sparse.depth_statistics(points)


# The two rays of a feature


def project(view: box_room.Pinhole, xyz: np.ndarray) -> np.ndarray:
    """Pixel positions of world points, from the definition of a pinhole."""
    local = (xyz - view.c2w[:, 3]) @ view.c2w[:, :3]
    return np.stack(
        [
            view.width / 2 + view.focal * local[:, 0] / -local[:, 2],
            view.height / 2 - view.focal * local[:, 1] / -local[:, 2],
        ],
        axis=1,
    )


@pytest.fixture(scope="module")
def exact():
    """Two views, points in front of both, and where both see them."""
    views = box_room.cameras(2)
    rng = np.random.default_rng(1)
    xyz = views[0].c2w[:, 3] + 0.3 * rng.normal(size=(40, 3)) - 2.0 * views[0].c2w[:, 2]
    return views, xyz, np.stack([project(v, xyz) for v in views], axis=1)


def test_exact_matches_give_the_points_back(exact):
    views, xyz, pixels = exact
    found, index, depth, kept = sparse._triangulate_pair(nerfstudio_cameras(views), (0, 1), pixels)
    assert len(found) == len(xyz)
    np.testing.assert_allclose(found, xyz, atol=1e-4)
    np.testing.assert_array_equal(index, np.tile([0, 1], (len(xyz), 1)))
    np.testing.assert_array_equal(kept, pixels)
    for i, view in enumerate(views):
        np.testing.assert_allclose(depth[:, i], -((xyz - view.c2w[:, 3]) @ view.c2w[:, 2]), atol=1e-4)


def test_matches_off_the_epipolar_line_are_dropped(exact):
    views, _, pixels = exact
    wrong = pixels.copy()
    wrong[::2, 1, 1] += 3.0  # the cameras stand side by side: epipolar lines are nearly rows
    _, _, _, kept = sparse._triangulate_pair(nerfstudio_cameras(views), (0, 1), wrong)
    np.testing.assert_array_equal(kept, pixels[1::2])


def test_rays_that_meet_behind_the_cameras_are_dropped(exact):
    views, _, pixels = exact
    crossed = pixels.copy()
    crossed[:, 0, 0] -= 80.0
    crossed[:, 1, 0] += 80.0
    found, *_ = sparse._triangulate_pair(nerfstudio_cameras(views), (0, 1), crossed)
    assert len(found) == 0


def test_nearly_parallel_rays_are_dropped(exact):
    """From 1 metre apart, 0.02 radians are 50 metres away."""
    views, _, _ = exact
    axis = -views[0].c2w[:, 2]
    xyz = views[0].c2w[:, 3] + np.array([[10.0], [30.0], [100.0], [300.0]]) * axis
    pixels = np.stack([project(v, xyz) for v in views], axis=1)
    found, *_ = sparse._triangulate_pair(nerfstudio_cameras(views), (0, 1), pixels)
    np.testing.assert_allclose(found, xyz[:2], rtol=1e-3, atol=1e-2)


def test_lens_distortion_is_undone(exact):
    views, xyz, pixels = exact
    first = views[0]
    middle = np.array([first.width, first.height]) / 2
    flat = (pixels - middle) / first.focal
    k1 = 0.1
    bent = flat * (1.0 + k1 * (flat**2).sum(-1, keepdims=True)) * first.focal + middle
    cameras = nerfstudio_cameras(views, distortion_params=torch.tensor([[k1, 0.0, 0.0, 0.0, 0.0, 0.0]] * 2))
    found, *_ = sparse._triangulate_pair(cameras, (0, 1), bent)
    assert len(found) == len(xyz)
    np.testing.assert_allclose(found, xyz, atol=2e-3)
    straight, *_ = sparse._triangulate_pair(nerfstudio_cameras(views), (0, 1), bent)
    assert len(straight) < len(xyz) or np.abs(straight - xyz).max() > 0.01, "the distortion matters here"


# Which views are matched


def test_few_views_are_all_matched_with_each_other():
    centres = np.random.default_rng(0).normal(size=(sparse.NEIGHBOURS + 1, 3))
    n = len(centres)
    assert sparse._pairs(centres) == [(i, j) for i in range(n) for j in range(i + 1, n)]


def test_many_views_are_matched_with_their_nearest_only():
    centres = np.stack([np.arange(40.0) ** 1.1, np.zeros(40), np.zeros(40)], axis=1)
    pairs = sparse._pairs(centres)
    assert len(pairs) == len(set(pairs)) <= 40 * sparse.NEIGHBOURS
    assert all(i < j for i, j in pairs)
    for i in range(40):
        others = sorted((j for j in range(40) if j != i), key=lambda j: abs(centres[i, 0] - centres[j, 0]))
        for j in others[: sparse.NEIGHBOURS]:
            assert (min(i, j), max(i, j)) in pairs


def test_views_at_the_same_place_do_not_match_themselves():
    assert sparse._pairs(np.zeros((3, 3))) == [(0, 1), (0, 2), (1, 2)]
    assert sparse._pairs(np.zeros((1, 3))) == []


# Nothing to be found


def test_images_without_texture_give_no_points():
    views = box_room.cameras(2)
    empty = sparse.triangulate(nerfstudio_cameras(views), [np.full((72, 96, 3), 128, np.uint8)] * 2)
    assert len(empty) == 0
    assert empty.depth.shape == (0, 2)
    assert empty.pixels.shape == (0, 2, 2)


def test_images_of_different_places_give_hardly_any_points(box):
    """The ratio test and the poses leave next to nothing of them."""
    _, cameras, points = box
    noise = [np.random.default_rng(i).integers(0, 256, (96, 128, 3), dtype=np.uint8) for i in range(4)]
    assert len(sparse.triangulate(cameras, noise)) < 0.03 * len(points)


def test_an_image_that_is_not_rgb_bytes_is_refused(box):
    _, cameras, _ = box
    with pytest.raises(TypeCheckError):
        sparse.triangulate(cameras, [np.zeros((96, 128), np.uint8)] * 4)
    with pytest.raises(TypeCheckError):
        sparse.triangulate(cameras, [np.zeros((96, 128, 3), np.float32)] * 4)


# As rays


def test_rays_of_points_end_at_the_points(box):
    _, cameras, points = box
    rays = sparse.rays_of(points, cameras)
    assert len(rays.distance) == 2 * len(points)
    ends = rays.bundle.origins + rays.distance[:, None] * rays.bundle.directions
    off = (ends - torch.from_numpy(points.xyz).float().repeat_interleave(2, 0)).norm(dim=-1)
    # A ray passes through its feature, the point is the middle between two such rays: within the accepted error.
    accepted = sparse.MAX_ERROR * 128 / 1000 / 88.0 * rays.distance
    assert bool((off <= 1.5 * accepted).all())
    assert off.median() < 0.005


def test_rays_of_points_know_their_cosine_and_their_camera(box):
    _, cameras, points = box
    rays = sparse.rays_of(points, cameras)
    planar = rays.distance / rays.bundle.metadata["directions_norm"][:, 0]
    torch.testing.assert_close(planar, torch.from_numpy(points.depth.reshape(-1)).float(), rtol=2e-3, atol=2e-3)
    expected = cameras.camera_to_worlds[torch.from_numpy(points.views.reshape(-1)), :, 3]
    torch.testing.assert_close(rays.bundle.origins, expected)
