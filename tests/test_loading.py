"""Batches that worker processes prepare, where one of those fails."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import toy_training
from accelerate import Accelerator
from toy_training import assert_same_weights, config, state

from ddm_training.checkpoints import list_checkpoints
from ddm_training.errors import InputError
from ddm_training.loading import Loader, StepBatches, WorkerKilledError
from ddm_training.loop import require_same_start
from ddm_training.train import PatchTask, train

pytestmark = pytest.mark.usefixtures("one_thread")
store = toy_training.store  # a fixture


@pytest.fixture
def fails_at_step(monkeypatch):
    """Lets a worker do something before it draws the samples of a step."""
    draw, own = PatchTask.draw, os.getpid()

    def prepare(step: int, act) -> None:
        def drawn(self, **place):
            if place["step"] == step and os.getpid() != own:
                act()
            return draw(self, **place)

        monkeypatch.setattr(PatchTask, "draw", drawn)

    return prepare


def test_a_killed_worker_ends_a_training_with_a_checkpoint(store, tmp_path, fails_at_step):
    small = {"max_train_steps": 4, "checkpointing_steps": 100}
    train(config(store, tmp_path / "whole", **small))
    before = signal.getsignal(signal.SIGCHLD)
    fails_at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match=r"was killed, .*fewer --dataloader-num-workers, and run again"):
        train(config(store, tmp_path / "killed", **small, dataloader_num_workers=1))
    assert signal.getsignal(signal.SIGCHLD) == before
    ((step, _),) = list_checkpoints(tmp_path / "killed")
    assert step in (2, 3)  # with the worker may go a batch that it had made
    train(config(store, tmp_path / "killed", **small))
    assert_same_weights(state(tmp_path / "whole", 4), state(tmp_path / "killed", 4))


def test_a_process_that_is_left_by_another_saves_a_checkpoint(store, tmp_path, monkeypatch):
    small = {"max_train_steps": 4, "checkpointing_steps": 100}
    train(config(store, tmp_path / "whole", **small))
    backward = Accelerator.backward
    calls: list[bool] = []

    def left(self, loss) -> None:
        backward(self, loss)
        calls.append(True)
        if len(calls) == 3:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.1.1]:37241")

    for world, steps in ((2, [2]), (1, [])):
        calls.clear()
        folder = tmp_path / str(world)
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "num_processes", world)
            patch.setattr(Accelerator, "backward", left)
            with pytest.raises(RuntimeError, match="closed by peer"):
                train(config(store, folder, **small))
        assert [step for step, _ in list_checkpoints(folder)] == steps
    train(config(store, tmp_path / "2", **small))
    assert_same_weights(state(tmp_path / "whole", 4), state(tmp_path / "2", 4))


def test_a_training_ends_its_own_workers_alone(store, tmp_path):
    other = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
    other.start()
    batches = StepBatches(lambda **_: {}, steps=4, batch_size=1)
    try:
        with Loader(config(store, tmp_path, dataloader_num_workers=2), batches, 0) as loader:
            next(loader)
            own = [child for child in multiprocessing.active_children() if child is not other]
            assert len(own) == 2
        assert not any(child.is_alive() for child in own)
        other.join(timeout=0.5)  # had it been killed, it would be gone now
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


@pytest.mark.parametrize(
    ("error", "dead"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), True),  # killed while it handed a batch over
        (EOFError(), True),
        (FileNotFoundError(2, "No such file or directory"), True),
        (FileNotFoundError(2, "No such file or directory", "scene/depth.npy"), False),
        (EOFError("Caught EOFError in DataLoader worker process 0."), False),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("Pin memory thread exited unexpectedly"), True),  # the same, on a GPU's machine
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_what_tells_of_a_dead_worker(store, tmp_path, error, dead):
    def raising():
        raise error
        yield

    with Loader(config(store, tmp_path), StepBatches(dict, steps=1, batch_size=1), 0) as loader:
        loader._batches = raising()
        with pytest.raises(WorkerKilledError if dead else type(error)) as caught:
            next(loader)
    assert isinstance(caught.value, InputError) == dead


def test_processes_that_would_begin_at_different_steps_are_refused():
    def processes(*starts: int) -> SimpleNamespace:
        return SimpleNamespace(num_processes=len(starts), device="cpu", gather=lambda own: torch.tensor(starts))

    for same in (processes(4), processes(4, 4)):
        require_same_start(4, same)
    with pytest.raises(InputError, match=r"begin at steps \[4, 0\]: --output-dir must be the same folder for all"):
        require_same_start(4, processes(4, 0))


def test_what_a_worker_finds_wrong_is_told_without_its_traceback(store, tmp_path, fails_at_step):
    def refuse() -> None:
        raise InputError("frame 7 is damaged")

    fails_at_step(1, refuse)
    with pytest.raises(InputError, match=r"^frame 7 is damaged$"):
        train(config(store, tmp_path, dataloader_num_workers=1))
