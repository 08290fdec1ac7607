"""Which files of a downloaded scene are whole, and who may write into a folder."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddm_training.errors import InputError
from ddm_training.remote_zip import Member

MANIFEST = "manifest.jsonl"


class Manifest:
    """The members of one scene that are whole on disk: {name: (size, CRC-32)}. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST
        self.entries: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        self._torn = bool(lines and lines[-1])  # a run was stopped in the middle of a line
        for line in lines:
            try:
                entry = json.loads(line)
                self.entries[str(entry["member"])] = (int(entry["size"]), int(entry["crc32"], 16))
            except (ValueError, KeyError, TypeError):  # the member of a damaged line is checked by its CRC, or fetched
                continue

    def add(self, member: Member) -> None:
        """Append a line, on disk when this returns."""
        line = json.dumps({"member": member.name, "size": member.size, "crc32": f"{member.crc:08x}"}) + "\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                data = (b"\n" if self._torn else b"") + line.encode()
                self._torn = True
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                self._torn = False
                os.fsync(file.fileno())
            self.entries[member.name] = (member.size, member.crc)


@contextmanager
def exclusive(folder: Path, work: str = "download") -> Iterator[None]:
    """Keep a second run of the same ``work`` out of the folder; the lock of a killed process is gone with it.

    Raises:
        InputError: there is one, or the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / f".{work.replace(' ', '-')}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; give another --output.") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another {work} is writing into {folder}: wait for it, or use another one.") from error
        except (ImportError, OSError):
            pass  # no such locks on this system or file system
        yield
