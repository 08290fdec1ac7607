"""Training where the disk is full or a folder cannot be made: it ends with what could not be written."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_training
from toy_training import config, flags

from ddm_training import checkpoints
from ddm_training.errors import InputError
from ddm_training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
store = toy_training.store  # a fixture


def full(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ended(monkeypatch) -> list[bool]:
    """Grows when a training tells accelerate that it ends."""
    from accelerate import Accelerator

    told: list[bool] = []
    monkeypatch.setattr(Accelerator, "end_training", lambda self: told.append(True))
    return told


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("ddm_training.files.os.replace", "log.jsonl"),
        ("torch.utils.tensorboard.SummaryWriter.__init__", "tensorboard"),
        ("torch.utils.tensorboard.SummaryWriter.add_scalar", "tensorboard"),
        ("torch.utils.tensorboard.SummaryWriter.close", "tensorboard"),
        ("matplotlib.figure.Figure.savefig", "curves.png"),
    ],
)
def test_a_full_disk_ends_a_training_with_what_could_not_be_written(store, tmp_path, monkeypatch, place, name):
    train(config(store, tmp_path, max_train_steps=1))
    monkeypatch.setattr(place, full)
    told = ended(monkeypatch)
    with pytest.raises(InputError, match=rf"{name} could not be written .*No space left.*make room"):
        train(config(store, tmp_path, max_train_steps=3))
    assert told or place.endswith(("replace", "__init__"))  # these two end it before it begins
    assert checkpoints.list_checkpoints(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_line_that_does_not_fit_into_the_log_ends_a_training_plainly(store, tmp_path, monkeypatch):
    monkeypatch.setattr("ddm_training.progress.truncate_log", lambda path, step: path.symlink_to("/dev/full"))
    with pytest.raises(InputError, match=r"log.jsonl could not be written .*No space left"):
        train(config(store, tmp_path))


def test_a_folder_that_cannot_be_made_is_named(store, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=r"--output-dir .*taken/run cannot be made"):
        train(config(store, tmp_path / "taken" / "run"))


def test_what_ends_a_training_is_told_and_not_what_then_fails_as_well(store, tmp_path, monkeypatch):
    told = ended(monkeypatch)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)
    with pytest.raises(InputError, match="training stopped"):
        train(config(store, tmp_path, learning_rate=1e30, lr_warmup_steps=0))
    assert told == [True]


@pytest.mark.slow
def test_the_command_ends_plainly_where_files_cannot_grow(store, tmp_path):
    limit = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, "-m", "ddm_training.cli"]
    words = flags(store, tmp_path, logging_steps=1, max_train_steps=40, checkpointing_steps=100)
    run = subprocess.run([*limit, *words], capture_output=True, text=True)
    assert run.returncode == 2
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "could not be written" in last
    assert "Traceback" not in run.stderr
