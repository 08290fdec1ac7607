"""`ddm rooms`: the three outputs, running again, mistakes in flags."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_checks import reprojection, slow_cast

from ddm_training.errors import InputError
from ddm_training.files import exclusive
from ddm_training.frames import open_store
from ddm_training.jobs import Outcome, ProcessDiedError
from ddm_training.rooms import RoomsConfig, run_rooms
from ddm_training.rooms.cameras import NoView, random_camera, room_with_views
from ddm_training.rooms.render import Camera
from ddm_training.rooms.scene import Room
from ddm_training.rooms.store import FrameSize, StoreJob


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


def test_a_process_that_dies_is_told_plainly(tmp_path, monkeypatch):
    def run_jobs(function, jobs, *_):
        yield Outcome(jobs[0], None, ProcessDiedError("the process died (killed)"))

    monkeypatch.setattr("ddm_training.jobs.run_jobs", run_jobs)
    with pytest.raises(InputError, match=r"room 0 could not be written: the process died .*run the same command again"):
        small_store(tmp_path).main()


@pytest.mark.parametrize("output", ["store", "hypersim", "capture"])
def test_a_second_command_does_not_write_into_a_folder_at_the_same_time(tmp_path, output):
    with (
        exclusive(tmp_path, "making of scenes", "--folder"),
        pytest.raises(InputError, match=r"another making of scenes is writing into .*give another --folder"),
    ):
        RoomsConfig(folder=tmp_path, output=output).main()


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


def test_a_scene_of_hypersims_layout_with_other_options_is_refused(tmp_path):
    hypersim_rooms(tmp_path, 0, 1).main()
    before = files_of(tmp_path)
    for changed in ({"focal": 15.0}, {"seed": 1}, {"num_views": 2}, {"height": 17}):
        with pytest.raises(InputError, match="made with other options"):
            hypersim_rooms(tmp_path, 0, 1, **changed).main()
    assert files_of(tmp_path) == before
    (tmp_path / "ai_900_001" / "made_by.json").unlink()
    with pytest.raises(InputError, match=r"made_by\.json, which tells how the scene was made, cannot be read"):
        hypersim_rooms(tmp_path, 0, 1).main()


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


@pytest.mark.parametrize("name", ["images/IMG_0001.png", "depth/train_000.npy", "images/old/train_000.png"])
def test_pictures_of_a_user_are_not_touched(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=r"(images|depth) holds .*, which `ddm rooms` did not write"):
        RoomsConfig(folder=tmp_path, output="capture", num_train=1, num_test=1, width=16).main()
    assert (tmp_path / name).read_text() == "mine"


def test_a_capture_that_was_cut_short_is_made_whole(capture, tmp_path):
    for path in (tmp_path / "images" / "train_000.png", tmp_path / "depth" / "test_009.png"):
        path.parent.mkdir()
        path.write_text("half")
    (tmp_path / "images" / ".DS_Store").write_text("of a file manager")
    RoomsConfig(folder=tmp_path, output="capture", num_train=5, num_test=3, width=80, seed=1).main()
    (tmp_path / "images" / ".DS_Store").unlink()
    assert files_of(tmp_path) == files_of(capture)
