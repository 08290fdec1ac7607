"""Which files of a downloaded scene are whole."""

import errno
import json
import os
import threading
from pathlib import Path

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
