"""Reads tars as a stream of members, without extracting them to disk.

Tars are untrusted input: header values are checked against the recipe's bounds and against the bytes that follow.
"""

from __future__ import annotations

import functools
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from transforms.core.recipe import PoolSettings
from transforms.storage import files
from transforms.storage.steady_reader import SteadyReader

_MAX_EXTENDED_HEADERS = 8  # in a row
_MAX_EXTENDED_HEADER_BYTES = 2**20
_MAX_EMPTY_READS = 8  # tarfile itself asks once or twice at the end of a file
_CHUNK_BYTES = 2**16

_EXTENDED_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip


class BrokenTar(Exception):
    """A tar that is truncated, has damaged headers or exceeds a bound; `reason` is the dead letter's code.

    Deliberately not a tarfile.HeaderError, which tarfile treats as the end of the tar after the first header.
    """

    def __init__(self, message: str, reason: str = "broken_tar") -> None:
        self.reason = reason
        super().__init__(message)


class _BeyondBound(tarfile.TarError):
    """The tar exceeds a bound of the recipe."""


class TarMember(NamedTuple):
    """A member of a tar, other than a folder.

    `is_file` is false for links, devices and sparse files. `read(n)` returns the first n bytes of the content (-1: all
    of it); call it at most once, before requesting the next member. The content starts at byte `offset` of the tar.
    """

    name: str
    offset: int
    size_bytes: int
    is_file: bool
    read: Callable[[int], bytes]


def tar_members(file: BinaryIO | SteadyReader, bounds: PoolSettings) -> Iterator[TarMember]:
    """Yield the members of a tar in order.

    Raises BrokenTar, whose message names the offset; so does `TarMember.read`.
    """
    offset, bounded = 0, cast(BinaryIO, _BoundedFile(file, bounds.max_tar_bytes))
    try:
        tar = tarfile.open(  # noqa: SIM115 (holds nothing open)
            fileobj=bounded, mode="r|", tarinfo=_StrictTarInfo, encoding="utf-8", errors="surrogateescape"
        )
        for count, member in enumerate(tar, start=1):
            tar.members.clear()  # type: ignore[attr-defined]  # the stream never looks back, and a tar may have millions
            offset = member.offset
            if count > bounds.max_tar_members:
                raise _BeyondBound(f"the recipe allows {bounds.max_tar_members} members")
            if not member.isdir():
                read = functools.partial(_content, tar, member)
                is_file = member.isreg() and not member.issparse()
                yield TarMember(_text(member.name), member.offset_data, member.size, is_file, read)
        offset = tar.offset
        _check_nothing_follows(tar.fileobj)
    except (tarfile.TarError, EOFError) as error:
        raise _broken_at(offset, error) from error


def _check_nothing_follows(stream: Any) -> None:
    """Raise tarfile.ReadError if data follows the end marker, for example a second, concatenated tar.

    A reader that stops at the end marker would silently lose that data.
    """
    while content := stream.read(_CHUNK_BYTES):
        if content.strip(b"\0"):
            raise tarfile.ReadError("the tar ends here, but more data follows")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, limit_bytes: int) -> bytes:
    # From the stream itself: tarfile's file objects take longer than to read a small member.
    stream: Any = tar.fileobj
    size_bytes = member.size if limit_bytes < 0 else min(limit_bytes, member.size)
    try:
        stream.seek(member.offset_data)
        content = stream.read(size_bytes)
        if len(content) < size_bytes:
            raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, EOFError) as error:
        raise _broken_at(member.offset, error) from error
    return content


def _broken_at(offset: int, error: Exception) -> BrokenTar:
    reason = "tar_too_large" if isinstance(error, _BeyondBound) else "broken_tar"
    return BrokenTar(f"at byte {offset}: {error}; the rest of the tar was not read", reason)


def _text(name: str) -> str:
    """Return a member's name with invalid UTF-8 escaped, because tables only hold text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _BoundedFile:
    """Bounds the reads of tarfile, which reads block by block past the end of the file, for as long as a header claims
    that more data follows: for years if it claims 8 EiB."""

    def __init__(self, file: BinaryIO | SteadyReader, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self._read_bytes = self._empty_reads = 0

    def read(self, size_bytes: int) -> bytes:
        content = self._file.read(size_bytes)
        self._read_bytes += len(content)
        self._empty_reads += not content
        if self._read_bytes > self._max_bytes:
            raise _BeyondBound(f"the recipe allows {self._max_bytes} bytes")
        if self._empty_reads > _MAX_EMPTY_READS:
            raise tarfile.ReadError("unexpected end of data")
        return content


class _StrictTarInfo(tarfile.TarInfo):
    """Parses headers in bounded time and memory, and raises on a damaged header, where tarfile silently ends the tar.

    Only the name and the size of an extended header are used.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.EOFHeaderError, BrokenTar, files.ReadFailed):  # type: ignore[attr-defined]
            raise
        except Exception as error:  # tarfile raises anything at all on hostile headers
            raise _broken_at(tarfile_.offset, error) from error

    def _proc_member(self, tarfile_: Any) -> Any:
        # tarfile calls this for each header. It reads an extended header completely, then the next header recursively.
        tarfile_.extended = getattr(tarfile_, "extended", 0) + 1 if self.type in _EXTENDED_HEADERS else 0
        if tarfile_.extended > _MAX_EXTENDED_HEADERS:
            raise tarfile.HeaderError(f"more than {_MAX_EXTENDED_HEADERS} extended headers in a row")
        if tarfile_.extended and self.size > _MAX_EXTENDED_HEADER_BYTES:
            raise tarfile.HeaderError(f"an extended header of {self.size} bytes")
        return super()._proc_member(tarfile_)  # type: ignore[misc]

    def _proc_pax(self, tarfile_: Any) -> Any:
        # tarfile's own parser takes quadratic time (CVE-2024-6232) and keeps global headers, which are not needed here.
        records = _pax_records(tarfile_.fileobj.read(self._block(self.size))[: self.size])  # type: ignore[attr-defined]
        try:
            following: Any = self.fromtarfile(tarfile_)
        except tarfile.EOFHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("the tar ends after an extended header") from error
        if self.type == tarfile.XGLTYPE:
            return following
        following.offset = self.offset
        if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
            following.sparse = []
        name = records.get(b"GNU.sparse.name", records.get(b"path"))
        if name is not None:
            following.name = name.decode("utf-8", "surrogateescape").rstrip("/")
        size = records.get(b"size")
        if size is not None:
            if not (size.isdigit() and len(size) < 20):
                raise tarfile.HeaderError(f"an extended header with size {size[:40]!r}")
            following.size = int(size)
            has_content = following.isreg() or following.type not in tarfile.SUPPORTED_TYPES
            tarfile_.offset = following.offset_data + has_content * following._block(following.size)
        return following

    def _proc_sparse(self, tarfile_: Any) -> Any:
        # Skip the map of holes. tarfile's own parser keeps it in memory, however long it is.
        _, has_more, _ = self._sparse_structs  # type: ignore[attr-defined]
        while has_more:
            block = tarfile_.fileobj.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                raise tarfile.HeaderError("the map of a sparse file is truncated")
            has_more = block[504] != 0
        self.sparse: Any = []
        self.offset_data = tarfile_.fileobj.tell()
        tarfile_.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        return self


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """Parse an extended header. Each record is `b"%d %s=%s\\n" % (length of the record, keyword, value)`."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(content):
        length, _, _ = content[start : start + 20].partition(b" ")
        end = start + int(length) if length.isdigit() else 0
        keyword, equals, value = content[start + len(length) + 1 : end - 1].partition(b"=")
        if not equals or end > len(content) or content[end - 1 : end] != b"\n":
            raise tarfile.HeaderError("a damaged extended header")
        records[keyword] = value
        start = end
    return records
