"""Procedural rooms: depth against a plain ray caster, agreement of views, determinism, the three outputs."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddm_training.errors import InputError
from ddm_training.frames import open_store
from ddm_training.rooms import RoomsConfig, run_rooms
from ddm_training.rooms.cameras import NoView, capture_cameras, is_free, random_camera, room_with_views
from ddm_training.rooms.render import Camera, look_at, trace
from ddm_training.rooms.scene import Room, make_room
from ddm_training.rooms.shading import render, shadow_map, visibility
from ddm_training.rooms.shapes import BOX, CYLINDER, ELLIPSOID, Light, Scene, SceneBuilder, Skin, rotation_z
from ddm_training.rooms.store import FrameSize, StoreJob

VIEW = {"focal": 44.0, "width": 64, "height": 48}


@pytest.fixture(scope="module")
def room_and_cameras() -> tuple[Room, list[Camera]]:
    def find(room: Room) -> list[Camera]:
        rng = room.rng(1)
        return [random_camera(room, rng, **VIEW) for _ in range(2)]

    return room_with_views(3, 1, find)


def slow_cast(scene: Scene, camera: Camera, column: float, row: float) -> tuple[float, int]:
    """Planar depth and primitive at an image position: plain slab tests and quadratics, no shortcuts."""
    ray = np.array([(column - camera.width / 2) / camera.focal, (row - camera.height / 2) / camera.focal, 1.0])
    ray = ray @ camera.rotation
    best, which = np.inf, -1
    for p in range(len(scene.kind)):
        e, d = scene.to_unit[p] @ (camera.position - scene.centre[p]), scene.to_unit[p] @ ray
        found: list[float] = []
        if scene.kind[p] == BOX:
            a, b = (-1 - e) / d, (1 - e) / d
            enter, leave = np.minimum(a, b).max(), np.maximum(a, b).min()
            if enter < leave and enter > 0:
                found = [float(enter)]
        elif scene.kind[p] == ELLIPSOID:
            found = [t.real for t in np.roots([d @ d, 2 * e @ d, e @ e - 1]) if abs(t.imag) < 1e-12]
        else:
            k = float(scene.taper[p])
            m = 1 - abs(k)
            a = d[0] ** 2 + d[1] ** 2 - (k * d[2]) ** 2
            b = 2 * (e[0] * d[0] + e[1] * d[1] - (m + k * e[2]) * k * d[2])
            c = e[0] ** 2 + e[1] ** 2 - (m + k * e[2]) ** 2
            sides = [t.real for t in np.roots([a, b, c]) if abs(t.imag) < 1e-12]
            found = [t for t in sides if abs(e[2] + t * d[2]) <= 1]
            for s in (-1, 1):
                t = (s - e[2]) / d[2]
                if np.hypot(e[0] + t * d[0], e[1] + t * d[1]) <= m + k * s:
                    found.append(t)
        for t in found:
            if 0 < t < best:
                best, which = t, p
    return best, which


def test_depth_equals_that_of_a_plain_ray_caster(room_and_cameras):
    room, cameras = room_and_cameras
    rng = np.random.default_rng(0)
    for camera in cameras:
        hits = trace(room.scene, camera)
        agree = 0
        for _ in range(60):
            row, column = rng.integers(camera.height), rng.integers(camera.width)
            depth, primitive = slow_cast(room.scene, camera, column + 0.5, row + 0.5)
            same = hits.surface[row, column] // 6 == primitive if primitive >= 0 else hits.surface[row, column] == -1
            agree += bool(same and np.isclose(hits.inverse_depth[row, column], 1 / depth, rtol=2e-5))
        # A ray that meets an edge to the last bit may go either way.
        assert agree >= 59


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


def reprojection(depth_a, pose_a, depth_b, pose_b, intrinsics, pixels) -> tuple[int, float, float]:
    """Of points seen by camera a that fall into image b: how many, the share at b's depth, and the share nearer than
    what b sees there, which no true pair of depths has.

    Poses are OpenGL camera-to-world; intrinsics fx, fy, cx, cy."""
    fx, fy, cx, cy = intrinsics
    inside = equal = nearer = 0
    for row, column in pixels:
        z = depth_a[row, column]
        if not (np.isfinite(z) and z > 0):
            continue
        point = pose_a @ [(column + 0.5 - cx) / fx * z, -(row + 0.5 - cy) / fy * z, -z, 1.0]
        local = np.linalg.inv(pose_b) @ point
        z_b = -local[2]
        if z_b <= 0.1:
            continue
        u, v = fx * local[0] / z_b + cx, -fy * local[1] / z_b + cy
        if not (1 <= u < depth_b.shape[1] - 1 and 1 <= v < depth_b.shape[0] - 1):
            continue
        seen = depth_b[int(v) - 1 : int(v) + 2, int(u) - 1 : int(u) + 2]
        inside += 1
        # The point lies between pixel centres: compare with the range of the 3 x 3 pixels around it (0: no depth).
        low, high = np.where(seen > 0, seen, np.inf).min(), np.where(seen > 0, seen, np.inf).max()
        equal += bool(low * 0.99 - 0.01 <= z_b <= high * 1.01 + 0.01)
        nearer += bool(z_b < low * 0.99 - 0.01)
    return inside, equal / max(inside, 1), nearer / max(inside, 1)


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


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rooms") / "store"
    small_store(folder).main()
    return folder


def small_store(folder: Path, **changes) -> RoomsConfig:
    options = {"num_rooms": 3, "num_views": 2, "val_every": 3, "width": 64, "workers": 1, "seed": 4, **changes}
    return RoomsConfig(folder=folder, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_store_has_the_frames_asked_for_split_by_room(store):
    train, val = open_store(store, "train"), open_store(store, "val")
    assert [len(scene) for scene in train] == [2, 2]
    assert [scene.info.name for scene in val] == ["room_004_000000"]
    scene = train[0]
    assert (scene.info.width, scene.info.height) == (64, 48)
    assert scene.info.intrinsics[0] == (43.75, 43.75, 32.0, 24.0)
    depth, mask = np.asarray(scene.depth, np.float32), np.asarray(scene.mask)
    assert mask.mean() > 0.8
    assert (depth[mask] > 0.35).all()
    assert (depth[~mask] == 0).all()


def test_the_number_of_workers_does_not_change_the_store(store, tmp_path):
    small_store(tmp_path / "two", workers=2).main()
    assert files_of(tmp_path / "two") == files_of(store)


def test_running_again_makes_only_what_is_missing(store, tmp_path):
    import shutil

    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    shutil.rmtree(copy / "room_004_000001")
    (copy / "room_004_000002.part").mkdir()
    kept = (copy / "room_004_000000" / "depth.npy").stat().st_mtime_ns
    small_store(copy).main()
    assert (copy / "room_004_000000" / "depth.npy").stat().st_mtime_ns == kept
    shutil.rmtree(copy / "room_004_000002.part")
    assert files_of(copy) == files_of(store)


def test_a_store_made_with_other_options_is_not_overwritten(store):
    before = files_of(store)
    with pytest.raises(InputError, match="made with other options"):
        small_store(store, num_views=3).main()
    with pytest.raises(InputError, match="made with other options"):
        small_store(store, focal=60.0).main()
    assert files_of(store) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "capture", "num_rooms": 2}, "--num-rooms has no meaning with --output capture"),
        ({"output": "capture", "workers": 3}, "--workers has no meaning with --output capture"),
        ({"num_train": 3}, "--num-train has no meaning with --output store"),
        ({"num_rooms": 0}, "--num-rooms must be at least 1"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"width": 4}, "--width must be at least 16"),
        ({"focal": float("nan")}, "--focal must be at least 1"),
    ],
)
def test_mistakes_in_flags_name_the_flag(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        RoomsConfig(folder=tmp_path, **options)


def test_a_room_without_a_view_names_the_focal_length(tmp_path):
    def write(job: StoreJob) -> int:
        raise NoView(f"no view in 20 attempts at room {job.index} of seed {job.seed}")

    size = FrameSize(width=64, height=48, focal=5000.0)
    job = StoreJob(root=tmp_path, seed=1, index=2, split="train", views=2, size=size)
    with pytest.raises(
        InputError, match=r"no view .* at room 2 of seed 1: with --focal 5000 and --width 64 .* about 45"
    ):
        run_rooms(write, [job], workers=1, folder=tmp_path)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        small_store(tmp_path / "taken").main()


@pytest.fixture(scope="module")
def hypersim(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rooms") / "hypersim"
    RoomsConfig(folder=folder, output="hypersim", num_rooms=2, num_views=2, width=128, workers=1, seed=4).main()
    return folder


def read_hdf5(path: Path) -> np.ndarray:
    import h5py

    with h5py.File(path) as file:
        assert list(file) == ["dataset"]
        return np.asarray(file["dataset"])


def test_hypersim_depth_is_the_distance_along_the_ray_and_nan_where_nothing_is(hypersim):
    images = hypersim / "ai_900_002" / "images"
    distance = read_hdf5(images / "scene_cam_00_geometry_hdf5" / "frame.0001.depth_meters.hdf5").astype(np.float64)
    entity = read_hdf5(images / "scene_cam_00_geometry_hdf5" / "frame.0001.render_entity_id.hdf5")
    color = read_hdf5(images / "scene_cam_00_final_hdf5" / "frame.0001.color.hdf5")
    assert distance.shape == entity.shape == (96, 128)
    assert color.shape == (96, 128, 3)
    assert color.dtype == np.float16
    assert (np.isnan(distance) == (entity == -1)).all()

    def find(room: Room) -> list[Camera]:
        rng, focal = room.rng(1), 886.81 / 8
        return [random_camera(room, rng, focal=focal, width=128, height=96) for _ in range(2)]

    room, cameras = room_with_views(4, 1, find)
    for row, column in ((3, 5), (90, 120), (48, 64), (20, 100)):
        z, _ = slow_cast(room.scene, cameras[1], column + 0.5, row + 0.5)
        ray = np.array([(column + 0.5 - 64) / (886.81 / 8), (row + 0.5 - 48) / (886.81 / 8), 1.0])
        expected = np.linalg.norm(z * ray)
        if np.isfinite(expected):
            assert distance[row, column] == pytest.approx(expected, rel=2e-3)  # float16
        else:
            assert np.isnan(distance[row, column])


def test_hypersim_metadata_has_the_official_columns(hypersim, real_data):
    for name in ("metadata_images_split_scene_v1.csv", "metadata_camera_parameters.csv"):
        with (hypersim / name).open() as ours, (real_data("hypersim") / name).open() as theirs:
            assert next(csv.reader(ours)) == next(csv.reader(theirs))


def test_hypersim_metadata_lists_every_frame_and_the_plain_projection(hypersim):
    with (hypersim / "metadata_images_split_scene_v1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["scene_name"], r["frame_id"], r["split_partition_name"]) for r in rows] == [
        ("ai_900_001", "0", "val"),
        ("ai_900_001", "1", "val"),
        ("ai_900_002", "0", "train"),
        ("ai_900_002", "1", "train"),
    ]
    for r in rows:
        preview = hypersim / r["scene_name"] / "images" / "scene_cam_00_final_preview"
        assert Image.open(preview / f"frame.{int(r['frame_id']):04d}.tonemap.jpg").size == (128, 96)
    with (hypersim / "metadata_camera_parameters.csv").open() as file:
        camera = next(csv.DictReader(file))
    # the field of view of Hypersim's standard camera: 60 degrees across, as f = 886.81 at 1024
    assert float(camera["M_cam_from_uv_00"]) == pytest.approx(np.tan(np.radians(30)), rel=1e-5)
    assert float(camera["M_cam_from_uv_11"]) == pytest.approx(0.75 * np.tan(np.radians(30)), rel=1e-5)


def hypersim_rooms(folder: Path, first: int, count: int, **changes) -> RoomsConfig:
    options = {"num_views": 1, "width": 16, "height": 16, "focal": 14.0, "workers": 1, **changes}
    return RoomsConfig(folder=folder, output="hypersim", first_room=first, num_rooms=count, **options)


def test_rooms_that_are_added_are_added_to_the_tables_of_hypersims_layout(tmp_path):
    hypersim_rooms(tmp_path / "more", 2, 1).main()
    hypersim_rooms(tmp_path / "more", 0, 2).main()
    hypersim_rooms(tmp_path / "more", 2, 1).main()
    hypersim_rooms(tmp_path / "once", 0, 3).main()
    for name in ("metadata_images_split_scene_v1.csv", "metadata_camera_parameters.csv"):
        assert (tmp_path / "more" / name).read_text() == (tmp_path / "once" / name).read_text()
    table = tmp_path / "once" / "metadata_camera_parameters.csv"
    table.write_text("scene_name,mood\nai_001_001,good\n")
    with pytest.raises(InputError, match="other columns than Hypersim's"):
        hypersim_rooms(tmp_path / "once", 0, 3).main()
    table.unlink()
    table.mkdir()
    with pytest.raises(InputError, match="could not be written"):
        hypersim_rooms(tmp_path / "once", 0, 3).main()


@pytest.fixture(scope="module")
def capture(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rooms") / "capture"
    RoomsConfig(folder=folder, output="capture", num_train=5, num_test=3, width=80, seed=1).main()
    return folder


def test_views_of_a_capture_agree_by_its_own_file(capture):
    meta = json.loads((capture / "transforms.json").read_text())
    intrinsics = tuple(meta[k] for k in ("fl_x", "fl_y", "cx", "cy"))
    assert (meta["w"], meta["h"]) == (80, 60)
    frames = meta["frames"]
    assert [f["file_path"] for f in frames] == meta["train_filenames"] + meta["test_filenames"]
    assert (len(meta["train_filenames"]), len(meta["test_filenames"])) == (5, 3)
    depths, poses = [], []
    for frame in frames:
        assert Image.open(capture / frame["file_path"]).size == (80, 60)
        depth = np.asarray(Image.open(capture / frame["depth_file_path"]))
        assert depth.max() > 255  # 16 bit
        depths.append(depth / 1000.0)
        poses.append(np.array(frame["transform_matrix"]))
        rotation = poses[-1][:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(rotation) == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    pixels = np.stack([rng.integers(60, size=200), rng.integers(80, size=200)], -1)
    for a in range(len(frames)):
        b = (a + 3) % len(frames)
        inside, equal, nearer = reprojection(depths[a], poses[a], depths[b], poses[b], intrinsics, pixels)
        assert inside > 60
        assert equal > 0.5
        assert nearer < 0.02


def test_training_cameras_of_a_capture_are_in_order_along_an_arc(capture):
    meta = json.loads((capture / "transforms.json").read_text())
    at = np.array([f["transform_matrix"] for f in meta["frames"]])[:5, :2, 3]
    along = (at - at[0]) @ (at[-1] - at[0])
    assert (np.diff(along) > 0).all()
    assert 0.5 < np.linalg.norm(at[-1] - at[0]) < 5.0


def test_a_capture_is_kept_and_another_one_is_refused(capture):
    before = files_of(capture)
    RoomsConfig(folder=capture, output="capture", num_train=5, num_test=3, width=80, seed=1).main()
    with pytest.raises(InputError, match="holds another capture"):
        RoomsConfig(folder=capture, output="capture", num_train=5, num_test=3, width=80, seed=2).main()
    assert files_of(capture) == before
