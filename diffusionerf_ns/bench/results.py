"""The results folder: its format, its lock, and which jobs are done.

Layout::

    jobs.json                       format, and the jobs with the hash of each one's configuration
    .lock                           held by the one run that writes here
    <scene>/<n>-views/<variant>/seed-<s>/
        result.json                 whole or absent; of another hash, it is of another configuration
        result.<hash>.json          of configurations that were run here before, taken back when such a one is run again
        failed.json                 why the last try failed
        log.txt                     what the job printed
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddm_training import files
from ddm_training.errors import InputError
from ddm_training.files import write_whole
from diffusionerf_ns.bench.jobs import Job, describe

FORMAT = "diffusionerf-bench-1"
JOBS_FILE = "jobs.json"
RESULT_FILE = "result.json"
FAILED_FILE = "failed.json"
LOG_FILE = "log.txt"
CHECKPOINTS = "nerfstudio_models"
Status = Literal["done", "failed", "missing"]


class FolderInUseError(InputError):
    """Another process writes this folder."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A job of a results folder."""

    job: Job
    hash: str
    folder: Path
    training: str = ""
    """What decides the weights, hashed; of jobs that have it in common, one can take the other's. Empty: unknown."""

    def status(self) -> Status:
        """`done` if its result is whole and of this configuration."""
        result = read_result(self.folder)
        if result is not None and result["hash"] == self.hash:
            return "done"
        return "failed" if (self.folder / FAILED_FILE).is_file() else "missing"

    def result(self) -> dict[str, Any] | None:
        """Its result if it is done."""
        result = read_result(self.folder)
        return result if result is not None and result["hash"] == self.hash else None

    def has_another(self) -> bool:
        """Whether its folder has the result of another configuration."""
        result = read_result(self.folder)
        return result is not None and result["hash"] != self.hash

    def set_aside(self) -> bool:
        """Keep the result of another configuration under another name. Says whether there was one."""
        result = read_result(self.folder)
        if result is None or result["hash"] == self.hash:
            return False
        (self.folder / RESULT_FILE).rename(self.folder / _kept_file(result["hash"]))
        return True

    def take_back(self) -> bool:
        """Make a result of this configuration that was set aside the job's again. Says whether there was one.

        The figures alone: pictures and weights that lie in the folder are of what was run after it.
        """
        kept = _kept_file(self.hash)
        result = read_result(self.folder, kept)
        if result is None or result["hash"] != self.hash or self.status() == "done":
            return False
        self.set_aside()
        write_json(self.folder / RESULT_FILE, result | {"pictures": [], "config_file": None})
        (self.folder / kept).unlink()
        return True


def _kept_file(digest: str) -> str:
    return f"result.{digest}.json"


def none_held_out(result: Mapping[str, Any]) -> bool:
    """Whether no image was held out, so that a result's metrics are of the training images and not of new views."""
    split = result.get("split")
    return split is not None and split["test"] == split["train"]


def taken_overrides(result: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of a run that stand in its configuration: nerfacto lacks some. All, where that was not kept."""

    def stands(path: str, value: Any) -> bool:
        found: Any = result["config"]
        for name in path.split("."):
            found = found.get(name, {}) if isinstance(found, Mapping) else {}
        return found == describe(value)

    given = result["job"]["overrides"]
    return {path: value for path, value in given.items() if stands(path, value)} if result.get("config") else given


def writing(path: Path) -> AbstractContextManager[None]:
    """Tell plainly of what keeps a benchmark from writing to ``path``; see `files.writing`."""
    return files.writing(path, "Results that are done are kept: make room and run the same command again.")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as `write_whole` does.

    Raises:
        InputError: it cannot be written: the disk is full, say.
    """
    with writing(path):
        write_whole(path, json.dumps(content, indent=1) + "\n")


def read_result(folder: Path, name: str = RESULT_FILE) -> dict[str, Any] | None:
    """Content of `result.json`, or of one that was set aside.

    None where there is none or it is damaged, so that the job is run again.

    Raises:
        InputError: it was written by another version.
    """
    path = folder / name
    try:
        content = json.loads(path.read_text())
        found, _ = content["format"], content["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found != FORMAT:
        raise InputError(_other_version(path, found))
    return content


def same_training(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """A done job of the same scene and views whose training gave the weights that this one's would give.

    Args:
        folder: of the job that is to be done.
        wanted: entries of its `result.json` that must be the same there: its training hash, and code, versions and
            device.

    Returns:
        The content of its `result.json`, and "folder" and "checkpoints": where it and its weights lie.
    """
    for path in sorted(folder.parents[1].glob(f"*/*/{RESULT_FILE}")):
        result = read_result(path.parent)
        if result is None or "trained_by" in result or any(result.get(k) != v for k, v in wanted.items()):
            continue
        if result["config_file"] is None:  # see `Entry.take_back`
            continue
        checkpoints = (path.parent / result["config_file"]).parent / CHECKPOINTS
        if any(checkpoints.glob("*.ckpt")):
            return result | {"folder": path.parent, "checkpoints": checkpoints}
    return None


def read_entries(folder: Path) -> list[Entry]:
    """The jobs of a results folder.

    Raises:
        InputError: no results folder, or one of another version.
    """
    path = folder / JOBS_FILE
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(
            f"{folder} is no results folder: it has no {JOBS_FILE}. `diffusionerf-bench run` makes one."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); give the same `run` command again to write it anew.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise InputError(_other_version(path, found))
    entries = []
    try:
        for row in content["jobs"]:
            job = Job.from_dict({k: v for k, v in row.items() if k != "hash"})
            entries.append(Entry(job=job, hash=row["hash"], folder=folder / job.name))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}); give the same `run` command again to write it anew."
        ) from error
    return entries


def merge_entries(folder: Path, new: Sequence[Entry]) -> list[Entry]:
    """Write the job list: those that were there, with ``new`` in place of those of the same name. Returns all.

    Raises:
        InputError: the folder is of another version, or holds something else than results.
    """
    if (folder / JOBS_FILE).is_file():
        old = read_entries(folder)
    elif folder.is_dir() and any(p.name != ".lock" for p in folder.iterdir()):
        raise InputError(f"{folder} holds other things than results; give --output a new or an empty folder.")
    else:
        old = []
    entries = {entry.job.name: entry for entry in (*old, *new)}
    rows = [entry.job.to_dict() | {"hash": entry.hash} for entry in entries.values()]
    write_json(folder / JOBS_FILE, {"format": FORMAT, "jobs": rows})
    return list(entries.values())


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for writing; the lock is gone with the process, however that ends.

    Raises:
        FolderInUseError: another process holds it.
        InputError: the lock cannot be written.
    """
    path = folder / ".lock"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+b", buffering=0)  # with a buffer, closing would fail as well where the disk is full
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().decode().strip() or "another process"
            raise FolderInUseError(
                f"{folder} is being written by {owner}. Wait until it has ended, or give another --output."
            ) from error
        with writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _other_version(path: Path, found: Any) -> str:
    return (
        f"{path} has the format {found!r}; this version reads and writes {FORMAT!r}. Give another results folder, "
        "or use the version that wrote it."
    )
