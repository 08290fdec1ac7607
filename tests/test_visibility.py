"""Frustum counts against a plain loop over points and cameras."""

import itertools
import math

import pytest
import torch
from jaxtyping import TypeCheckError
from nerfstudio.cameras.camera_utils import radial_and_tangential_undistort
from nerfstudio.cameras.cameras import Cameras

from diffusionerf_ns.patches import random_rotation
from diffusionerf_ns.visibility import Projections, TrainingFrusta, distort, largest_slant

NEAR = 0.3


def random_cameras(count: int, generator: torch.Generator) -> Cameras:
    """Cameras anywhere in a cube, looking anywhere, with unequal focal lengths and principal points off the centre."""
    poses = [
        torch.cat([random_rotation(math.pi, generator), 2.0 * torch.rand(3, 1, generator=generator) - 1.0], dim=1)
        for _ in range(count)
    ]
    draw = lambda low, high: low + (high - low) * torch.rand(count, 1, generator=generator)  # noqa: E731
    return Cameras(
        camera_to_worlds=torch.stack(poses),
        fx=draw(40.0, 120.0),
        fy=draw(40.0, 120.0),
        cx=draw(30.0, 60.0),
        cy=draw(20.0, 50.0),
        width=torch.randint(80, 120, (count, 1), generator=generator),
        height=torch.randint(50, 90, (count, 1), generator=generator),
    )


def is_seen(point: list[float], cameras: Cameras, index: int, near: float) -> tuple[bool, float]:
    """Projects one point with plain numbers: whether it is seen, and its planar depth."""
    pose = cameras.camera_to_worlds[index].tolist()
    offset = [point[k] - pose[k][3] for k in range(3)]
    x, y, backwards = (sum(pose[k][axis] * offset[k] for k in range(3)) for axis in range(3))
    depth = -backwards
    if depth < near:
        return False, depth
    u = float(cameras.cx[index]) + float(cameras.fx[index]) * x / depth
    v = float(cameras.cy[index]) - float(cameras.fy[index]) * y / depth
    return 0 <= u <= int(cameras.width[index]) and 0 <= v <= int(cameras.height[index]), depth


def test_counts_equal_those_of_a_plain_loop_also_behind_the_cameras_and_nearer_than_near():
    generator = torch.Generator().manual_seed(0)
    cameras = random_cameras(5, generator)
    near_points = 4.0 * torch.rand(1200, 3, generator=generator) - 2.0
    # Points on the optical axes at depths around zero and around near: behind, too near, and seen.
    axis_points = torch.cat(
        [
            (cameras.camera_to_worlds[:, :, 3] - depth * cameras.camera_to_worlds[:, :, 2])
            for depth in (-2.0, -0.29, -0.01, 0.01, 0.29, 0.31, 2.0)
        ]
    )
    points = torch.cat([near_points, axis_points])

    expected, behind, too_near = [], 0, 0
    for point in points.tolist():
        seen = [is_seen(point, cameras, index, NEAR) for index in range(len(cameras))]
        expected.append(sum(s for s, _ in seen))
        behind += sum(depth < 0 for _, depth in seen)
        too_near += sum(0 <= depth < NEAR for _, depth in seen)
    assert behind > 100
    assert too_near > 100
    assert len(set(expected)) >= 4, "the test sees many counts"
    assert TrainingFrusta(cameras).count(points, near=NEAR).tolist() == expected


def test_counts_keep_the_batch_shape_and_are_integers():
    frusta = TrainingFrusta(random_cameras(3, torch.Generator().manual_seed(1)))
    points = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    counts = frusta.count(points, near=NEAR)
    assert counts.shape == (7, 5)
    assert counts.dtype == torch.int64
    assert torch.equal(counts.reshape(-1), frusta.count(points.reshape(-1, 3), near=NEAR))
    assert len(frusta) == 3


def test_points_just_inside_the_corner_pixels_are_seen_and_just_outside_are_not():
    cameras = random_cameras(1, torch.Generator().manual_seed(3))
    frusta = TrainingFrusta(cameras)
    height, width = float(cameras.height[0]), float(cameras.width[0])
    for margin, expected in ((0.05, 1), (-0.05, 0)):
        corners = [(v, u) for v in (margin, height - margin) for u in (margin, width - margin)]
        rays = cameras.generate_rays(torch.zeros(4, 1, dtype=torch.int64), coords=torch.tensor(corners))
        assert frusta.count(rays.origins + 3.0 * rays.directions, near=NEAR).tolist() == [expected] * 4


LENS = [-0.1, 0.02, 0.01, -0.01, 0.01, -0.02]


def lens_cameras(count: int, seed: int) -> Cameras:
    cameras = random_cameras(count, torch.Generator().manual_seed(seed))
    # Narrower, as the polynomial of this lens folds back far off the axis.
    cameras.fx, cameras.fy = 3.0 * cameras.fx, 3.0 * cameras.fy
    cameras.distortion_params = torch.tensor(LENS).expand(count, 6)
    return cameras


def test_a_frustum_behind_a_lens_ends_where_the_image_does():
    """nerfstudio's rays through the image's border go through what a lens makes of the frustum."""
    cameras = lens_cameras(1, seed=3)
    frusta = TrainingFrusta(cameras)
    cameras.distortion_params, lens = None, cameras.distortion_params
    pinhole = TrainingFrusta(cameras)
    cameras.distortion_params = lens
    height, width = float(cameras.height[0]), float(cameras.width[0])
    along = torch.linspace(0.0, 1.0, 11)[:, None]
    for margin, expected in ((0.1, 1), (-0.1, 0)):
        ends = torch.tensor([[margin, margin], [margin, width - margin], [height - margin, width - margin]])
        ends = torch.cat([ends, torch.tensor([[height - margin, margin], [margin, margin]])])
        coords = torch.cat([a + along * (b - a) for a, b in itertools.pairwise(ends)])
        rays = cameras.generate_rays(torch.zeros(len(coords), 1, dtype=torch.int64), coords=coords)
        points = rays.origins + 3.0 * rays.directions
        assert frusta.count(points, near=NEAR).tolist() == [expected] * len(coords)
        if expected == 0:
            assert pinhole.count(points, near=NEAR).any(), "without the lens some of them would be seen"


@pytest.mark.parametrize("lens", [[-0.15, 0.0, 0.0, 0.0, 0.0, 0.0], [-0.25, 0.0, 0.0, 0.0, 0.0, 0.0]])
@pytest.mark.parametrize("focal", [500.0, 700.0])
def test_what_a_lens_folds_back_into_the_image_is_not_seen(lens, focal):
    """Far off the axis the polynomial comes back; that of the second lens never reaches the corners of its image."""
    cameras = Cameras(
        torch.eye(3, 4)[None], focal, focal, 500.0, 375.0, 1000, 750, distortion_params=torch.tensor([lens])
    )
    angle = torch.linspace(0.0, 2.0 * math.pi, 60)
    slope = torch.linspace(1.6, 4.0, 40)[:, None, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
    pixel = focal * distort(slope, torch.tensor(lens)) + torch.tensor([500.0, 375.0])
    folded = ((pixel > 0) & (pixel < torch.tensor([1000.0, 750.0]))).all(dim=-1)
    assert folded.sum() > 50
    points = torch.cat([slope, torch.full_like(slope[..., :1], -1.0)], dim=-1)
    assert not TrainingFrusta(cameras).count(points, near=0.1).any()
    ahead = torch.tensor([[0.0, 0.0, -1.0], [0.3, 0.2, -1.0]])
    assert TrainingFrusta(cameras).count(ahead, near=0.1).tolist() == [1, 1]


@pytest.mark.parametrize("lens", [False, True])
def test_the_point_along_a_pixels_ray_is_projected_into_that_pixel(lens):
    cameras = lens_cameras(2, seed=6) if lens else random_cameras(2, torch.Generator().manual_seed(6))
    projections = Projections(cameras)
    for index in range(2):
        size = torch.tensor([int(cameras.height[index]), int(cameras.width[index])])
        coords = torch.rand(200, 2, generator=torch.Generator().manual_seed(7)) * size
        rays = cameras.generate_rays(torch.full((200, 1), index), coords=coords)
        planar = torch.linspace(0.5, 9.0, 200)
        points = rays.origins + rays.directions * (planar[:, None] * rays.metadata["directions_norm"])
        pixel, z, inside = projections(index, points)
        torch.testing.assert_close(pixel.flip(-1), coords, atol=0.02, rtol=0.0)
        torch.testing.assert_close(z, planar, atol=1e-4, rtol=1e-4)
        assert inside.all()


def test_a_lens_that_bends_nothing_is_none():
    cameras = random_cameras(2, torch.Generator().manual_seed(8))
    cameras.distortion_params = torch.zeros(2, 6)
    assert Projections(cameras).lens is None
    assert Projections(lens_cameras(2, seed=8)).lens is not None


def test_distortion_undoes_what_nerfstudio_undistorts():
    slope = 0.5 * (2.0 * torch.rand(200, 2) - 1.0)
    lens = torch.tensor([-0.1, 0.02, 0.01, -0.01, 0.01, -0.02])
    there = radial_and_tangential_undistort(slope, lens.expand(200, 6), max_iterations=50)
    torch.testing.assert_close(distort(there, lens), slope, atol=1e-5, rtol=0.0)


def test_the_largest_slant_is_that_of_the_farthest_corner_of_any_image():
    poses = torch.eye(3, 4).repeat(2, 1, 1)
    cameras = Cameras(poses, fx=torch.tensor([[60.0], [90.0]]), fy=60.0, cx=40.0, cy=20.0, width=100, height=50)
    assert largest_slant(cameras) == pytest.approx(math.sqrt(1 + (59.5 / 60) ** 2 + (29.5 / 60) ** 2))


def test_near_is_a_planar_depth():
    """At the image's corner a point may be further away than near, and still lie before the near plane."""
    cameras = Cameras(torch.eye(3, 4)[None], fx=50.0, fy=50.0, cx=50.0, cy=50.0, width=100, height=100)
    frusta = TrainingFrusta(cameras)
    points = torch.tensor([[0.9, 0.9, -0.99], [0.9, 0.9, -1.01]])
    assert points.norm(dim=-1).min() > 1.5
    assert frusta.count(points, near=1.0).tolist() == [0, 1]


def test_frusta_leave_nothing_in_a_checkpoint():
    assert not TrainingFrusta(random_cameras(2, torch.Generator().manual_seed(4))).state_dict()


def test_points_of_another_dimension_raise():
    frusta = TrainingFrusta(random_cameras(1, torch.Generator().manual_seed(5)))
    with pytest.raises(TypeCheckError):
        frusta.count(torch.zeros(4, 2), near=NEAR)
    with pytest.raises(TypeCheckError):
        frusta.count(torch.zeros(4, 3, dtype=torch.int64), near=NEAR)
