"""What no training image shows: found in a box whose depth is known, and filled smoothly."""

import numpy as np
import pytest
import torch
from box_room import HALF, Pinhole, cameras, look_at, planar_depth
from nerfstudio.cameras.cameras import Cameras

from diffusionerf_ns import unseen


def ns_cameras(pinholes: list[Pinhole], **options: torch.Tensor) -> Cameras:
    first = pinholes[0]
    return Cameras(
        torch.tensor(np.stack([p.c2w for p in pinholes]), dtype=torch.float32),
        fx=first.focal,
        fy=first.focal,
        cx=first.width / 2,
        cy=first.height / 2,
        width=first.width,
        height=first.height,
        **options,
    )


def pixel_centres(camera: Pinhole) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    return u, v


def surface(camera: Pinhole, pillar: bool = False) -> np.ndarray:
    """The point that each pixel shows: of the walls, or of a pillar's front, a piece of the plane y = 0.6."""
    u, v = pixel_centres(camera)
    z, directions = planar_depth(camera, u, v), camera.directions(u, v)
    if pillar:
        to_plane = (0.6 - camera.c2w[1, 3]) / np.where(directions[..., 1] > 1e-6, directions[..., 1], np.inf)
        at = camera.c2w[:, 3] + to_plane[..., None] * directions
        z = np.where((to_plane > 0) & (np.abs(at[..., 0] - 0.5) < 0.3) & (to_plane < z), to_plane, z)
    return camera.c2w[:, 3] + z[..., None] * directions


def shown_by(train: list[Pinhole], pillar: bool = False) -> unseen.ShownSurfaces:
    depth = []
    for camera in train:
        local = (surface(camera, pillar) - camera.c2w[:, 3]) @ camera.c2w[:, :3]
        depth.append(torch.tensor(-local[..., 2], dtype=torch.float32))
    return unseen.ShownSurfaces(ns_cameras(train), depth)


def show(shown: unseen.ShownSurfaces, points: np.ndarray) -> np.ndarray:
    flat = torch.tensor(points.reshape(-1, 3), dtype=torch.float32)
    return ~shown.hide(flat).numpy().reshape(points.shape[:-1])


def test_a_view_that_trains_shows_all_that_it_shows():
    train = cameras(3)
    shown = shown_by(train)
    for camera in train:
        assert show(shown, surface(camera)).all()


def test_what_is_beside_or_behind_every_training_view_is_not_shown():
    train = cameras(3)
    away = Pinhole(c2w=look_at((0.0, -0.9, 0.0), (-1.5, -1.5, 0.0)))
    assert not show(shown_by(train), surface(away)).any()


def test_a_wall_behind_a_pillar_is_not_shown_and_before_it_everything_is():
    train = [Pinhole(c2w=look_at((0.5, -0.9, 0.0), (0.5, 1.5, 0.0)))]
    shown = shown_by(train, pillar=True)
    wall = np.array([[x, HALF[1], 0.0] for x in (0.5, 0.6, 1.4)])
    np.testing.assert_array_equal(show(shown, wall), [False, False, True])
    np.testing.assert_array_equal(show(shown, wall * [1.0, 0.3, 1.0]), True)


def test_a_point_a_little_behind_the_surface_is_let_pass():
    train = [Pinhole(c2w=look_at((0.0, -0.9, 0.0), (0.0, 1.5, 0.0)))]
    distance = HALF[1] + 0.9
    behind = np.array([[0.0, -0.9 + distance * (1 + share), 0.0] for share in (0.03, 0.07)])
    np.testing.assert_array_equal(show(shown_by(train), behind), [True, False])


def test_nothing_is_behind_a_view_that_meets_nothing_and_no_point_is_none():
    train = [Pinhole(c2w=look_at((0.0, -0.9, 0.0), (0.0, 1.5, 0.0)))]
    shown = unseen.ShownSurfaces(ns_cameras(train), [torch.full((72, 96), torch.inf)])
    assert show(shown, np.array([[0.0, 1e5, 0.0]])).all()
    assert not show(shown, np.array([[0.0, -1e5, 0.0]])).any()
    assert not shown.hide(torch.tensor([[torch.nan, 0.0, 0.0], [torch.inf, -5.0, 0.0]])).any()


def facing(y: float, towards: float = 1.5) -> Pinhole:
    """A camera that faces the wall at y = 1.5, or turns its back to it."""
    return Pinhole(c2w=look_at((0.0, y, 0.0), (0.0, towards, 0.0)))


def test_a_view_is_nearer_by_its_distance_to_what_training_views_show():
    train = [facing(0.0), facing(-0.5)]  # 1.5 and 2 away from the wall
    shown = unseen.ShownSurfaces(ns_cameras(train), [torch.full((72, 96), 1.5), torch.full((72, 96), 2.0)])
    nearer = lambda camera: shown.nearer(ns_cameras([camera]))  # noqa: E731
    assert nearer(facing(0.9)) == pytest.approx(0.6 / 1.5, rel=1e-2)
    assert nearer(facing(0.0)) == 1.0
    assert nearer(facing(-0.7)) == 1.0
    assert nearer(facing(0.9, towards=-1.5)) == 1.0, "nothing known is ahead"


def test_views_are_as_near_as_training_views_where_these_meet_nothing():
    shown = unseen.ShownSurfaces(ns_cameras([facing(0.0)]), [torch.full((72, 96), torch.inf)])
    assert shown.nearer(ns_cameras([facing(0.9)])) == 1.0


@pytest.mark.parametrize("k1", [-0.1, 0.15])
def test_a_view_through_a_lens_shows_its_own_pixels_and_nothing_beyond(k1):
    lens = torch.tensor([[k1, 0.02, 0.0, 0.0, 0.01, -0.01]])
    cameras = ns_cameras([Pinhole(c2w=look_at((0.0, -0.9, 0.0), (0.0, 1.5, 0.0)))], distortion_params=lens)
    shown = unseen.ShownSurfaces(cameras, [torch.full((72, 96), torch.inf)])
    rays = cameras.generate_rays(camera_indices=0)
    assert not shown.hide((rays.origins + 2.0 * rays.directions).reshape(-1, 3)).any()
    beyond = torch.tensor([[-3.0, 36.0], [75.0, 48.0], [36.0, -3.0], [36.0, 99.0]])  # rows and columns
    rays = cameras.generate_rays(camera_indices=0, coords=beyond)
    assert shown.hide(rays.origins + 2.0 * rays.directions).all()


def test_small_cameras_show_what_the_cameras_show_in_fewer_pixels():
    lens = torch.tensor([[0.1, 0.0, 0.0, 0.0, 0.0, 0.0]]).expand(2, 6)
    large = [Pinhole(c2w=camera.c2w, width=960, height=720, focal=660.0) for camera in cameras(2)]
    large = ns_cameras(large, distortion_params=lens)
    small = unseen.small_cameras(large)
    assert small.width.tolist() == [[128], [128]]
    assert small.height.tolist() == [[96], [96]]
    torch.testing.assert_close(small.distortion_params, lens)
    torch.testing.assert_close(small.fx, torch.full((2, 1), 88.0))
    torch.testing.assert_close(small.cx, torch.full((2, 1), 64.0))
    assert large.width.tolist() == [[960], [960]], "the training's own cameras are left alone"
    as_they_are = unseen.small_cameras(ns_cameras(cameras(2)))
    assert as_they_are.width.tolist() == [[96], [96]]


def ramp(height: int, width: int) -> torch.Tensor:
    v, u = torch.meshgrid(torch.arange(float(height)) / height, torch.arange(float(width)) / width, indexing="ij")
    return torch.stack([0.2 + 0.5 * u, 0.8 - 0.4 * v, 0.1 + 0.3 * u + 0.2 * v], dim=-1)


def hole(height: int, width: int) -> torch.Tensor:
    there = torch.zeros(height, width, dtype=torch.bool)
    there[height // 4 : height // 2, width // 3 : width // 2] = True
    return there


@pytest.mark.parametrize(("height", "width", "tolerance"), [(30, 50, 1e-6), (480, 640, 2e-3)])
def test_a_hole_in_a_ramp_is_filled_with_the_ramp(height, width, tolerance):
    true, there = ramp(height, width), hole(height, width)
    damaged = torch.where(there[..., None], torch.rand(height, width, 3), true)
    filled = unseen.fill(damaged, there)
    assert (filled - true).abs().max() < tolerance
    assert torch.equal(filled[~there], true[~there])


def test_a_hole_at_the_border_goes_on_from_what_is_known():
    rgb = torch.rand(20, 30, 3)
    rgb[:, 10:12] = torch.tensor([0.3, 0.6, 0.9])
    there = torch.zeros(20, 30, dtype=torch.bool)
    there[:, 12:] = True
    filled = unseen.fill(rgb, there)
    torch.testing.assert_close(filled[:, 12:], torch.tensor([0.3, 0.6, 0.9]).expand(20, 18, 3))


def test_each_filled_pixel_is_the_mean_of_its_neighbours():
    rng = np.random.default_rng(0)
    x, there = rng.random((12, 15, 2)), rng.random((12, 15)) < 0.6
    y = unseen.fill_harmonic(x, there)
    for v, u in np.argwhere(there):
        around = [y[b, a] for b, a in ((v - 1, u), (v + 1, u), (v, u - 1), (v, u + 1)) if 0 <= b < 12 and 0 <= a < 15]
        np.testing.assert_allclose(y[v, u], np.mean(around, axis=0), atol=1e-9)


@pytest.mark.parametrize("value", [False, True])
def test_a_view_of_which_everything_or_nothing_is_known_stays_as_it_is(value):
    rgb = torch.rand(8, 9, 3)
    assert torch.equal(unseen.fill(rgb, torch.full((8, 9), value)), rgb)


RED = torch.tensor([0.9, 0.1, 0.1])


def disc_on_white(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A red disc before white whose right half nobody saw, and is green; that half; and what is empty."""
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    empty = (v - height / 2) ** 2 + (u - width / 2) ** 2 > (0.4 * height) ** 2
    half = (u > width / 2) & ~empty
    rgb = torch.where(empty[..., None], torch.ones(3), RED)
    return torch.where(half[..., None], torch.tensor([0.0, 1.0, 0.0]), rgb), half, empty


@pytest.mark.parametrize(("height", "width"), [(40, 60), (480, 640), (611, 743)])
def test_an_object_goes_on_in_its_own_colours_and_not_in_those_of_the_background(height, width):
    rgb, half, empty = disc_on_white(height, width)
    filled = unseen.fill(rgb, half, empty)
    torch.testing.assert_close(filled[half], RED.expand(int(half.sum()), 3), atol=1e-4, rtol=0.0)
    assert torch.equal(filled[~half], rgb[~half])


def test_a_part_of_which_nothing_is_seen_stays_as_it_is():
    rgb, half, empty = disc_on_white(40, 60)
    empty[:, 28:32] = True
    half &= ~empty
    assert torch.equal(unseen.fill(rgb, half, empty), rgb)
    assert torch.equal(unseen.fill(rgb, ~empty, empty), rgb)


def test_where_nothing_is_empty_a_hole_is_filled_as_ever():
    rgb, there = torch.rand(480, 640, 3), hole(480, 640)
    torch.testing.assert_close(unseen.fill(rgb, there, torch.zeros_like(there)), unseen.fill(rgb, there))
