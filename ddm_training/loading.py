"""Batches of a training, prepared ahead by worker processes."""

import multiprocessing.process
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddm_training.errors import InputError
from ddm_training.loop_config import LoopConfig
from ddm_training.stopping import ignore_signals

if TYPE_CHECKING:
    from typing_extensions import Self


class StepBatches(Dataset):
    """The batches of one process as a map from step to batch, for a DataLoader whose sampler is a range of steps.

    Args:
        draw: gives samples ``first`` ... ``first + count - 1`` of a step, called with these three by name.
        steps: in all.
        batch_size: of each process.
        rank: of this process.
    """

    def __init__(self, draw: Callable[..., dict[str, Tensor]], *, steps: int, batch_size: int, rank: int = 0) -> None:
        self.draw, self.steps, self.batch_size = draw, steps, batch_size
        self.first = rank * batch_size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor] | InputError:
        try:
            return self.draw(step=step, first=self.first, count=self.batch_size)
        except InputError as error:  # raised across processes, PyTorch would make a traceback its message
            return error


class WorkerKilledError(InputError):
    """A process that prepares samples is gone."""


class Loader:
    """The batches of one process, one `next` a step; ends the processes that prepare them with its `with`.

    Args:
        config: of the training.
        batches: from step to batch, see `StepBatches`.
        start: the first step.
    """

    def __init__(self, config: LoopConfig, batches: Dataset, start: int) -> None:
        self._child_signal = None
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            self._child_signal = signal.getsignal(signal.SIGCHLD)
        self._batches: Iterator[Any] | None = None
        self._workers: list[multiprocessing.process.BaseProcess] = []
        others = multiprocessing.active_children()
        try:
            try:
                self._batches = make_loader(config, batches, start)
            finally:
                self._workers = [child for child in multiprocessing.active_children() if child not in others]
        except BaseException:
            self.__exit__()
            raise
        if self._child_signal is not None:
            # PyTorch's handler raises wherever the loop just is, in the middle of an optimiser's step say. Without it
            # the next batch that does not come tells of a dead worker.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def __next__(self) -> dict[str, Tensor]:
        """The batch of the next step.

        Raises:
            WorkerKilledError: a process that prepares batches was killed.
            InputError: as raised by what draws the samples.
        """
        assert self._batches is not None
        try:
            batch = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            if not _is_of_dead_worker(error):
                raise
            raise WorkerKilledError(
                "a process that prepares samples was killed, likely for want of memory, or of shared memory "
                "(/dev/shm): give fewer --dataloader-num-workers, and run again to go on."
            ) from error
        if isinstance(batch, InputError):
            raise batch
        return batch

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self._batches = None  # ends its workers, but for one that misses the word
        end(self._workers)
        if self._child_signal is not None:
            signal.signal(signal.SIGCHLD, self._child_signal)


_DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)"
    r"|Pin memory thread exited unexpectedly"  # PyTorch's own, which takes the batches where a GPU trains
)


def _is_of_dead_worker(error: Exception) -> bool:
    """Whether a worker was found dead, by PyTorch or amid handing a batch over; not what it raised itself."""
    if isinstance(error, RuntimeError):
        return _DEAD_WORKER.search(str(error)) is not None
    if "in DataLoader worker process" in str(error):
        return False
    # Of its socket: reset, closed, or gone from the disk; a missing file of the user's has a name.
    return isinstance(error, (ConnectionError, EOFError)) or (
        isinstance(error, FileNotFoundError) and error.filename is None
    )


def make_loader(config: LoopConfig, batches: Dataset, start: int) -> Iterator[Any]:
    """Batches from step ``start`` on, prepared ahead by worker processes."""
    from torch.utils.data import DataLoader

    workers = config.dataloader_num_workers
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(start, config.max_train_steps),
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available() and config.device == "auto",
        )
    )


def end(workers: Sequence[multiprocessing.process.BaseProcess]) -> None:
    """Kill what is left of a loader's workers: they ignore SIGTERM, and Python would wait for them for ever."""
    for worker in workers:
        worker.join(timeout=1.0)
        worker.kill()
