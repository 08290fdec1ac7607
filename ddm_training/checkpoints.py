"""Training checkpoints: folders `checkpoint-<step>` that are either whole or not there.

A checkpoint is written to `checkpoint-<step>.part`, flushed to disk and renamed; older ones are removed only after
that. A run killed at any moment so leaves at least the checkpoint before, and perhaps a `.part` folder, which the next
run removes. Checkpoints later than the one that a run goes on from are moved to `set-aside-<n>`: they are of a branch
that was given up, and are neither counted nor taken for the latest.
"""

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddm_training.errors import InputError
from ddm_training.files import writing

STATE_FILE, CONFIG_FILE = "state.pt", "config.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints of an output folder as (step, path), oldest first."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for path in folder.glob("checkpoint-*.part"):
        shutil.rmtree(path)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], config: dict[str, Any], *, limit: int) -> Path:
    """Write a checkpoint, then remove the oldest of those before it beyond ``limit``.

    Args:
        folder: output folder of the run.
        step: optimiser steps done.
        state: tensors, numbers and containers of them; read back with `weights_only=True`.
        config: settings of the run, plain JSON values.
        limit: number of checkpoints kept, this one included.

    Raises:
        InputError: it could not be written (disk full, say); what was there before is untouched.
    """
    final, part = folder / f"checkpoint-{step}", folder / f"checkpoint-{step}.part"
    advice = "Earlier checkpoints are untouched: make room and run the same command again."
    with writing(final, advice, also=(RuntimeError,)):  # by which torch.save reports a full disk
        try:
            if part.exists():
                shutil.rmtree(part)
            part.mkdir(parents=True)
            torch.save({"step": step, **state}, part / STATE_FILE)
            (part / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
            for path in (part / STATE_FILE, part / CONFIG_FILE, part):
                _sync(path)
            if final.exists():
                _discard(final)
            part.rename(final)
            _sync(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # there where that failed
    earlier = [path for found, path in list_checkpoints(folder) if found < step]
    for path in earlier[: max(len(earlier) + 1 - limit, 0)]:
        try:
            _discard(path)
        except OSError as error:  # no reason to end a training
            print(f"warning: the old checkpoint {path} could not be removed: {error}", file=sys.stderr)
    return final


def set_aside_later(folder: Path, step: int, log: Path) -> list[Path]:
    """Move checkpoints after ``step`` out of the way, with a copy of the log, which a resumed run cuts.

    Args:
        folder: output folder of the run.
        step: of the checkpoint that it goes on from.
        log: of the run; copied if it is there.

    Returns:
        Where the checkpoints are now: still there to be resumed from by their path.

    Raises:
        InputError: they cannot be moved.
    """
    later = [path for found, path in list_checkpoints(folder) if found > step]
    if not later:
        return []
    number = 1
    while (aside := folder / f"set-aside-{number}").exists():
        number += 1
    try:
        aside.mkdir()
        if log.exists():
            shutil.copy2(log, aside / log.name)
        for path in reversed(later):  # the latest first: what a kill leaves is a run that ends earlier
            path.rename(aside / path.name)
    except OSError as error:
        raise InputError(
            f"{later[-1]} is later than the checkpoint to go on from and cannot be moved to {aside} ({error}): mend "
            "that, or choose another --output-dir."
        ) from error
    return [aside / path.name for path in later]


def _discard(path: Path) -> None:
    """Remove a checkpoint such that it is never seen half removed."""
    doomed = path.with_name(f"{path.name}.old.part")
    path.rename(doomed)
    shutil.rmtree(doomed)


def load_checkpoint(
    path: Path, config: dict[str, Any], identity: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Read a checkpoint for a run with settings ``config``.

    Args:
        path: of the checkpoint.
        config: settings of the run, plain JSON values; "command" is what `ddm` calls the training.
        identity: those without which the saved weights mean nothing, with the value that runs had before there was
            such a setting. Where that is None, a missing one is let pass: the weights are checked after this.

    Returns:
        The state, and the settings that differ as name -> (saved, now).

    Raises:
        InputError: it is missing or damaged, or belongs to another network.
    """
    try:
        saved = json.loads((path / CONFIG_FILE).read_text())
        state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True, mmap=False)
        assert isinstance(saved, dict)
        assert isinstance(state, dict)
    except (OSError, ValueError, RuntimeError, EOFError, AssertionError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} is not a readable checkpoint ({error}): delete it to resume from the one before, or give "
            "--resume-from-checkpoint another folder."
        ) from error
    was, now = saved.get("command"), config.get("command")
    if None not in (was, now) and was != now:
        raise InputError(f"{path} is of `ddm {was}`, and this is `ddm {now}`: use another --output-dir.")
    saved = {key: value for key, value in identity.items() if value is not None} | saved
    differing = {
        key: (saved.get(key), value)
        for key, value in config.items()
        if saved.get(key) != value and key != "command"  # older ones do not say it
    }
    if wrong := [key for key in identity if key in differing and key in saved]:
        said = ", ".join(f"--{key.replace('_', '-')} {differing[key][0]} (now {differing[key][1]})" for key in wrong)
        raise InputError(
            f"{path} was trained with {said}: its weights do not fit. Use those settings, or another --output-dir."
        )
    return state, differing


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from: ``wanted`` is "latest", "none", a folder's path, or its name in ``folder``.

    Raises:
        InputError: a named checkpoint does not exist, or "none" was asked for beside existing checkpoints.
    """
    existing = list_checkpoints(folder)
    if wanted == "latest":
        return existing[-1][1] if existing else None
    if wanted == "none":
        if existing:
            raise InputError(
                f"{folder} holds {existing[-1][1].name}; starting anew would mix two runs. Choose another --output-dir "
                "or remove the folder."
            )
        return None
    for path in (folder / wanted, Path(wanted)):
        if _NAME.fullmatch(path.name) and path.is_dir():
            return path
    raise InputError(
        f"--resume-from-checkpoint {wanted} was not found; {folder} holds {[p.name for _, p in existing] or 'none'}."
    )
