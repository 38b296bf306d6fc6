"""Whole files through Beam's FileSystems, so that a local path and `gs://` are one code.

A file is written aside, renamed to its final name and verified, so that whoever sees the final name sees all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems


class IncompleteWrite(OSError):
    """A file that is missing or has another size after it was written."""


def join(folder: str, *names: str) -> str:
    """`folder` and `names` as one path."""
    return FileSystems.join(folder, *names)


def literal(path: str) -> str:
    """The pattern that `path` alone matches, for Beam's functions that take patterns."""
    return re.sub(r"[*?[]", r"[\g<0>]", path)


def exists(path: str) -> bool:
    """Whether a file or folder stands at `path`."""
    return FileSystems.exists(path)


def names_in(folder: str) -> set[str]:
    """The names of the files that lie in `folder` itself; none where it is not there."""
    return set(sizes_bytes_in(folder))


def sizes_bytes_in(folder: str) -> dict[str, int]:
    """Name -> size of the files that lie in `folder` itself; none where it is not there."""
    found = FileSystems.match([join(literal(folder), "*")])[0].metadata_list
    return {metadata.path.rpartition("/")[2]: metadata.size_in_bytes for metadata in found}


def open_binary(path: str) -> Any:
    """The bytes at `path`, as they are: nothing is decompressed by its name."""
    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def read_bytes(path: str) -> bytes:
    """All bytes at `path`."""
    with open_binary(path) as file:
        return file.read()


def sha256(path: str) -> str:
    """sha256 of the file at `path`, in hex."""
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def write_aside(path: str) -> Iterator[BinaryIO]:
    """Open a file that gets the name `path` only once it is complete.

    Raises IncompleteWrite where the file is not there, or not whole, afterwards.
    """
    make_folder(path.rpartition("/")[0])
    folder, _, name = path.rpartition("/")
    aside = join(folder, f".{name}.tmp-{uuid.uuid4().hex}")  # hidden: readers of a folder of tables leave it out
    counter = _CountingWriter(
        FileSystems.create(aside, compression_type=CompressionTypes.UNCOMPRESSED)
    )
    try:
        with counter:
            yield counter  # type: ignore[misc]
        FileSystems.rename([aside], [path])
    except BaseException:
        with contextlib.suppress(BeamIOError, OSError):
            _delete(aside)
        raise
    found_bytes = _size_bytes(path)
    if found_bytes != counter.written_bytes:
        raise IncompleteWrite(
            f"{path}: wrote {counter.written_bytes} bytes, found {'nothing' if found_bytes is None else found_bytes}; "
            "check the space and permissions there, then run again"
        )


def _size_bytes(path: str) -> int | None:
    # Not `match`, which takes a folder named `out[1]` for a pattern.
    with contextlib.suppress(BeamIOError):
        return FileSystems.get_filesystem(path).metadata(path).size_in_bytes
    return None


def write_bytes(path: str, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with write_aside(path) as file:
        file.write(content)


def write_json(path: str, content: Any) -> None:
    """Write `content` as indented JSON in the order it has."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def rename(source: str, target: str) -> None:
    """Give the file at `source` the name `target`, in place of what has it."""
    make_folder(target.rpartition("/")[0])
    FileSystems.rename([source], [target])


def delete_if_there(path: str) -> None:
    """Delete `path` where it exists."""
    if FileSystems.exists(path):
        _delete(path)


def delete_folder(path: str) -> None:
    """Delete `path` and all that lies under it, where there is something."""
    if "://" not in path:
        delete_if_there(path)
        return
    found = FileSystems.match([join(literal(path), "**")])[0].metadata_list
    if found:
        FileSystems.delete([literal(metadata.path) for metadata in found])


def _delete(path: str) -> None:
    if "://" in path:
        FileSystems.delete([literal(path)])
    elif os.path.isdir(path):  # Beam would take its name for a pattern
        shutil.rmtree(path)
    else:
        os.remove(path)


def make_folder(path: str) -> None:
    """Make a local folder; object stores have none."""
    if path and "://" not in path and not FileSystems.exists(path):
        # Another worker may make it at the same moment.
        with contextlib.suppress(BeamIOError, OSError):
            FileSystems.mkdirs(path)


class _CountingWriter:
    """Counts what passes, because not every filesystem's handle can tell its position."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.written_bytes = 0

    def write(self, content: Any) -> int:
        self._handle.write(content)
        self.written_bytes += memoryview(content).nbytes
        return memoryview(content).nbytes

    def tell(self) -> int:
        return self.written_bytes

    def flush(self) -> None:
        self._handle.flush()

    def close(self) -> None:
        self._handle.close()

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def __enter__(self) -> _CountingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False
