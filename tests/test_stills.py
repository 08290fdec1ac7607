"""Procedural stills: subjects, where cameras stand, depth against a plain ray caster, what is written."""

import json

import numpy as np
import pytest
from scene_checks import agreeing_rays, reprojection

from ddm_training.errors import InputError
from ddm_training.frames import open_store
from ddm_training.rooms import RoomsConfig
from ddm_training.rooms.cameras import (
    capture_cameras,
    is_beside,
    probe,
    random_still_camera,
    room_with_random_cameras,
    room_with_views,
)
from ddm_training.rooms.furniture import Looks
from ddm_training.rooms.render import trace
from ddm_training.rooms.scene import make_room
from ddm_training.rooms.shapes import Place, SceneBuilder
from ddm_training.rooms.stills import MIDDLE, make_still
from ddm_training.rooms.subjects import SUBJECTS, leaning

VIEW = {"focal": 44.0, "width": 64, "height": 48}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_is_about_as_large_as_asked_for(name):
    """Furniture has sizes of its own."""
    lows, highs = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        builder = SceneBuilder(rng)
        place = Place(builder, np.zeros(3), 0.0, builder.new_entity())
        SUBJECTS[name].make(place, Looks(rng), 1.0)
        low, high = builder.build().bounds
        lows.append(low.min(0))
        highs.append(high.max(0))
    height = np.array(highs)[:, 2]
    assert (np.array(lows)[:, 2] > -1.0).all()  # what bends over may hang lower than its root
    assert (height > 0.1).all()
    assert (height < 2.5).all()
    assert np.unique(height).size > 4  # no two alike, but for a few
    if name != "piece":
        assert (np.abs(np.array(lows + highs)[:, :2]) < 1.6).all()


def test_a_still_is_a_function_of_seed_and_number():
    first, again, other, next_seed = make_still(2, 7), make_still(2, 7), make_still(2, 8), make_still(3, 7)
    assert np.array_equal(first.scene.to_unit, again.scene.to_unit)
    assert np.array_equal(first.scene.palette, again.scene.palette)
    for still in (other, next_seed):
        assert first.extent != still.extent
    assert first.rng(1).random() == make_still(2, 7).rng(1).random()
    assert len(first.scene.kind) != len(make_room(2, 7).scene.kind)


def test_depth_of_a_still_equals_that_of_a_plain_ray_caster():
    still, cameras = room_with_random_cameras(3, 4, 2, **VIEW, kind="still")
    rng = np.random.default_rng(0)
    for camera in cameras:
        # A ray that meets an edge to the last bit may go either way.
        assert agreeing_rays(still.scene, camera, rng) >= 59


def test_cameras_stand_beside_the_subject_and_look_at_it():
    for index in range(6):
        still, cameras = room_with_random_cameras(5, index, 3, **VIEW, kind="still")
        for camera in cameras:
            assert is_beside(still, camera.position)
            offset = np.array([*MIDDLE, still.base + 0.4 * still.extent]) - camera.position
            away = np.linalg.norm(offset)
            assert 0.5 * still.extent < away < 5 * still.extent
            assert offset @ camera.rotation[2] > 0.8 * away  # within 37 degrees of the optical axis
            _, hits = probe(still, camera)
            assert (hits.surface >= 0).mean() >= 0.5
            assert hits.inverse_depth.max() < 1 / (0.3 * still.extent)


def test_no_camera_stands_in_the_subject_or_below_its_table():
    still = make_still(0, 2)
    inside = np.array([*MIDDLE, still.base + 0.3 * still.extent])
    assert not is_beside(still, inside)
    beside = inside + np.array([2 * still.extent, 0, 0])
    assert is_beside(still, beside)
    assert not is_beside(still, beside - [0, 0, 0.3 * still.extent])


def test_views_of_a_still_capture_agree():
    def find(still):
        return capture_cameras(still, still.rng(3), num_train=3, num_test=1, **VIEW, kind="still")

    still, (train, test) = room_with_views(5, 1, find, "still")
    assert (len(train), len(test)) == (3, 1)
    depths = [1 / np.where(q > 0, q, np.nan) for q in (trace(still.scene, c).inverse_depth for c in train)]
    pixels = np.stack([np.repeat(np.arange(2, 46, 3), 10), np.tile(np.arange(3, 63, 6), 15)], -1)
    for a, b in ((0, 1), (1, 2)):
        poses = train[a].camera_to_world, train[b].camera_to_world
        inside, equal, nearer = reprojection(depths[a], poses[0], depths[b], poses[1], train[a].intrinsics, pixels)
        assert inside > 40
        assert equal > 0.4
        assert nearer < 0.03


def test_axes_that_lean_are_a_rotation_whose_first_points_up_by_the_pitch():
    axes = leaning(0.7, 0.4)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1.0)
    assert axes[2, 0] == pytest.approx(np.sin(0.4))
    assert np.arctan2(axes[1, 0], axes[0, 0]) == pytest.approx(0.7)


def test_a_store_of_stills_says_what_it_is_of_and_lies_beside_rooms(tmp_path):
    options = {"num_rooms": 2, "num_views": 2, "val_every": 2, "width": 64, "workers": 1, "seed": 4}
    RoomsConfig(folder=tmp_path, scenes="stills", **options).main()
    RoomsConfig(folder=tmp_path, **options).main()
    train = {scene.info.name: scene.info.source for scene in open_store(tmp_path, "train")}
    assert train == {"still_004_000001": "stills", "room_004_000001": "rooms"}
    still = next(scene for scene in open_store(tmp_path, "val") if scene.info.source == "stills")
    depth, mask = np.asarray(still.depth, np.float32), np.asarray(still.mask)
    assert mask.mean() >= 0.45
    assert (depth[mask] > 0.1).all()
    assert (depth[~mask] == 0).all()


def test_a_capture_of_a_still_is_kept_and_is_not_one_of_a_room(tmp_path):
    options = {"folder": tmp_path, "output": "capture", "num_train": 2, "num_test": 1, "width": 48, "seed": 1}
    RoomsConfig(**options, scenes="stills").main()
    made_by = json.loads((tmp_path / "transforms.json").read_text())["made_by"]
    assert made_by["still"] == 0
    before = (tmp_path / "transforms.json").stat().st_mtime_ns
    RoomsConfig(**options, scenes="stills").main()
    assert (tmp_path / "transforms.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="holds another capture"):
        RoomsConfig(**options).main()


def test_stills_have_no_layout_of_hypersims(tmp_path):
    with pytest.raises(InputError, match="--scenes stills has no meaning with --output hypersim"):
        RoomsConfig(folder=tmp_path, output="hypersim", scenes="stills")


def test_a_still_without_a_view_is_called_a_still():
    still = make_still(0, 2)
    with pytest.raises(RuntimeError, match=r"still .* has no place for a camera"):
        random_still_camera(still, still.rng(1), focal=100_000.0, width=64, height=48)
