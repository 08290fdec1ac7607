"""Single members of ZIP archives on an HTTP server, by range requests: nothing else of an archive is transferred.

Offsets, sizes and CRCs are those of the archive's directory (ZIP64 too); what arrives is checked against them.
"""

import bisect
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddm_training.http_ranges import CHUNK, RangeClient, RemoteError

TAIL = 1 << 17  # bytes; holds the end records of any archive (a comment is at most 64 KiB) and a small directory
MAX_DIRECTORY = 1 << 28  # bytes; a directory of a million members. More is a damaged or hostile archive
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
ENCRYPTED = 0x1
UTF8_NAME = 0x800


class CorruptMemberError(RemoteError):
    """The bytes of a member do not agree with the archive's directory."""


class RangeFile(io.RawIOBase):
    """What `zipfile` needs to read an archive's directory. The end of the file is fetched once and kept."""

    def __init__(self, client: RangeClient, url: str, size: int) -> None:
        self.client, self.url, self.length = client, url, size
        self._position = 0
        self._tail_start = max(size - TAIL, 0)
        self._tail = client.read(url, self._tail_start, size, size=size)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if position < 0:
            raise OSError("seek before the start of the file")  # what a file does; zipfile relies on it
        self._position = position
        return position

    def read(self, size: int = -1, /) -> bytes:
        start = self._position
        end = self.length if size < 0 else min(start + size, self.length)
        if end - start > MAX_DIRECTORY:
            raise RemoteError(f"{self.url}: the directory claims {end - start} bytes, more than {MAX_DIRECTORY}.")
        if start >= end:
            return b""
        self._position = end
        head = b""
        if start < self._tail_start:
            head = self.client.read(self.url, start, min(end, self._tail_start), size=self.length)
            start = self._tail_start
        return head + self._tail[start - self._tail_start : max(end - self._tail_start, 0)]


@dataclass(frozen=True)
class Member:
    """One member, as the archive's directory says it."""

    name: str
    raw_name: bytes
    offset: int
    """Where its local header begins."""
    end: int
    """Where it must have ended: the next member's header, or a bound that no whole member passes."""
    compressed: int
    """Bytes in the archive."""
    size: int
    """Bytes once inflated."""
    crc: int
    method: int
    """zipfile.ZIP_STORED or zipfile.ZIP_DEFLATED."""


@dataclass(frozen=True)
class RemoteArchive:
    """An archive on a server and those of its members that were asked for."""

    url: str
    size: int
    members: dict[str, Member]


def open_archive(client: RangeClient, url: str, wanted: Callable[[str], bool] = lambda name: True) -> RemoteArchive:
    """Read the directory (ZIP64 too) of an archive on a server, in about three requests.

    Raises:
        NotFoundError: there is no such archive.
        RemoteError: it cannot be read, is no whole ZIP archive, or a wanted member is encrypted or compressed in
            another way than stored or deflated.
    """
    size = client.size(url)
    try:
        with zipfile.ZipFile(RangeFile(client, url, size)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, ValueError) as error:
        if isinstance(error, RemoteError):
            raise
        start = client.read(url, 0, min(size, 16), size=size) if size else b""
        raise RemoteError(f"{url} is no whole ZIP archive ({error}); {size} bytes, starting with {start!r}.") from error
    offsets = sorted({info.header_offset for info in infos})
    members = {}
    for info in infos:
        if not info.is_dir() and wanted(info.filename):
            following = bisect.bisect_right(offsets, info.header_offset)
            boundary = offsets[following] if following < len(offsets) else size
            members[info.filename] = _member(url, info, boundary)
    return RemoteArchive(url, size, members)


def _member(url: str, info: zipfile.ZipInfo, boundary: int) -> Member:
    if info.flag_bits & ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RemoteError(
            f"{url}: {info.filename} is encrypted or compressed by method {info.compress_type}; "
            "expected stored (0) or deflated (8)."
        )
    raw_name = info.orig_filename.encode("utf-8" if info.flag_bits & UTF8_NAME else "cp437")
    # Only the local header says how long its extra field is (at most 65,535 bytes), so that the end of the data is
    # not known beforehand. Up to the next member it is one request instead of two.
    longest = info.header_offset + LOCAL_HEADER.size + len(raw_name) + 65535 + info.compress_size
    end = min(boundary, longest)
    if end < info.header_offset + LOCAL_HEADER.size + len(raw_name) + info.compress_size:
        raise RemoteError(f"{url}: damaged directory, {info.filename} overlaps what comes after it.")
    return Member(
        info.filename,
        raw_name,
        info.header_offset,
        end,
        info.compress_size,
        info.file_size,
        info.CRC,
        info.compress_type,
    )


def member_chunks(
    client: RangeClient, archive: RemoteArchive, member: Member, on_bytes: Callable[[int], object] | None = None
) -> Iterator[bytes]:
    """The inflated bytes of a member, in chunks of at most `CHUNK`; size and CRC are checked at the end.

    Args:
        on_bytes: called with the number of compressed bytes as they arrive.

    Raises:
        CorruptMemberError: what arrived is not what the directory describes.
        RemoteError, Stopped: as `RangeClient.stream`.
    """
    where = f"{archive.url}: {member.name}"
    inflater = zlib.decompressobj(-zlib.MAX_WBITS) if member.method == zipfile.ZIP_DEFLATED else None
    crc = size = 0
    with closing(client.stream(archive.url, member.offset, member.end, size=archive.size)) as stream:  # pyright: ignore[reportArgumentType]
        for data in _compressed_data(stream, member, where):
            if on_bytes:
                on_bytes(len(data))
            try:
                for piece in [data] if inflater is None else _inflate(inflater, data):
                    size += len(piece)
                    if size > member.size:
                        raise CorruptMemberError(f"{where} holds more than the {member.size} bytes of the directory.")
                    crc = zlib.crc32(piece, crc)
                    yield piece
            except zlib.error as error:
                raise CorruptMemberError(f"{where} cannot be inflated ({error}).") from error
    if (size, crc) != (member.size, member.crc) or (inflater is not None and not inflater.eof):
        raise CorruptMemberError(
            f"{where} has {size} bytes and CRC {crc:08x}, the directory says {member.size} and {member.crc:08x}."
        )


def _compressed_data(stream: Iterator[bytes], member: Member, where: str) -> Iterator[bytes]:
    """Cut the local header before and the data descriptor after the data off. Reads the stream to its end."""
    header, left = b"", None
    for chunk in stream:
        if left is None:
            header += chunk
            if len(header) < LOCAL_HEADER.size:
                continue
            fields = LOCAL_HEADER.unpack_from(header)
            name_length, extra_length = fields[-2:]
            start = LOCAL_HEADER.size + name_length + extra_length
            if fields[0] != b"PK\x03\x04" or name_length != len(member.raw_name):
                raise CorruptMemberError(f"{where}: no header of this member where the directory says it is.")
            if len(header) < start:
                continue
            if header[LOCAL_HEADER.size :][:name_length] != member.raw_name:
                raise CorruptMemberError(f"{where}: the header there is that of another member.")
            chunk, left, header = header[start:], member.compressed, b""
        data = chunk[:left]
        left -= len(data)
        if data:
            yield data
    if left != 0:
        raise CorruptMemberError(f"{where}: the archive's next member begins before this one ends.")


def _inflate(inflater: Any, data: bytes) -> Iterator[bytes]:
    """Inflate in pieces of at most `CHUNK`, however much a few bytes may inflate to."""
    while data and not inflater.eof:
        yield inflater.decompress(data, CHUNK)
        data = inflater.unconsumed_tail
    while not inflater.eof and (rest := inflater.decompress(b"", CHUNK)):
        yield rest


def save_member(
    client: RangeClient,
    archive: RemoteArchive,
    member: Member,
    target: Path,
    *,
    on_bytes: Callable[[int], object] | None = None,
    tries: int = 3,
) -> None:
    """Fetch a member into ``target``: written beside it as ``.part``, checked, flushed to the disk, then renamed.

    Args:
        on_bytes: called with the compressed bytes that arrived; a negative number takes back those of a corrupt try.
        tries: how often a member is fetched whose bytes turn out corrupt.

    Raises:
        CorruptMemberError: corrupt each time.
        RemoteError, Stopped: as `RangeClient.stream`.
        OSError: the file cannot be written (a full disk). Nothing of it is left.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, tries + 1):
        received = 0

        def count(number: int) -> None:
            nonlocal received
            received += number
            if on_bytes:
                on_bytes(number)

        try:
            with open(part, "wb") as file:
                for piece in member_chunks(client, archive, member, count):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
            return
        except CorruptMemberError:
            if attempt == tries:
                raise
            if on_bytes:
                on_bytes(-received)
        finally:
            part.unlink(missing_ok=True)


def file_crc(path: Path) -> int:
    """CRC-32 of a file on disk."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
