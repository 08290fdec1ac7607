"""Files that are written whole or not at all, and folders: that can be written to, by one process at a time."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ddm_training.errors import InputError


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder that the user names, and those above it, where it is absent; so that work is not in vain.

    Args:
        folder: where something is to be written later.
        flag: by which it was named, for messages.

    Raises:
        InputError: it is a file, or cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {folder} cannot be made: {error.strerror or error}. Give another folder.") from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{flag} {folder} cannot be written to: {error.strerror or error}. Give another folder."
        ) from error


@contextlib.contextmanager
def writing(path: Path, advice: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Tell plainly of a full disk, or whatever keeps a file from being written.

    Args:
        path: of the file or folder, for the message.
        advice: what to do, and what is not lost: a sentence or two.
        also: exceptions beside `OSError` by which a library reports this.

    Raises:
        InputError: it could not be written.
    """
    try:
        yield
    except (OSError, *also) as error:
        raise InputError(f"{path} could not be written ({error}). {advice}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write or replace a file in one step: a reader meets the old one, none, or the new one, also after a power cut.

    Yields the path of a part file beside it, not there yet, which is to be written and closed. Then that is flushed to
    the disk and renamed; where anything is raised, it is removed and the old file stays. Writers at the same time have
    a part file each, and the last to end wins. A killed one leaves ``.<name>.<random>.part`` behind.

    Args:
        path: of the file; its folder is made when absent. A link is replaced, not what it leads to.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield part
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what was raised matters more
            part.unlink()
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write or replace a file with ``content``; see `replacing`."""
    with replacing(path) as part:
        if isinstance(content, str):
            part.write_text(content)
        else:
            part.write_bytes(content)


@contextlib.contextmanager
def exclusive(folder: Path, work: str, flag: str) -> Iterator[None]:
    """Keep a second process that does the same out of a folder; the lock of a killed process is gone with it.

    Args:
        folder: made when absent.
        work: what is done, e.g. "download"; the lock is the file ``.<work>.lock`` in the folder, spaces as "-".
        flag: that names the folder, for messages.

    Raises:
        InputError: the lock is held or is another user's, or the folder cannot be written.
    """
    make_folder(folder, flag)
    with contextlib.ExitStack() as held:
        lock = folder / f".{work.replace(' ', '-')}.lock"
        with writing(lock, f"Is it another user's? Delete it when no other {work} is at work, or give another {flag}."):
            file = held.enter_context(open(lock, "w"))
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A child that lives longer would hold the lock: of a parent that was killed, and of one that has ended.
            os.register_at_fork(after_in_child=file.close)
            held.callback(fcntl.flock, file, fcntl.LOCK_UN)
        except BlockingIOError as error:
            raise InputError(
                f"another {work} is writing into {folder}: wait for it to end, or give another {flag}."
            ) from error
        except (ImportError, OSError):
            pass  # no such locks on this system or file system
        yield
