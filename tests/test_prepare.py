"""`ddm hypersim prepare` and `ddm frames`: whole commands on small trees."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypersim_tree import PLAIN_CAMERA, ray_lengths, write_frame, write_hdf5, write_tree
from PIL import Image

from ddm_training import scene_jobs
from ddm_training.errors import InputError
from ddm_training.frames import open_scene, open_store
from ddm_training.hypersim import CAMERA_FILE, SPLIT_FILE, frame_files
from ddm_training.jobs import EngineConfig, run_jobs
from ddm_training.prepare import FramesConfig, HypersimPrepareConfig
from ddm_training.rejection import FrameRejected, RejectionLimits, check_frame

SCENES = {"ai_001_001": "train", "ai_001_002": "train", "ai_002_001": "val"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "raw", SCENES)


def config(tree: Path, **changes) -> HypersimPrepareConfig:
    options = {"data": tree, "output": tree.parent / "store", "width": 16, "height": 12} | changes
    return HypersimPrepareConfig(**options)


def report(tree: Path) -> dict:
    return json.loads((tree.parent / "store" / "report.json").read_text())


def files(tree: Path, frame: int = 0, scene: str = "ai_001_001") -> dict[str, Path]:
    return frame_files(tree / scene / "images", "cam_00", frame, "hdr")


# Hypersim, the good way


def test_a_tree_becomes_scenes_with_metres_splits_and_scaled_intrinsics(tree: Path) -> None:
    config(tree).main()
    scenes = {scene.info.name: scene for scene in open_store(tree.parent / "store")}
    assert {name: scene.info.split for name, scene in scenes.items()} == {
        "ai_001_001_cam_00": "train",
        "ai_001_002_cam_00": "train",
        "ai_002_001_cam_00": "val",
    }
    scene = scenes["ai_001_001_cam_00"]
    assert scene.info.frames == ("frame.0000", "frame.0001")
    np.testing.assert_allclose(scene.info.intrinsics[0], (886.81 / 64, 886.81 / 64, 8.0, 6.0), rtol=1e-6)
    np.testing.assert_allclose(scene.depth[1, :, :8], 2.0, rtol=2e-3)
    np.testing.assert_allclose(scene.depth[1, :, 8:], 4.0, rtol=2e-3)
    assert scene.mask.all()
    said = report(tree)
    assert said["frames_by_split"] == {"train": 4, "val": 2}
    assert said["rejected"] == {}
    assert said["failed"] == {}
    assert said["bytes"] == sum(p.stat().st_size for p in (tree.parent / "store").glob("ai_*/*"))


@pytest.mark.slow
def test_processes_and_submitit_write_the_same_store_as_one_process(tree: Path) -> None:
    engines = {
        "one": EngineConfig(),
        "two": EngineConfig(workers=2),
        "submitit": EngineConfig(engine="submitit-local", workers=2),
    }
    for name, engine in engines.items():
        config(tree, output=tree.parent / name, engine=engine).main()
    for other in ("two", "submitit"):
        for path in (tree.parent / "one").glob("ai_*/*"):
            assert path.read_bytes() == (tree.parent / other / path.parent.name / path.name).read_bytes()


def test_running_again_skips_whole_scenes_and_makes_the_missing_one(tree: Path) -> None:
    config(tree).main()
    store = tree.parent / "store"
    stamp = (store / "ai_001_001_cam_00" / "scene.json").stat().st_mtime_ns
    shutil.rmtree(store / "ai_001_002_cam_00")
    config(tree).main()
    assert (store / "ai_001_001_cam_00" / "scene.json").stat().st_mtime_ns == stamp
    assert report(tree)["scenes_skipped"] == 2
    assert len(open_store(store)) == 3
    config(tree, redo=True).main()
    assert report(tree)["scenes_skipped"] == 0


def test_a_scene_is_made_again_when_more_of_it_was_downloaded(tree: Path) -> None:
    for path in files(tree, 1).values():
        path.rename(path.with_suffix(".away"))
    config(tree).main()
    assert report(tree)["rejected"] == {"not on disk": 1}
    for path in files(tree, 1).values():
        path.with_suffix(".away").rename(path)
    config(tree).main()
    assert report(tree)["rejected"] == {}
    assert report(tree)["frames"] == 6


def test_what_a_killed_run_left_half_written_is_replaced(tree: Path) -> None:
    store = tree.parent / "store"
    half = store / "ai_001_001_cam_00.part"
    half.mkdir(parents=True)
    (half / "depth.npy").write_bytes(b"\x93NUMPY")
    config(tree).main()
    assert not half.exists()
    assert len(open_scene(store / "ai_001_001_cam_00")) == 2


def test_other_options_into_the_same_store_are_refused(tree: Path) -> None:
    config(tree, scenes=("ai_001_001",)).main()
    config(tree).main()  # more scenes are no other options
    with pytest.raises(InputError, match="width was 16, is now 32"):
        config(tree, width=32, height=24).main()


def test_each_camera_becomes_a_scene_of_its_own(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "raw", {"ai_001_001": "train"}, cameras=("cam_00", "cam_01"))
    config(tree).main()
    assert [s.info.name for s in open_store(tmp_path / "store")] == ["ai_001_001_cam_00", "ai_001_001_cam_01"]


# Hypersim, bad input


def spoil_nan(tree: Path) -> None:
    write_hdf5(files(tree)["depth"], np.full((48, 64), np.nan, np.float16))


def spoil_units(tree: Path) -> None:
    write_hdf5(files(tree)["depth"], (2540.0 * ray_lengths(64, 48)).astype(np.float16))


def spoil_holes(tree: Path) -> None:
    depth = (3.0 * ray_lengths(64, 48)).astype(np.float16)
    depth[:8] = 0.0
    write_hdf5(files(tree)["depth"], depth)


def spoil_flat(tree: Path) -> None:
    write_hdf5(files(tree)["depth"], (3.0 * ray_lengths(64, 48)).astype(np.float16))


def spoil_black(tree: Path) -> None:
    write_hdf5(files(tree)["colour"], np.zeros((48, 64, 3), np.float16))


def spoil_truncate(tree: Path) -> None:
    os.truncate(files(tree)["colour"], 900)


def spoil_size(tree: Path) -> None:
    write_frame(tree / "ai_001_001" / "images", "cam_00", 0, size=(32, 24))


def spoil_pair(tree: Path) -> None:
    files(tree)["colour"].unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_nan, "no valid depth at all"),
        (spoil_units, "median depth over 100 m (wrong units?)"),
        (spoil_holes, "more than 3 % of the pixels without depth"),
        (spoil_flat, "depth range under 0.5 m"),
        (spoil_black, "colour range under 10 of 255"),
        (spoil_truncate, "colour file damaged"),
        (spoil_size, "depth of another size than the camera"),
        (spoil_pair, "no colour file"),
    ],
)
def test_a_bad_frame_is_counted_with_its_reason_and_the_others_are_kept(tree: Path, spoil, reason: str) -> None:
    spoil(tree)
    config(tree).main()
    assert report(tree)["rejected"] == {reason: 1}
    assert report(tree)["frames"] == 5
    assert open_scene(tree.parent / "store" / "ai_001_001_cam_00").info.frames == ("frame.0001",)


def test_known_bad_cameras_are_counted_and_not_read(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "raw", {"ai_003_001": "train", "ai_003_002": "train"})
    config(tree).main()
    assert report(tree)["rejected"] == {"known bad camera": 2}
    assert [s.info.name for s in open_store(tmp_path / "store")] == ["ai_003_002_cam_00"]
    config(tree).main()
    assert report(tree)["scenes_skipped"] == 2


def test_a_sheared_camera_and_one_without_a_row_are_counted(tree: Path) -> None:
    path = tree / CAMERA_FILE
    head, first, *_, last = path.read_text().splitlines()
    values = first.split(",")
    values[4] = str(0.05 * PLAIN_CAMERA[1][1] * -1)  # M_01: x leans with y
    path.write_text("\n".join([head, ",".join(values), last]) + "\n")
    config(tree).main()
    assert report(tree)["rejected"] == {"camera sheared by more than 2 %": 2, "scene not in the table of cameras": 2}


def test_a_tree_without_any_good_frame_is_an_error(tree: Path) -> None:
    with pytest.raises(InputError, match=r"no frame was kept.*depth range under 9 m': 6"):
        config(tree, limits=RejectionLimits(min_depth_range=9.0)).main()


def test_an_empty_split_and_unknown_scenes_are_errors_that_say_what_is_there(tree: Path) -> None:
    with pytest.raises(InputError, match=r"of the 3 scenes on disk.*'test': 0"):
        config(tree, splits=("test",)).main()
    with pytest.raises(InputError, match="ai_009_009"):
        config(tree, scenes=("ai_009_009",)).main()
    with pytest.raises(InputError, match="not a folder"):
        config(tree, data=tree / "nowhere").main()


def test_folders_that_the_split_file_does_not_know_are_named(tree: Path, capsys) -> None:
    (tree / "my_scene" / "images").mkdir(parents=True)
    config(tree).main()
    assert "1 folders that the split file does not know, e.g. my_scene" in capsys.readouterr().out


def test_missing_tables_are_errors_and_the_plain_camera_needs_none(tree: Path) -> None:
    (tree / CAMERA_FILE).rename(tree / "away.csv")
    with pytest.raises(InputError, match="metadata_camera_parameters"):
        config(tree).main()
    config(tree, camera_csv=tree / "away.csv").main()
    (tree / SPLIT_FILE).unlink()
    with pytest.raises(InputError, match="metadata_images_split_scene_v1"):
        config(tree).main()


def test_a_stretched_size_is_refused_before_anything_is_written(tree: Path) -> None:
    with pytest.raises(InputError, match="stretch"):
        config(tree, width=16, height=16).main()
    assert not (tree.parent / "store").exists()


def test_the_plain_camera_is_for_frames_of_the_published_size(tree: Path) -> None:
    with pytest.raises(InputError, match=r"no frame was kept.*depth of another size than the camera"):
        config(tree, camera="plain").main()


# The store and the machine


def test_a_full_disk_ends_with_a_message_leaves_no_half_scene_and_can_be_continued(tree: Path, monkeypatch) -> None:
    claim, calls = os.posix_fallocate, []

    def full(fd: int, offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) > 4:  # three arrays a scene: the second scene does not fit
            raise OSError(errno.ENOSPC, "No space left on device")
        claim(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"is full .* run the same command again; the 1 whole scenes are kept"):
        config(tree).main()
    assert [s.info.name for s in open_store(tree.parent / "store")] == ["ai_001_001_cam_00"]
    assert not list((tree.parent / "store").glob("ai_*.part"))
    monkeypatch.undo()
    config(tree).main()
    assert len(open_store(tree.parent / "store")) == 3


def test_a_failing_scene_is_reported_and_the_others_go_on(tree: Path, monkeypatch) -> None:
    honest = scene_jobs.resize_color

    def broken(color: np.ndarray, width: int, height: int) -> np.ndarray:
        if len(list((tree.parent / "store").glob("ai_*"))) == 2:  # while the second scene is written
            raise RuntimeError("bad luck")
        return honest(color, width, height)

    monkeypatch.setattr(scene_jobs, "resize_color", broken)
    with pytest.raises(InputError, match="2 scenes failed, the first: ai_001_002_cam_00: RuntimeError: bad luck"):
        config(tree).main()
    assert set(report(tree)["failed"]) == {"ai_001_002_cam_00", "ai_002_001_cam_00"}
    assert report(tree)["scenes"] == 1
    monkeypatch.undo()
    config(tree).main()
    assert report(tree)["scenes"] == 3


def test_a_damaged_scene_in_the_store_is_an_error_that_says_what_to_delete(tree: Path) -> None:
    config(tree).main()
    (tree.parent / "store" / "ai_001_001_cam_00" / "scene.json").write_text("{")
    with pytest.raises(InputError, match=r"delete .*ai_001_001_cam_00"):
        config(tree).main()


def double(number: int) -> int:
    if number == 13:
        raise ValueError("unlucky")
    if number == 99:
        os._exit(1)  # as the kernel does when memory is short
    return 2 * number


@pytest.mark.slow
def test_a_job_that_raises_or_whose_process_dies_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    jobs = [1, 13, 2, 99, 3, 4]
    outcomes = {o.job: o for o in run_jobs(double, jobs, EngineConfig(workers=2), tmp_path)}
    assert {job: o.result for job, o in outcomes.items()} == {1: 2, 13: None, 2: 4, 99: None, 3: 6, 4: 8}
    assert "unlucky" in str(outcomes[13].error)
    assert "process died" in str(outcomes[99].error)


def test_slurm_where_there_is_none_is_an_error_that_says_so(tree: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="found no sbatch"):
        config(tree, engine=EngineConfig(engine="slurm")).main()


def test_workers_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1, found 0"):
        EngineConfig(workers=0)


# RGBD folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 frames of 32 x 24, named so that text order is not their order; depth 1 m + 1 cm per frame, sloped."""
    root = tmp_path / "office"
    (root / "rgb").mkdir(parents=True)
    (root / "depth").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(root / "rgb" / f"{i}.png")
        depth = 1000 + 10 * i + 20 * np.arange(32, dtype=np.uint16)[None, :].repeat(24, axis=0)
        depth[0, :5], depth[1, :5] = 0, 65535
        Image.fromarray(depth.astype(np.uint16)).save(root / "depth" / f"{i}.png")
    np.savetxt(root / "K.txt", [[30.0, 0, 15.5], [0, 30.0, 11.5], [0, 0, 1]])
    return root


def frames_config(folder: Path, **changes) -> FramesConfig:
    return FramesConfig(**({"data": folder, "output": folder.parent / "store"} | changes))


def test_a_folder_becomes_train_and_a_held_out_end_with_a_gap_between(folder: Path) -> None:
    frames_config(folder, val_gap=4).main()
    val, train = sorted(open_store(folder.parent / "store"), key=len)
    assert (train.info.name, train.info.split, len(train)) == ("office_train", "train", 30)
    assert (val.info.name, val.info.split, len(val)) == ("office_val", "val", 6)
    assert train.info.frames == tuple(map(str, range(30)))
    assert val.info.frames == tuple(map(str, range(34, 40)))
    assert report(folder)["rejected"] == {"gap between train and val": 4}
    np.testing.assert_allclose(train.depth[7, 5], 1.07 + 0.02 * np.arange(32), rtol=1e-3)
    assert not train.mask[:, :2, :5].any()
    assert train.mask[:, 2:].all()
    np.testing.assert_array_equal(train.color[7], np.asarray(Image.open(folder / "rgb" / "7.png")))
    assert train.info.intrinsics[0] == (30.0, 30.0, 16.0, 12.0)  # from "first centre at 0" to "at 0.5"


def test_a_folder_can_be_stored_smaller(folder: Path) -> None:
    frames_config(folder, size=(16, 12), pixel_centre="0.5").main()
    scene = open_store(folder.parent / "store", "val")[0]
    assert scene.color.shape[1:] == (12, 16, 3)
    assert scene.info.intrinsics[0] == (15.0, 15.0, 7.75, 5.75)


def test_bad_files_of_a_folder_are_counted_by_reason(folder: Path) -> None:
    (folder / "rgb" / "0.png").unlink()
    (folder / "depth" / "1.png").unlink()
    os.truncate(folder / "rgb" / "2.png", 500)
    (folder / "depth" / "3.png").write_text("no image")
    Image.new("I;16", (16, 12), 900).save(folder / "depth" / "4.png")
    Image.new("L", (32, 24), 90).save(folder / "depth" / "5.png")
    Image.new("RGB", (16, 12)).save(folder / "rgb" / "6.png")
    Image.new("I;16", (32, 24), 0).save(folder / "depth" / "7.png")
    frames_config(folder, val_fraction=0.0).main()
    assert report(folder)["rejected"] == {
        "no depth file": 1,
        "no colour file": 1,
        "colour file damaged": 1,
        "depth file damaged": 1,
        "depth and colour of different sizes": 1,
        "depth is not 16-bit grey (PIL mode L)": 1,
        "colour image of another size than the first": 1,
        "no valid depth at all": 1,
    }
    assert report(folder)["frames"] == 32


def test_depth_in_wrong_units_is_an_error_that_says_so(folder: Path) -> None:
    with pytest.raises(InputError, match="wrong units"):
        frames_config(folder, metres_per_unit=1.0).main()


def test_intrinsics_for_another_size_or_of_another_shape_are_refused(folder: Path) -> None:
    for matrix, complaint in (
        ([[300.0, 0, 155], [0, 300, 115], [0, 0, 1]], "images of another size"),
        ([[30.0, 0, 15.5], [0, -30, 11.5], [0, 0, 1]], "no pinhole matrix"),
        ([[30.0, 2, 15.5], [0, 30, 11.5], [0, 0, 1]], "no pinhole matrix"),
        ([[30.0, 0, 15.5, 0]], "expected 3 x 3"),
    ):
        np.savetxt(folder / "K.txt", matrix)
        with pytest.raises(InputError, match=complaint):
            frames_config(folder).main()
    (folder / "K.txt").write_text("focal length: 30")
    with pytest.raises(InputError, match="cannot be read"):
        frames_config(folder).main()


def test_folders_without_pairs_or_with_too_few_frames_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="--color-dir"):
        frames_config(folder, color_dir="images").main()
    with pytest.raises(InputError, match="too few"):
        frames_config(folder, val_fraction=0.9).main()
    for path in (folder / "depth").iterdir():
        path.rename(path.with_name(f"depth_{path.name}"))
    with pytest.raises(InputError, match=r"no pair .* \(40 depth images, e.g. 'depth_"):
        frames_config(folder).main()


@pytest.mark.parametrize("bad", [{"val_fraction": 1.0}, {"val_gap": -1}, {"metres_per_unit": 0.0}])
def test_flags_of_frames_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(InputError, match="found"):
        FramesConfig(data=Path(), output=Path(), **bad)


def test_the_hololens_folder_is_read_whole(real_data, tmp_path: Path) -> None:
    FramesConfig(data=real_data("rgbd/hololens"), output=tmp_path / "store").main()
    train, val = open_store(tmp_path / "store")
    assert (len(train), len(val)) == (307, 56)
    assert abs(train.info.intrinsics[0][2] - 135) < 1
    assert 1.0 < np.median(train.depth[::20][train.mask[::20]]) < 5.0
    assert 0.6 < train.mask.mean() < 0.9


# Limits


def test_a_frame_at_the_limits_passes_and_one_beyond_does_not() -> None:
    limits = RejectionLimits(max_invalid=0.25, min_depth_range=0.5, min_color_range=10.0)
    color = np.zeros((2, 2, 3), np.uint8)
    color[0, 0, 0] = 10
    depth, mask = np.array([[1.0, 1.5], [1.0, 9.0]], np.float32), np.array([[True, True], [True, False]])
    check_frame(color, depth, mask, limits)
    with pytest.raises(FrameRejected, match="colour range"):
        check_frame(color // 2, depth, mask, limits)
    with pytest.raises(FrameRejected, match="depth range"):
        check_frame(color, np.float32(0.9) * depth, mask, limits)
    with pytest.raises(FrameRejected, match="without depth"):
        check_frame(color, depth, mask & [[True, False]], limits)
    with pytest.raises(InputError, match=r"share of the pixels"):
        RejectionLimits(max_invalid=3.0)


# The command line


@pytest.mark.slow
def test_the_command_prepares_a_tree_and_ends_with_a_message_on_bad_input(tree: Path) -> None:
    def ddm(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ddm_training.cli", *map(str, args)], capture_output=True, text=True
        )

    store = tree.parent / "store"
    arguments = ["hypersim", "prepare", "--data", tree, "--output", store, "--width", 16, "--height", 12]
    done = ddm(*arguments, "--workers", 2, "--splits", "train", "--max-invalid", 0.01)
    assert done.returncode == 0, done.stderr
    assert "frames kept, train" in done.stdout
    assert len(open_store(store)) == 2
    refused = ddm(*arguments, "--splits", "test")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: nothing to prepare")
    assert "Traceback" not in refused.stderr
