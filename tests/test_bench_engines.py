"""How the jobs of a benchmark are run, with a worker that only pretends."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bench_runs import fake_result, make_job, small_prior

from ddm_training.errors import InputError
from diffusionerf_ns.bench import engines, results, worker
from diffusionerf_ns.bench.engines import EngineConfig, worker_environments
from diffusionerf_ns.bench.jobs import config_hash, configure, read_jobs
from diffusionerf_ns.bench.run import RunConfig, run_benchmark

PRETENDER = """
import json, os, sys, time
from pathlib import Path
from diffusionerf_ns.bench import results, worker
worker._end_with_parent()
folder = Path(sys.argv[1])
task = json.loads((folder / worker.TASK_FILE).read_text())
seed = task["job"]["seed"]
(folder / "tries").open("a").write(f"{os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
if seed == 13:
    print("about to die"); sys.stdout.flush(); os.kill(os.getpid(), 9)
if seed == 14:
    worker.write_failure(folder, "no views"); sys.exit(1)
time.sleep(0.2)
results.write_json(folder / "result.json", json.loads(sys.argv[2]) | {"hash": task["hash"], "job": task["job"]})
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], list[results.Entry]]:
    """Makes jobs of the given seeds whose worker is `PRETENDER`."""
    script = tmp_path / "pretender.py"
    content = json.dumps(fake_result(make_job(tmp_path), "h", psnr=20.0, ssim=0.5))
    script.write_text(PRETENDER.replace("sys.argv[2]", repr(content)))
    monkeypatch.setattr(engines, "WORKER", (sys.executable, str(script)))

    def make(seeds: list[int]) -> list[results.Entry]:
        jobs = [make_job(tmp_path, seed=seed) for seed in seeds]
        entries = [results.Entry(job=job, hash="h", folder=tmp_path / "out" / job.name) for job in jobs]
        for entry in entries:
            worker.write_task(entry.folder, entry.job, entry.hash, pictures=1)
        return entries

    return make


def test_a_failing_and_a_killed_job_are_recorded_and_the_others_go_on(
    pretend: Callable[[list[int]], list[results.Entry]], tmp_path: Path
) -> None:
    entries = pretend([0, 13, 14, 1])
    ended = {
        e.job.seed: well for e, well in engines.run_entries(entries, EngineConfig(workers=2), tmp_path, lambda: None)
    }
    assert ended == {0: True, 13: False, 14: False, 1: True}
    killed, failed = (json.loads((entries[i].folder / results.FAILED_FILE).read_text()) for i in (1, 2))
    assert "signal 9" in killed["message"]
    assert "about to die" in killed["traceback"]
    assert failed["message"] == "no views"
    assert [e.status() for e in entries] == ["done", "failed", "failed", "done"]


def test_jobs_that_share_a_training_are_not_started_beside_one_another(
    pretend: Callable[[list[int]], list[results.Entry]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [replace(entry, training=name) for entry, name in zip(pretend([0, 1, 2, 3]), ["a", "a", "b", "a"])]
    alive: list[results.Entry] = []
    seen: list[tuple[int, list[int]]] = []
    start = engines._start

    def spy(entry: results.Entry, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        seen.append((entry.job.seed, [other.job.seed for other in alive]))
        alive.append(entry)
        return start(entry, environment)

    monkeypatch.setattr(engines, "_start", spy)
    for ended, well in engines.run_entries(entries, EngineConfig(workers=2), tmp_path, lambda: None):
        assert well
        alive.remove(ended)
    assert seen[:2] == [(0, []), (2, [0])], "the second has to wait for the first, the third has not"
    names = {entry.job.seed: entry.training for entry in entries}
    assert all(names[seed] not in {names[other] for other in beside} for seed, beside in seen)
    assert sorted(seed for seed, _ in seen) == [0, 1, 2, 3]


@pytest.mark.parametrize("engine", ["local", "slurm", "submitit-local"])
def test_where_every_job_is_done_no_engine_has_anything_to_do(engine: engines.Engine, tmp_path: Path) -> None:
    config = EngineConfig(engine=engine)
    assert list(engines.run_entries([], config, tmp_path / "submitit", lambda: None)) == []
    assert not (tmp_path / "submitit").exists()


def test_a_worker_ends_when_the_run_that_started_it_is_gone() -> None:
    code = "import time; from diffusionerf_ns.bench.worker import _end_with_parent\n"
    code += "_end_with_parent(); print('on', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=20) == 3
    process.stdout.close()


def test_each_gpu_gets_its_worker_and_all_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engines, "_cores", lambda: 6)
    assert worker_environments(None, gpus=["2", "5"]) == [
        {"CUDA_VISIBLE_DEVICES": "2", "OMP_NUM_THREADS": "3"},
        {"CUDA_VISIBLE_DEVICES": "5", "OMP_NUM_THREADS": "3"},
    ]
    names = [e["CUDA_VISIBLE_DEVICES"] for e in worker_environments(4, gpus=["2", "5"])]
    assert names == ["2", "5", "2", "5"]
    assert worker_environments(None, gpus=[]) == [{"OMP_NUM_THREADS": "6"}]
    assert worker_environments(4, gpus=[]) == [{"OMP_NUM_THREADS": "1"}] * 4


@pytest.mark.parametrize(
    ("gpus", "workers", "given"), [([], None, ["6 None"] * 3), (["2", "GPU-1f"], 3, ["2 2", "2 GPU-1f", "2 2"])]
)
def test_jobs_of_submitits_local_executor_get_a_gpu_each_and_share_the_cores(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pretend: Callable[[list[int]], list[results.Entry]],
    gpus: list[str],
    workers: int | None,
    given: list[str],
) -> None:
    """It hides them by itself, and jobs would train on the CPU."""
    pytest.importorskip("submitit")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engines, "_visible_gpus", lambda: gpus)
    monkeypatch.setattr(engines, "_cores", lambda: 6)

    def note(folder: Path, environment: dict[str, str]) -> None:
        (folder / "given").write_text(f"{environment['OMP_NUM_THREADS']} {environment.get('CUDA_VISIBLE_DEVICES')}")

    monkeypatch.setattr(worker, "work_on", note)  # a local function goes to the job by value
    entries, config = pretend([1, 2, 3]), EngineConfig(engine="submitit-local", workers=workers)
    done = [entry for entry, _ in engines._run_submitit(entries, config, tmp_path, int)]
    assert {entry.folder for entry in done} == {entry.folder for entry in entries}
    assert [(entry.folder / "given").read_text() for entry in entries] == given


def test_a_job_on_a_gpu_sees_that_one_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(worker, "work", lambda folder: folder == tmp_path and os.environ["CUDA_VISIBLE_DEVICES"] == "5")
    assert worker.work_on(tmp_path, {"CUDA_VISIBLE_DEVICES": "5"})


def test_running_again_does_only_what_is_missing(
    pretend: Callable[[list[int]], list[results.Entry]], tmp_path: Path
) -> None:
    pretend([])
    small_prior(tmp_path / "prior")
    jobs = [make_job(tmp_path, seed=seed) for seed in (0, 1, 14)]
    failed = run_benchmark(jobs, tmp_path / "out", EngineConfig(workers=2))
    assert [entry.job.seed for entry in failed] == [14]
    tries = {job.seed: tmp_path / "out" / job.name / "tries" for job in jobs}
    (tmp_path / "out" / jobs[1].name / results.RESULT_FILE).unlink()
    run_benchmark(jobs, tmp_path / "out", EngineConfig())
    assert {seed: len(path.read_text().splitlines()) for seed, path in tries.items()} == {0: 1, 1: 2, 14: 2}


def test_going_back_to_settings_that_were_run_before_takes_their_results_back(
    pretend: Callable[[list[int]], list[results.Entry]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend([])
    small_prior(tmp_path / "prior")

    def run_of(steps: int) -> str:
        assert run_benchmark([make_job(tmp_path, steps=steps)], tmp_path / "out", EngineConfig()) == []
        return " ".join(capsys.readouterr().out.split())

    folder = tmp_path / "out" / make_job(tmp_path).name
    run_of(500)
    first = results.read_result(folder)
    assert first is not None
    said = run_of(400)
    assert "1 of those to do were done with other settings" in said
    assert f"as result.<hash>.json, its pictures and weights are replaced: {make_job(tmp_path).name}" in said
    # the pretender writes over the result, which a worker would have set aside
    results.write_json(folder / f"result.{first['hash']}.json", first | {"pictures": [{"name": "a.png"}]})
    second = results.read_result(folder)
    assert second is not None
    said = run_of(500)
    assert "1 jobs: 1 done, 0 to do 1 of those done were set aside before and are taken back, without pictures" in said
    assert results.read_result(folder) == first | {"pictures": [], "config_file": None}
    assert results.read_result(folder, f"result.{second['hash']}.json") == second
    assert not (folder / f"result.{first['hash']}.json").exists()
    assert len((folder / "tries").read_text().splitlines()) == 2, "it was not done again"
    assert "taken back" not in run_of(500)
    run_of(400)
    assert len((folder / "tries").read_text().splitlines()) == 2


def test_a_result_of_other_settings_is_set_aside_when_the_job_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_prior(tmp_path / "prior")
    job, folder = make_job(tmp_path), tmp_path / "job"
    before = fake_result(job, "other")
    results.write_json(folder / results.RESULT_FILE, before)
    (folder / "pictures").mkdir()

    def begun(*_: object, **__: object) -> None:
        assert results.read_result(folder, "result.other.json") == before
        assert not (folder / results.RESULT_FILE).exists()
        assert not (folder / "pictures").exists()

    monkeypatch.setattr("diffusionerf_ns.bench.job.run", begun)
    worker.write_task(folder, job, "not that of the job", pictures=1)
    assert not worker.work(folder)
    assert results.read_result(folder) == before, "it had not begun"
    worker.write_task(folder, job, config_hash(configure(job, folder)), pictures=1)
    assert worker.work(folder)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_that_a_full_disk_keeps_from_being_recorded_ends_a_run_plainly(
    pretend: Callable[[list[int]], list[results.Entry]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = pretend([0, 13])
    monkeypatch.setattr("ddm_training.files.os.replace", full)
    with pytest.raises(InputError, match=r"seed-13/failed.json could not be written .*No space left.*are kept: make"):
        list(engines.run_entries(entries, EngineConfig(workers=1), tmp_path, lambda: None))
    assert [entry.status() for entry in entries] == ["done", "missing"]


def test_a_run_that_cannot_write_a_file_of_its_own_names_it(
    pretend: Callable[[list[int]], list[results.Entry]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = pretend([0])
    with monkeypatch.context() as patch:
        patch.setattr("ddm_training.files.os.replace", full)
        with pytest.raises(InputError, match=r"job.json could not be written .*No space left"):
            worker.write_task(entry.folder, entry.job, entry.hash, pictures=1)
    (entry.folder / results.LOG_FILE).mkdir()
    with pytest.raises(InputError, match=r"log.txt could not be written .*directory"):
        list(engines.run_entries([entry], EngineConfig(workers=1), tmp_path, lambda: None))
    (tmp_path / "submitit").touch()
    config = EngineConfig(engine="submitit-local", workers=1)
    with pytest.raises(InputError, match=r"submitit could not be written"):
        list(engines.run_entries([entry], config, tmp_path / "submitit", lambda: None))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_lock_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").symlink_to("/dev/full")
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    with pytest.raises(InputError, match=r"\.lock could not be written"), results.lock(tmp_path):
        pass


def test_a_missing_prior_stops_a_run_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prior"):
        run_benchmark([make_job(tmp_path)], tmp_path / "out", EngineConfig())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_a_job_list_that_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunConfig(output=tmp_path / "out", data=(tmp_path / "a",), seeds=(0, 1), dry_run=True).main()
    path = tmp_path / "jobs.json"
    path.write_text(capsys.readouterr().out)
    assert [job.seed for job in read_jobs(path)] == [0, 1]
    assert not (tmp_path / "out").exists()
