"""Run a list of independent jobs: here, on the processes of this machine, or as a SLURM array through submitit."""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from ddm_training.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")
Engine = Literal["local", "slurm", "submitit-local"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where the jobs run."""

    engine: Engine = "local"
    """"local": processes of this machine. "slurm": an array of SLURM jobs. "submitit-local": the SLURM path with
    processes of this machine in place of the cluster, to try it out."""
    workers: int = 1
    """Number of processes, or of SLURM jobs at a time."""
    slurm_partition: str | None = None
    """Partition of the SLURM jobs."""
    slurm_minutes: int = 240
    """Time limit of one SLURM job (one scene)."""
    slurm_mem_gb: float = 4.0
    """Memory of one SLURM job."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"workers must be at least 1, found {self.workers}.")


class ProcessDiedError(RuntimeError):
    """The process of a job is gone, and with it what the job had done."""


@dataclass(frozen=True)
class Outcome(Generic[Job, Result]):
    """What became of a job: its result, or the exception that ended it."""

    job: Job
    result: Result | None
    error: BaseException | None


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], config: EngineConfig, log_dir: Path
) -> Generator[Outcome[Job, Result], None, None]:
    """Call ``function`` on each job and yield outcomes as they come, in no fixed order.

    A job that raises, or whose process dies (out of memory, a crash in a library), is an outcome with an error; the
    others go on. ``function`` and jobs must be picklable. SIGTERM raises `SystemExit` in the meantime. The processes of
    this machine end with this one; jobs of submitit are cancelled, unless this one is killed.

    Args:
        function: a module-level function.
        jobs: its arguments.
        config: where to run.
        log_dir: for submitit's scripts and logs; not used by the local engine.
    """
    with _sigterm_as_exit() as terminated:
        if config.engine != "local":
            yield from _run_submitit(function, jobs, config, log_dir)
        elif config.workers == 1 or len(jobs) == 1:
            yield from (_call(function, job) for job in jobs)
        else:
            yield from _run_pool(function, jobs, config.workers, terminated)


@contextmanager
def _sigterm_as_exit() -> Iterator[threading.Event]:
    """Let SIGTERM raise `SystemExit`, so that what is at work cleans up, where it would end the process at once.

    Yields whether it came.
    """
    terminated = threading.Event()

    def end(number: int, frame: object) -> None:
        terminated.set()
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # others may not choose
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield terminated
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(function: Callable[[Job], Result], job: Job) -> Outcome[Job, Result]:
    try:
        return Outcome(job, function(job), None)
    except Exception as error:
        return Outcome(job, None, error)


@contextmanager
def _pool(workers: int, terminated: threading.Event) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, however it ends, and at once where it was ``terminated``; else when their job
    is done."""
    context = multiprocessing.get_context("spawn")  # forking what has threads (progress bar, torch) can deadlock
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent, initargs=(watched,))
    try:
        yield pool
    finally:
        if terminated.is_set():
            held.close()
        pool.shutdown(wait=True, cancel_futures=True)
        held.close()
        watched.close()


def _end_with_parent(watched: Connection) -> None:
    """End this process when the other end of a pipe, which its parent alone has, is closed. A scene that it was
    writing stays behind as a part, as after any kill."""

    def watch() -> None:
        with suppress(EOFError, OSError):
            watched.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_pool(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int, terminated: threading.Event
) -> Iterator[Outcome[Job, Result]]:
    """At most ``workers`` jobs are in flight, so that when a process dies the suspects are few: each is run again
    in a process of its own, which tells the guilty one."""
    queue = iter(jobs)
    while True:
        with _pool(workers, terminated) as pool:
            suspects = yield from _until_one_dies(pool, function, queue, workers)
        if not suspects:
            return
        for future, job in suspects:
            yield _rerun_alone(function, job, future, terminated)


def _until_one_dies(
    pool: ProcessPoolExecutor, function: Callable[[Job], Result], queue: Iterator[Job], workers: int
) -> Generator[Outcome[Job, Result], None, list[tuple[Future[Result], Job]]]:
    """Outcomes until the queue is done, or a process died; returns what was in flight then, or was about to be."""
    flying: dict[Future[Result], Job] = {}
    while True:
        while len(flying) < workers and (job := next(queue, None)) is not None:
            try:
                flying[pool.submit(function, job)] = job
            except BrokenProcessPool as error:  # one died since the last look
                (never := Future()).set_exception(error)
                return [*flying.items(), (never, job)]
        if not flying:
            return []
        done, _ = wait(flying, return_when=FIRST_COMPLETED)
        if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
            return list(flying.items())
        for future in done:
            job, error = flying.pop(future), future.exception()
            yield Outcome(job, None if error else future.result(), error)


def _rerun_alone(
    function: Callable[[Job], Result], job: Job, future: Future[Result], terminated: threading.Event
) -> Outcome[Job, Result]:
    if future.done() and future.exception() is None:
        return Outcome(job, future.result(), None)
    with _pool(1, terminated) as pool:
        alone = pool.submit(function, job)
        error = alone.exception()
    if isinstance(error, BrokenProcessPool):
        error = ProcessDiedError("the process died (killed, out of memory, or a crash in a library)")
    return Outcome(job, None if error else alone.result(), error)


def _run_submitit(
    function: Callable[[Job], Result], jobs: Sequence[Job], config: EngineConfig, log_dir: Path
) -> Iterator[Outcome[Job, Result]]:
    try:
        import submitit
    except ImportError as error:
        raise InputError(
            f"--engine {config.engine} needs the package submitit: pip install 'diffusionerf-ns[cluster]'."
        ) from error
    if config.engine == "slurm" and shutil.which("sbatch") is None:
        raise InputError("--engine slurm found no sbatch: run it on a machine of the cluster, or use --engine local.")
    log_dir.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(log_dir, cluster="slurm" if config.engine == "slurm" else "local")
    executor.update_parameters(timeout_min=config.slurm_minutes, mem_gb=config.slurm_mem_gb, cpus_per_task=1)
    call = partial(_call, function)  # so that a job's exception comes back as itself, not as submitit's text of it
    if config.engine == "slurm":
        executor.update_parameters(
            slurm_array_parallelism=config.workers,
            slurm_job_name="ddm",
            **({"slurm_partition": config.slurm_partition} if config.slurm_partition else {}),
        )
        yield from _collect(dict(zip(executor.map_array(call, jobs), jobs)), submitit)
        return
    for start in range(0, len(jobs), config.workers):  # the local executor starts all it gets at once
        batch = jobs[start : start + config.workers]
        yield from _collect({executor.submit(call, job): job for job in batch}, submitit)


def _collect(flying: dict[Any, Job], submitit: Any) -> Generator[Outcome[Job, Any], None, None]:
    """Outcomes as they come; jobs that are left when nobody asks any more, or at a signal, are cancelled."""
    try:
        for handle in submitit.helpers.as_completed(list(flying), poll_frequency=0.2):
            error, job = handle.exception(), flying.pop(handle)
            yield Outcome(job, None, error) if error else handle.result()
    finally:
        for handle in flying:
            handle.cancel(check=False)  # the others too, where one cannot be
