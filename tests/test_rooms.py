"""Procedural rooms: depth against a plain ray caster, agreement of views, determinism."""

import numpy as np
import pytest
from scene_checks import agreeing_rays, reprojection, slow_cast

from ddm_training.rooms.cameras import capture_cameras, is_free, random_camera, room_with_views
from ddm_training.rooms.render import Camera, look_at, trace
from ddm_training.rooms.scene import Room, make_room
from ddm_training.rooms.shading import render, shadow_map, visibility
from ddm_training.rooms.shapes import BOX, CYLINDER, ELLIPSOID, Light, Scene, SceneBuilder, Skin, rotation_z

VIEW = {"focal": 44.0, "width": 64, "height": 48}


@pytest.fixture(scope="module")
def room_and_cameras() -> tuple[Room, list[Camera]]:
    def find(room: Room) -> list[Camera]:
        rng = room.rng(1)
        return [random_camera(room, rng, **VIEW) for _ in range(2)]

    return room_with_views(3, 1, find)


def test_depth_equals_that_of_a_plain_ray_caster(room_and_cameras):
    room, cameras = room_and_cameras
    rng = np.random.default_rng(0)
    for camera in cameras:
        # A ray that meets an edge to the last bit may go either way.
        assert agreeing_rays(room.scene, camera, rng) >= 59


def all_shapes() -> Scene:
    """One of each shape, turned, before a wall."""
    builder = SceneBuilder(np.random.default_rng(0))
    skin = Skin(0, np.eye(3, dtype=np.float32))
    tilt = rotation_z(0.4) @ np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
    builder.add(BOX, (0.0, 4.0, 1.0), (4.0, 0.1, 3.0), np.eye(3), skin, 1)
    builder.add(BOX, (-1.0, 2.5, 1.0), (0.3, 0.5, 0.2), tilt, skin, 2)
    builder.add(ELLIPSOID, (0.2, 2.5, 1.2), (0.2, 0.3, 0.4), tilt, skin, 3)
    builder.add(CYLINDER, (1.0, 2.5, 1.0), (0.3, 0.3, 0.5), tilt, skin, 4, taper=0.3)
    builder.add(CYLINDER, (0.5, 3.0, 0.4), (0.2, 0.3, 0.3), rotation_z(1.0), skin, 5, taper=-0.5)
    return builder.build()


def test_every_shape_is_drawn_where_the_plain_ray_caster_finds_it():
    scene = all_shapes()
    camera = look_at(np.array([0.1, 0.0, 1.3]), np.array([0.0, 2.5, 1.0]), focal=30.0, width=48, height=36, roll=0.2)
    hits = trace(scene, camera)
    expected = [[slow_cast(scene, camera, c + 0.5, r + 0.5) for c in range(48)] for r in range(36)]
    depth = np.array([[e[0] for e in row] for row in expected])
    primitive = np.array([[e[1] for e in row] for row in expected])
    assert set(np.unique(primitive)) == {-1, 0, 1, 2, 3, 4}
    found = np.where(hits.surface >= 0, hits.surface // 6, -1)
    same = found == primitive
    assert same.mean() > 0.998
    np.testing.assert_allclose(hits.inverse_depth[same], 1 / depth[same], rtol=2e-5)


def test_surfaces_around_and_behind_the_camera_are_clipped_exactly():
    """The camera in a box of six slabs: each pixel sees the nearest of the six planes."""
    builder = SceneBuilder(np.random.default_rng(0))
    skin = Skin(0, np.eye(3, dtype=np.float32))
    for axis in range(3):
        for side in (-1, 1):
            centre, half = np.zeros(3), np.full(3, 3.0)
            centre[axis], half[axis] = 2.5 * side, 0.5
            builder.add(BOX, centre, half, np.eye(3), skin, 1)
    camera = look_at(np.array([0.3, -0.5, 0.2]), np.array([1.0, 0.4, 0.0]), focal=10.0, width=40, height=30)
    depth = 1 / trace(builder.build(), camera).inverse_depth
    x, y = np.meshgrid((np.arange(40) + 0.5 - 20) / 10, (np.arange(30) + 0.5 - 15) / 10)
    rays = np.stack([x, y, np.ones_like(x)], -1) @ camera.rotation
    expected = ((2.0 * np.sign(rays) - camera.position) / rays).min(-1)
    np.testing.assert_allclose(depth, expected, rtol=1e-5)


def test_a_point_seen_from_two_cameras_has_agreeing_depth():
    def find(room: Room) -> list[Camera]:
        return capture_cameras(room, room.rng(3), num_train=3, num_test=0, **VIEW)[0]

    room, cameras = room_with_views(5, 0, find)
    depths = [render(room.scene, room.shadows, camera)[1] for camera in cameras]
    rng = np.random.default_rng(0)
    pixels = np.stack([rng.integers(48, size=200), rng.integers(64, size=200)], -1)
    for a, b in ((0, 1), (1, 2), (2, 0)):
        poses = cameras[a].camera_to_world, cameras[b].camera_to_world
        inside, equal, nearer = reprojection(depths[a], poses[0], depths[b], poses[1], cameras[a].intrinsics, pixels)
        assert inside > 60
        assert equal > 0.5
        assert nearer < 0.02


def test_a_lamp_does_not_reach_behind_a_box():
    scene = all_shapes()
    lamp = Light(np.array([-1.0, 0.5, 1.0]), np.ones(3))
    shadow = shadow_map(scene, lamp)
    points = np.array([[-1.0, 3.85, 1.0], [2.5, 3.85, 2.5], [-1.0, 1.0, 1.0]], np.float32)
    offset = points - lamp.position.astype(np.float32)
    lit = visibility(shadow, tuple(offset.T), np.linalg.norm(offset, axis=1))
    assert lit[0] < 0.05  # behind the box
    assert lit[1] > 0.95  # on the wall, off to the side
    assert lit[2] > 0.99  # in the open


def test_views_are_free_and_look_at_an_indoor_scene(room_and_cameras):
    room, cameras = room_and_cameras
    for camera in cameras:
        assert is_free(room, camera.position)
        color, depth, entity = render(room.scene, room.shadows, camera)
        assert np.isfinite(color).all()
        assert color.min() >= 0
        assert color.std() > 0.02
        assert depth.min() > 0.4
        assert 1.0 < np.median(depth) < 6.5
        assert len(np.unique(entity)) >= 5
        assert ((entity == -1) == np.isinf(depth)).all()


def test_a_room_is_a_function_of_seed_and_number():
    first, again, other, next_seed = make_room(2, 7), make_room(2, 7), make_room(2, 8), make_room(3, 7)
    assert np.array_equal(first.scene.to_unit, again.scene.to_unit)
    assert np.array_equal(first.scene.palette, again.scene.palette)
    for room in (other, next_seed):
        assert not np.array_equal(first.size, room.size)
