"""Checkpoints: atomic, kept, found again, and named where they are damaged."""

import errno
from pathlib import Path

import pytest
import torch

from ddm_training import checkpoints
from ddm_training.errors import InputError
from ddm_training.progress import truncate_log


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoints.save_checkpoint(tmp_path, 1, {"model": torch.ones(3)}, {"preset": "tiny"}, limit=1)

    def half_written(state, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", half_written)
    with pytest.raises(InputError, match="No space left on device"):
        checkpoints.save_checkpoint(tmp_path, 2, {"model": torch.ones(3)}, {"preset": "tiny"}, limit=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    loaded, _ = checkpoints.load_checkpoint(tmp_path / "checkpoint-1", {"preset": "tiny"}, {"preset": None})
    assert torch.equal(loaded["model"], torch.ones(3))


def test_the_checkpoint_just_written_is_never_the_one_that_goes(tmp_path):
    for step in (1, 2, 3):
        checkpoints.save_checkpoint(tmp_path, step * 1000, {}, {}, limit=3)
    checkpoints.save_checkpoint(tmp_path, 1500, {}, {}, limit=1)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [1500, 2000, 3000]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_a_training(tmp_path, monkeypatch):
    checkpoints.save_checkpoint(tmp_path, 1, {}, {}, limit=1)

    def busy(path):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_discard", busy)
        checkpoints.save_checkpoint(tmp_path, 2, {}, {}, limit=1)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [1, 2]
    checkpoints.save_checkpoint(tmp_path, 3, {}, {}, limit=1)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [3]


def test_half_written_checkpoints_are_not_seen_and_are_cleared(tmp_path):
    checkpoints.save_checkpoint(tmp_path, 5, {}, {}, limit=2)
    (tmp_path / "checkpoint-7.part").mkdir()
    (tmp_path / "checkpoint-3.old.part").mkdir()
    found = checkpoints.find_checkpoint(tmp_path, "latest")
    assert found is not None
    assert found.name == "checkpoint-5"
    checkpoints.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path, 5, {"model": torch.ones(1000)}, {}, limit=2)
    content = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="checkpoint-5 is not a readable checkpoint"):
        checkpoints.load_checkpoint(path, {}, {})


def test_a_name_means_the_checkpoint_of_the_output_folder_also_beside_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "run"):
        path = checkpoints.save_checkpoint(folder, 5, {}, {}, limit=2)
    assert checkpoints.find_checkpoint(tmp_path / "run", "checkpoint-5") == path
    assert checkpoints.find_checkpoint(tmp_path / "new", "checkpoint-5") == Path("checkpoint-5")


def test_resume_choices(tmp_path):
    assert checkpoints.find_checkpoint(tmp_path, "latest") is None
    assert checkpoints.find_checkpoint(tmp_path, "none") is None
    path = checkpoints.save_checkpoint(tmp_path, 5, {}, {}, limit=2)
    for wanted in ("latest", "checkpoint-5", str(path)):
        assert checkpoints.find_checkpoint(tmp_path, wanted) == path
    with pytest.raises(InputError, match="would mix two runs"):
        checkpoints.find_checkpoint(tmp_path, "none")
    with pytest.raises(InputError, match="checkpoint-9 was not found"):
        checkpoints.find_checkpoint(tmp_path, "checkpoint-9")


def test_the_log_is_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
