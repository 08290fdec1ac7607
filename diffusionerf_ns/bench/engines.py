"""Where the jobs of a benchmark run: worker processes on this machine, or a SLURM array through submitit."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddm_training.errors import InputError
from diffusionerf_ns.bench import worker
from diffusionerf_ns.bench.results import FAILED_FILE, LOG_FILE, Entry, writing

Engine = Literal["local", "slurm", "submitit-local"]
POLL_SECONDS = 0.2
WORKER = (sys.executable, "-m", "diffusionerf_ns.bench.worker")
LOG_LINES = 15  # of a worker that died, in its failed.json


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where the jobs run."""

    engine: Engine = "local"
    """"local": processes of this machine. "slurm": an array of SLURM jobs. "submitit-local": the SLURM path with
    processes of this machine in place of the cluster, to try it out."""
    workers: int | None = None
    """Jobs at a time. Unset: one per GPU, or one on the CPU."""
    slurm_partition: str | None = None
    """Partition of the SLURM jobs."""
    slurm_minutes: int = 240
    """Time limit of one SLURM job."""
    slurm_mem_gb: float = 32.0
    """Memory of one SLURM job."""
    slurm_cpus: int = 8
    """CPU cores of one SLURM job."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--engine.workers must be at least 1, found {self.workers}.")


def run_entries(
    entries: Sequence[Entry], config: EngineConfig, log_dir: Path, tick: Callable[[], None]
) -> Iterator[tuple[Entry, bool]]:
    """Run jobs whose task files are written; yields each with whether it went well, as they end.

    A worker that dies without a word (killed, out of memory) is recorded in its `failed.json`.

    Args:
        entries: jobs to run, started in this order.
        config: where.
        log_dir: for submitit's own files.
        tick: called several times a second.

    Raises:
        InputError: a file cannot be written: the disk is full, say; or submitit is missing or finds no cluster.
    """
    if not entries:
        return iter(())
    if config.engine == "local":
        return _run_local(entries, worker_environments(config.workers), tick)
    return _run_submitit(entries, config, log_dir, tick)


def worker_environments(workers: int | None, gpus: Sequence[str] | None = None) -> list[dict[str, str]]:
    """What is added to the environment of each local worker: its GPU if there are any, and its share of the CPU cores.

    Args:
        workers: how many; None for one per GPU, or one.
        gpus: names of the GPUs as CUDA_VISIBLE_DEVICES has them; None looks.
    """
    gpus = _visible_gpus() if gpus is None else list(gpus)
    count = workers or len(gpus) or 1
    # Several must share the cores, or they hinder each other: stereo runs on the CPU beside a GPU too.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // count))
    share = {"OMP_NUM_THREADS": threads}
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} | (share if count > 1 else {}) for i in range(count)]
    return [share] * count


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _visible_gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _run_local(
    entries: Sequence[Entry], environments: list[dict[str, str]], tick: Callable[[], None]
) -> Iterator[tuple[Entry, bool]]:
    queue, free = list(entries), list(environments)
    running: list[tuple[Entry, subprocess.Popen[bytes], dict[str, str]]] = []
    try:
        while queue or running:
            while free and (entry := _next(queue, {item[0].training for item in running})) is not None:
                queue.remove(entry)
                environment = free.pop(0)
                running.append((entry, _start(entry, environment), environment))
            ended = [item for item in running if item[1].poll() is not None]
            for item in ended:
                entry, process, environment = item
                running.remove(item)
                free.append(environment)
                _close(process)
                well = entry.status() == "done"
                if not well:
                    _record_death(entry, process.returncode)
                yield entry, well
            tick()
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        for _, process, _ in running:
            process.kill()
        for _, process, _ in running:
            process.wait()
            _close(process)


def _next(queue: Sequence[Entry], in_training: Collection[str]) -> Entry | None:
    """The first job that does not need the weights which another one is training at the moment."""
    return next((entry for entry in queue if not entry.training or entry.training not in in_training), None)


def _start(entry: Entry, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    path = entry.folder / LOG_FILE
    with writing(path):
        opened = path.open("wb")
    with opened as log:
        return subprocess.Popen(
            [*WORKER, str(entry.folder)],
            stdin=subprocess.PIPE,  # the worker ends when this end is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )


def _close(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()


def _record_death(entry: Entry, code: int) -> None:
    """A worker writes its own `failed.json`, unless it was killed."""
    if (entry.folder / FAILED_FILE).is_file():
        return
    how = f"ended by signal {-code}" if code < 0 else f"ended with exit status {code}"
    hint = " (out of memory?)" if code == -9 else ""
    try:
        tail = (entry.folder / LOG_FILE).read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        tail = []
    worker.write_failure(entry.folder, f"the job's process {how}{hint}", "\n".join(tail))


def _run_submitit(
    entries: Sequence[Entry], config: EngineConfig, log_dir: Path, tick: Callable[[], None]
) -> Iterator[tuple[Entry, bool]]:
    try:
        import submitit
    except ImportError as error:
        raise InputError(
            f"--engine.engine {config.engine} needs the package submitit: pip install 'diffusionerf-ns[cluster]'."
        ) from error
    with writing(log_dir):
        log_dir.mkdir(parents=True, exist_ok=True)
    on_slurm = config.engine == "slurm"
    try:
        executor = submitit.AutoExecutor(log_dir, cluster="slurm" if on_slurm else "local")
    except RuntimeError as error:
        raise InputError(f"--engine.engine {config.engine}: {error}.") from error
    executor.update_parameters(
        timeout_min=config.slurm_minutes, mem_gb=config.slurm_mem_gb, cpus_per_task=config.slurm_cpus
    )
    if on_slurm:
        executor.update_parameters(
            gpus_per_node=1,
            slurm_array_parallelism=config.workers or 64,
            slurm_job_name="diffusionerf-bench",
            **({"slurm_partition": config.slurm_partition} if config.slurm_partition else {}),
        )
    # The local executor hides GPUs from jobs that do not ask, and starts all that it is given at once.
    environments = [{}] * len(entries) if on_slurm else worker_environments(config.workers)
    for start in range(0, len(entries), len(environments)):
        chunk = entries[start : start + len(environments)]
        folders = [entry.folder for entry in chunk]
        handles = executor.map_array(worker.work_on, folders, environments[: len(chunk)])
        yield from _collect(dict(zip(handles, chunk)), tick)


def _collect(flying: dict[Any, Entry], tick: Callable[[], None]) -> Iterator[tuple[Entry, bool]]:
    try:
        while flying:
            for handle in [h for h in flying if h.done()]:
                entry, error = flying.pop(handle), handle.exception()
                well = entry.status() == "done"
                if not well and not (entry.folder / FAILED_FILE).is_file():
                    worker.write_failure(entry.folder, f"the cluster's job failed: {error}")
                yield entry, well
            tick()
            time.sleep(POLL_SECONDS)
    finally:
        for handle in flying:
            handle.cancel()
