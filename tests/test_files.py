"""Files that are written whole or not at all, and folders that can be written to."""

import errno
import os
import threading
from pathlib import Path

import pytest

from ddm_training.errors import InputError
from ddm_training.files import exclusive, make_folder, replacing, write_whole


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(("content", "stored"), [("a\nµ\n", "a\nµ\n".encode()), (b"\r\n\0\xff", b"\r\n\0\xff")])
def test_a_file_is_written_as_given_also_into_a_new_folder(tmp_path, content, stored):
    path = tmp_path / "new" / "folder" / "file.txt"
    for _ in range(2):
        write_whole(path, content)
        assert path.read_bytes() == stored
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [False, True])
def test_a_writer_that_raises_leaves_the_old_file_and_no_part(tmp_path, error, written):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as part:
            if written:
                part.write_text("half of the n")
                assert names(tmp_path) == [part.name, "file.txt"]
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ["file.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file_and_no_part(tmp_path, monkeypatch, call):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file.txt"
    path.write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert names(tmp_path) == ["file.txt"]
    assert path.read_text() == "old"


def test_the_content_is_on_the_disk_before_the_name_leads_to_it(tmp_path, monkeypatch):
    path, calls = tmp_path / "file.txt", []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def renamed(part: Path, target: Path) -> None:
        calls.append(("replace", part.stat().st_size))
        replace(part, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(path, "12345")
    assert calls == [("fsync", 5), ("replace", 5)]


def test_the_old_file_is_read_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_writers_at_the_same_time_have_a_part_each_and_the_last_wins(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as first:
        first.write_text("first, which is longer")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first, which is longer"
    assert names(tmp_path) == ["file.txt"]


def test_threads_and_readers_meet_whole_files_alone(tmp_path):
    path = tmp_path / "file.txt"
    contents = {letter * (1 + 1000 * number) for number, letter in enumerate("abcd")}
    failed: list[BaseException] = []
    write_whole(path, "a")

    def write(content: str) -> None:
        try:
            for _ in range(8):
                write_whole(path, content)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_text() in contents
    assert not failed
    assert names(tmp_path) == ["file.txt"]


def test_the_mode_is_that_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_whole(tmp_path / "whole", "")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_made_and_left_empty(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "new" / "folder", "--output")
        assert names(tmp_path / "new" / "folder") == []


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_in_the_place_of_a_folder_is_named_with_its_flag(tmp_path, below):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"^--output .*file.* cannot be made: .*Give another folder\.$"):
        make_folder(tmp_path / "file" / below, "--output")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"--output .* cannot be written to: Read-only file system"):
        make_folder(tmp_path, "--output")


def test_a_lock_of_another_user_is_told_plainly(tmp_path):
    (tmp_path / ".training.lock").mkdir()  # a file that may not be written to is none to root
    with (
        pytest.raises(InputError, match=r"\.training\.lock could not be written .*another --output-dir"),
        exclusive(tmp_path, "training", "--output-dir"),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_that_lives_longer_does_not_hold_the_lock_of_its_parent(tmp_path):
    end, begin = os.pipe()
    with exclusive(tmp_path, "training", "--output-dir"):
        with pytest.raises(InputError, match=r"another training is writing"), exclusive(tmp_path, "training", "--o"):
            pass
        child = os.fork()
        if child == 0:
            os.close(begin)
            os.read(end, 1)  # until the parent says so, or is gone
            os._exit(0)
    try:
        with exclusive(tmp_path, "training", "--output-dir"):
            pass
    finally:
        os.close(begin)
        os.close(end)
        os.waitpid(child, 0)
