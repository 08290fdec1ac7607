"""`ddm hypersim download` of real ZIP files that are damaged, large or packed in another way."""

import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import hypersim_archives
import pytest
from hypersim_archives import FAST, assert_whole, expected, found, name_of
from range_server import Fault, RangeServer, serve

from ddm_training import remote_zip
from ddm_training.download import HypersimDownloadConfig
from ddm_training.errors import InputError
from ddm_training.http_ranges import RangeClient
from ddm_training.remote_zip import open_archive, save_member

server, config = hypersim_archives.server, hypersim_archives.config  # fixtures


# --- damaged archives


def test_a_flipped_byte_is_fetched_again(config: HypersimDownloadConfig, server: RangeServer):
    server.faults = [Fault("flip", times=2, min_bytes=10_000)]
    config.main()
    assert server.faults[0].times == 0
    assert_whole(config, expected())


def test_a_member_that_stays_corrupt_is_named_and_leaves_no_file(config: HypersimDownloadConfig, server: RangeServer):
    path = server.root / "ai_001_001.zip"
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(f"ai_001_001/{name_of('color', 0)}").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 500] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"frame.0000.color.hdf5 has \d+ bytes and CRC \w+, the directory says"):
        config.main()
    assert_whole(config, expected() - {f"ai_001_001/{name_of('color', 0)}"})


def test_a_member_larger_than_the_directory_says_is_cut_off(tmp_path: Path):
    """A few kilobytes that inflate to 100 MB: not written, and not held in memory."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"\0" * 100_000_000)
        directory = archive.infolist()[0]
    data = path.read_bytes()
    size = directory.file_size.to_bytes(4, "little")
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, (1000).to_bytes(4, "little")))
    with serve(tmp_path) as server:
        client = RangeClient(FAST)
        archive = open_archive(client, f"{server.url}/bomb.zip")
        tracemalloc.start()
        with pytest.raises(remote_zip.CorruptMemberError, match="holds more than the 1000 bytes"):
            save_member(client, archive, archive.members["a"], tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
        tracemalloc.stop()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bomb.zip"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "no whole ZIP archive"),
        (lambda data: b"<html>Please log in</html>", "no whole ZIP archive .*starting with b'<html>"),
        (lambda data: b"", "HTTP 416.*empty"),
        (lambda data: data[:-22] + data[-22:].replace(b"PK\x05\x06", b"PK\x05\x07"), "no whole ZIP archive"),
        (lambda data: b"\0" * 100 + data[100:], "no header of this member"),
    ],
)
def test_what_is_no_whole_archive_is_said(
    config: HypersimDownloadConfig, server: RangeServer, damage: Callable[[bytes], bytes], message: str
):
    path = server.root / "ai_001_002.zip"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"1 of 3 scenes failed[\s\S]*{message}"):
        config.main()
    assert expected(("ai_001_001", "ai_002_001")) <= found(config)


def test_other_compression_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a", b"x" * 100)
    with serve(tmp_path) as server, pytest.raises(InputError, match="method 12; expected stored"):
        open_archive(RangeClient(FAST), f"{server.url}/a.zip")


# --- large archives


def test_zip64_archives_beyond_four_gigabytes_are_read(tmp_path: Path):
    """A real one: the members lie behind a hole of 5 GB that takes no disk, so offsets need 64 bits."""
    path = tmp_path / "large.zip"
    with open(path, "wb") as file:
        file.truncate(5_000_000_000)
    wanted = {"stored": random.Random(1).randbytes(300_000), "deflated": b"wall " * 300_000}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("stored", wanted["stored"], compress_type=zipfile.ZIP_STORED)
        with archive.open(zipfile.ZipInfo("deflated"), "w", force_zip64=True) as file:
            file.write(wanted["deflated"])
        assert archive.getinfo("deflated").header_offset > 1 << 32
    with serve(tmp_path) as server:
        client = RangeClient(FAST)
        remote = open_archive(client, f"{server.url}/large.zip")
        for name, data in wanted.items():
            save_member(client, remote, remote.members[name], tmp_path / name)
            assert (tmp_path / name).read_bytes() == data
        assert server.sent() < 3_000_000


def test_members_of_any_size_pass_through_bounded_memory(tmp_path: Path):
    noise = random.Random(2).randbytes(1 << 20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with archive.open(info, "w") as file:
                for _ in range(16):
                    file.write(noise)
    with serve(tmp_path) as server:
        client = RangeClient(FAST)
        remote = open_archive(client, f"{server.url}/a.zip")
        tracemalloc.start()
        for name in ("stored", "deflated"):
            save_member(client, remote, remote.members[name], tmp_path / name)
            assert (tmp_path / name).stat().st_size == 16 << 20
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
        tracemalloc.stop()
