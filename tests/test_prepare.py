"""`ddm hypersim prepare`: whole commands on small trees, run again, in several processes, on a full disk."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import preparation
import pytest
from hypersim_tree import write_tree
from preparation import SCENES, config, files, forget_what_was_asked, report

from ddm_training import frames, scene_jobs
from ddm_training.errors import InputError
from ddm_training.files import exclusive
from ddm_training.frames import open_scene, open_store
from ddm_training.hypersim import CAMERA_FILE, SPLIT_FILE
from ddm_training.jobs import EngineConfig, _collect, _until_one_dies, run_jobs
from ddm_training.prepare import write_hypersim_scene

tree = preparation.tree  # a fixture


# Good trees


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


@pytest.mark.parametrize("what", ["colour", "depth", "entity id"])
@pytest.mark.parametrize("older", [False, True])
def test_frames_are_added_when_the_file_that_they_lacked_was_downloaded(tree: Path, what: str, older: bool) -> None:
    lacking = [files(tree, frame, scene)[what] for scene in SCENES for frame in range(2)]
    for path in lacking:
        path.rename(path.with_suffix(".away"))
    with pytest.raises(InputError, match=rf"no frame was kept; rejected by reason: {{'no {what} file': 6}}"):
        config(tree).main()
    if older:
        forget_what_was_asked(tree.parent / "store")
    for path in lacking:
        path.with_suffix(".away").rename(path)
    config(tree).main()
    assert report(tree)["rejected"] == {}
    assert report(tree)["frames"] == 6


def test_frames_whose_file_went_away_while_they_were_read_are_added_when_it_is_back(tree: Path) -> None:
    path = files(tree)["colour"]
    jobs = config(tree).jobs()
    path.rename(path.with_suffix(".away"))
    write_hypersim_scene(jobs[0])
    path.with_suffix(".away").rename(path)
    config(tree).main()
    assert report(tree)["frames"] == 6


def test_a_scene_that_the_split_file_moved_is_made_again_for_its_new_split(tree: Path) -> None:
    config(tree).main()
    table = tree / SPLIT_FILE
    table.write_text(table.read_text().replace("train", "val"))
    config(tree).main()
    assert report(tree)["frames_by_split"] == {"val": 6}
    assert report(tree)["scenes_skipped"] == 1


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


def test_the_table_of_cameras_is_the_same_file_from_wherever_it_is_given(tree: Path, monkeypatch) -> None:
    (tree / CAMERA_FILE).rename(tree.parent / "cameras.csv")
    monkeypatch.chdir(tree)
    config(tree, camera_csv=Path("../cameras.csv")).main()
    monkeypatch.chdir(tree.parent)
    config(tree, camera_csv=Path("cameras.csv")).main()
    begun = tree.parent / "store" / "hypersim.options.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"camera_csv": "cameras.csv"}))
    config(tree, camera_csv=Path("cameras.csv")).main()  # an older store
    shutil.copy("cameras.csv", "others.csv")
    with pytest.raises(InputError, match="camera_csv was"):
        config(tree, camera_csv=Path("others.csv")).main()


def test_each_camera_becomes_a_scene_of_its_own(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "raw", {"ai_001_001": "train"}, cameras=("cam_00", "cam_01"))
    config(tree).main()
    assert [s.info.name for s in open_store(tmp_path / "store")] == ["ai_001_001_cam_00", "ai_001_001_cam_01"]


# The store and the machine


def test_a_full_disk_ends_with_a_message_leaves_no_half_scene_and_can_be_continued(tree: Path, monkeypatch) -> None:
    write, calls = frames._write_all, []

    def full(file: io.FileIO, array: np.ndarray) -> None:
        calls.append(array)
        if len(calls) > 7:  # three arrays of two frames a scene: the second scene does not fit
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, array)

    monkeypatch.setattr(frames, "_write_all", full)
    with pytest.raises(InputError, match=r"is full .* run the same command again; the 1 whole scenes are kept"):
        config(tree).main()
    assert [s.info.name for s in open_store(tree.parent / "store")] == ["ai_001_001_cam_00"]
    assert not list((tree.parent / "store").glob("ai_*.part"))
    monkeypatch.undo()
    config(tree).main()
    assert len(open_store(tree.parent / "store")) == 3


def test_a_scene_with_rejected_frames_needs_no_room_beyond_its_own(tree: Path, monkeypatch) -> None:
    files(tree)["colour"].unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=1, free=0))
    config(tree).main()
    assert report(tree)["rejected"] == {"no colour file": 1}
    assert len(open_scene(tree.parent / "store" / "ai_001_001_cam_00")) == 1


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


def test_a_process_that_dies_before_the_next_job_is_given_out_loses_no_job() -> None:
    class Pool(ProcessPoolExecutor):
        def submit(self, fn, /, *jobs, **_) -> Future:
            if jobs == (2,):
                raise BrokenProcessPool
            return Future()

    queue = iter([1, 2, 3])
    with pytest.raises(StopIteration) as ended:
        next(_until_one_dies(Pool(1), double, queue, 3))
    assert [job for _, job in ended.value.value] == [1, 2]
    assert [future.done() for future, _ in ended.value.value] == [False, True]
    assert list(queue) == [3]


def test_jobs_of_submitit_that_nobody_waits_for_are_cancelled() -> None:
    class Handle:
        cancelled = False

        def exception(self) -> Exception:
            return ValueError("unlucky")

        def cancel(self, check: bool) -> None:
            self.cancelled = True

    handles = [Handle(), Handle()]
    submitit = SimpleNamespace(helpers=SimpleNamespace(as_completed=lambda handles, poll_frequency: iter(handles)))
    with closing(_collect(dict(zip(handles, "ab")), submitit)) as outcomes:
        assert next(outcomes).job == "a"
    assert [handle.cancelled for handle in handles] == [False, True]


TWO_WORKERS = """
import sys, time
from pathlib import Path
from ddm_training.jobs import EngineConfig, run_jobs

def work(path):
    path.touch()
    time.sleep(600)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        for _ in run_jobs(work, [folder / "one", folder / "two"], EngineConfig(workers=2), folder):
            pass
    finally:
        (folder / "ended").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "two_workers.py").write_text(TWO_WORKERS)
    command = [sys.executable, str(tmp_path / "two_workers.py"), str(tmp_path)]
    path = os.pathsep.join([str(Path(scene_jobs.__file__).parents[1]), *sys.path])
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}) as process:
        while not ((tmp_path / "one").exists() and (tmp_path / "two").exists()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=120)  # to the end of its output, which its workers have open too
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    assert (tmp_path / "ended").exists() == (number == signal.SIGTERM)


def test_sigterm_is_as_it_was_when_all_jobs_are_done_or_given_up(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    outcomes = run_jobs(double, [1, 2], EngineConfig(), tmp_path)
    assert next(outcomes).result == 2
    assert signal.getsignal(signal.SIGTERM) != before
    outcomes.close()
    assert signal.getsignal(signal.SIGTERM) == before
    with closing(run_jobs(double, [1, 2], EngineConfig(), tmp_path)) as outcomes:
        next(outcomes)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_run_into_the_same_store_is_refused_while_the_first_is_at_work(tree: Path) -> None:
    store = tree.parent / "store"
    with (
        exclusive(store, "hypersim preparation", "--output"),
        pytest.raises(InputError, match=r"another hypersim preparation is writing into .*store"),
    ):
        config(tree).main()
    assert not list(store.glob("ai_*"))
    with exclusive(store, "frames-office preparation", "--output"):  # of other scenes
        config(tree).main()


def test_slurm_where_there_is_none_is_an_error_that_says_so(tree: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="found no sbatch"):
        config(tree, engine=EngineConfig(engine="slurm")).main()


def test_workers_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1, found 0"):
        EngineConfig(workers=0)


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
