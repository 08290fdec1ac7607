"""A job in a process of its own: `python -m diffusionerf_ns.bench.worker FOLDER`, where FOLDER holds `job.json`."""

import json
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path

from ddm_training.errors import InputError
from diffusionerf_ns.bench.jobs import Job, config_hash, configure
from diffusionerf_ns.bench.results import FAILED_FILE, FORMAT, Entry, FolderInUseError, lock, write_json

TASK_FILE = "job.json"
PROGRESS_FILE = "progress.json"
PROGRESS_SECONDS = 1.0
TRAIN_SHARE = 0.9  # of a job's progress bar
LOCK_SECONDS = 15.0


def write_task(folder: Path, job: Job, digest: str, pictures: int) -> None:
    """Say what the worker that is started on ``folder`` has to do.

    Raises:
        InputError: it cannot be written: the disk is full, say.
    """
    for name in (FAILED_FILE, PROGRESS_FILE):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / TASK_FILE, {"format": FORMAT, "job": job.to_dict(), "hash": digest, "pictures": pictures})


def read_progress(folder: Path) -> float:
    """How much of a running job is done, 0 to 1."""
    try:
        return float(json.loads((folder / PROGRESS_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return 0.0


def work(folder: Path) -> bool:
    """Do the job of ``folder``; leaves `result.json`, or `failed.json` with the reason. Says whether it went well."""
    try:
        _wait_for_lock_and_run(folder)
    except Exception as error:
        plain = isinstance(error, InputError)
        message = str(error) if plain else f"{type(error).__name__}: {error}"
        try:
            write_failure(folder, message, None if plain else traceback.format_exc())
        finally:  # into the log, also where the disk is full
            print(message if plain else traceback.format_exc(), file=sys.stderr, flush=True)
        return False
    finally:
        (folder / PROGRESS_FILE).unlink(missing_ok=True)
    return True


def work_on(folder: Path, environment: dict[str, str]) -> bool:
    """`work`, in a process that does nothing else.

    Args:
        folder: of the job.
        environment: of `engines.worker_environments`: the GPU and the threads to use.
    """
    os.environ.update(environment)  # in time: PyTorch is not imported yet
    return work(folder)


def write_failure(folder: Path, message: str, trace: str | None = None) -> None:
    """Record why a job failed.

    Raises:
        InputError: it cannot be written: the disk is full, say.
    """
    write_json(folder / FAILED_FILE, {"message": message, "traceback": trace})


def _wait_for_lock_and_run(folder: Path) -> None:
    """A worker of a run that was killed a moment ago may still hold the folder: wait a little before giving up."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            with lock(folder):
                _run(folder)
            return
        except FolderInUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _run(folder: Path) -> None:
    from diffusionerf_ns.bench.job import run

    task = json.loads((folder / TASK_FILE).read_text())
    job = Job.from_dict(task["job"])
    config = configure(job, folder)
    if config_hash(config) != task["hash"]:
        raise InputError(
            f"job {job.name}: this installation makes another configuration of it than the one that started it; run "
            "`diffusionerf-bench run` again with one installation."
        )
    Entry(job=job, hash=task["hash"], folder=folder).set_aside()
    for old in (folder / "pictures", config.get_base_dir()):
        shutil.rmtree(old, ignore_errors=True)
    last = 0.0

    def on_progress(phase: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            share = TRAIN_SHARE * done / total
            if phase == "evaluate":
                share = TRAIN_SHARE + (1.0 - TRAIN_SHARE) * done / total
            write_json(folder / PROGRESS_FILE, share)

    run(config, folder, job=job.to_dict(), pictures=task["pictures"], reuse=True, on_progress=on_progress)


def _end_with_parent() -> None:
    """End this process when the other end of standard input is gone: a killed run leaves no workers behind."""

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin: Python would wait for that reader at its own end
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    raise SystemExit(0 if work(Path(sys.argv[1])) else 1)
