"""Whole files through Beam's FileSystems, so that a local path and `gs://` are one code.

A file is written aside, renamed to its final name and verified, so that whoever sees the final name sees all of it.
What a killed process leaves aside, the next one to claim the folder clears (`clear_aside`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.utils import retry

_ASIDE = re.compile(r"\..+\.tmp-[0-9a-f]{32}", re.DOTALL)
_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


class WriteFailed(OSError):
    """A file that could not be written. The message says which, why, and what to do next."""


class IncompleteWrite(WriteFailed):
    """A file that is missing or has another size after it was written."""


class ReadFailed(OSError):
    """A file that could not be read, though it was tried again. The message says which, why, and what to do next."""


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


class SteadyReader(io.RawIOBase):
    """The bytes at `path` in their order, for reading over a network: what fails may pass, so a read that failed is
    tried again from where it stopped, four times within 8 s.

    Whatever the filesystem raises becomes ReadFailed, so that who parses the bytes can tell it from broken content.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path, self._offset = path, 0
        self._file: Any = None

    def read(self, size_bytes: int = -1) -> bytes:
        """The next so many bytes (-1: all)."""
        try:
            return self._read(size_bytes)
        except Exception as error:  # the client of an object store has errors of its own
            reason = _reason(error)
            raise ReadFailed(
                f"{self._path}: cannot be read at byte {self._offset}: {reason}; put it back or mend its access, or "
                "take it out of the pool, then give the same command again: it goes on where it stopped"
            ) from error

    @retry.with_exponential_backoff(
        num_retries=4,
        initial_delay_secs=0.5,
        fuzz=False,
        retry_filter=lambda _: True,
        logger=lambda *_: None,  # what is raised at last says it
    )
    def _read(self, size_bytes: int) -> bytes:
        try:
            if self._file is None:
                self._file = open_binary(self._path)
                if self._offset:
                    self._file.seek(self._offset)
            content = self._file.read(size_bytes)
        except Exception:
            self._file = None
            raise
        self._offset += len(content)
        return content

    def tell(self) -> int:
        """How many bytes were read."""
        return self._offset

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


@contextlib.contextmanager
def write_aside(path: str) -> Iterator[BinaryIO]:
    """Open a file that gets the name `path` only once it is complete.

    Raises WriteFailed where it cannot be written, IncompleteWrite where it is not there, or not whole, afterwards. An
    error of the body passes as it is.
    """
    folder, _, name = path.rpartition("/")
    aside = join(folder, f".{name}.tmp-{uuid.uuid4().hex}")  # hidden: readers of a folder of tables leave it out
    with _failing_as(path):
        make_folder(folder)
        handle = FileSystems.create(aside, compression_type=CompressionTypes.UNCOMPRESSED)
    counter = _CountingWriter(path, handle)
    try:
        with _marked_live(aside, handle):
            with counter:
                yield counter  # type: ignore[misc]
            with _failing_as(path):
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


def is_aside(path: str) -> bool:
    """Whether `path` is named as a file that `write_aside` has not finished."""
    return _ASIDE.fullmatch(path.rpartition("/")[2]) is not None


def holds_files(folder: str, besides: Collection[str] = ()) -> bool:
    """Whether a file lies anywhere under `folder`, but for those of the names `besides` and what is, or was, being
    written aside."""
    if "://" in folder:
        found = (metadata.path for metadata in FileSystems.match([join(literal(folder), "**")])[0].metadata_list)
    else:
        found = (name for _, _, names in os.walk(folder) for name in names)
    return any(path.rpartition("/")[2] not in besides and not is_aside(path) for path in found)


def clear_aside(folder: str) -> None:
    """Delete, everywhere under a local `folder`, what killed processes were writing aside; what a living one is writing
    stays. An object store needs none of it: objects are there when they are whole, aside only while they are renamed.
    """
    if "://" in folder:
        return
    for path in (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names):
        if is_aside(path) and not _is_live(path):
            delete_if_there(path)


@contextlib.contextmanager
def _marked_live(path: str, handle: Any) -> Iterator[None]:
    """Holds a lock on a local file, which the system lets go of when this process dies, however it dies."""
    if "://" in path:
        yield
        return
    descriptor = os.dup(handle.fileno())  # outlives the handle, until the file has its final name
    try:
        with contextlib.suppress(OSError):  # a filesystem without locks; `_is_live` then takes every file for live
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_live(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


@contextlib.contextmanager
def _failing_as(path: str) -> Iterator[None]:
    """Raises WriteFailed in place of the filesystem's errors, which name neither the file nor a way out."""
    try:
        yield
    except OSError as error:
        reason, number = _reason(error), _number(error)
        if number in _SPACE:
            advice = "make room there"
        elif number in _PERMISSION:
            advice = "give this user the right to write there"
        else:
            advice = "mend that"
        raise WriteFailed(
            f"{path}: cannot be written: {reason}; {advice}, then give the same command again: it goes on where it "
            "stopped"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, and what Beam wrapped in it."""
    yield error
    if isinstance(error, BeamIOError):
        for inner in (error.exception_details or {}).values():
            yield from _causes(inner)
    for argument in error.args:
        if isinstance(argument, BaseException):
            yield from _causes(argument)


def _number(error: Exception) -> int | None:
    return next((cause.errno for cause in _causes(error) if isinstance(cause, OSError) and cause.errno), None)


def _reason(error: Exception) -> str:
    """Why, on one line and without the path."""
    number = _number(error)
    return os.strerror(number) if number else " ".join(str(error).split()) or type(error).__name__


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
    """Counts what passes, because not every filesystem's handle can tell its position. Errors name `path`, the name
    that the file is to have."""

    def __init__(self, path: str, handle: Any) -> None:
        self._path, self._handle = path, handle
        self.written_bytes = 0

    def write(self, content: Any) -> int:
        with _failing_as(self._path):
            self._handle.write(content)
        self.written_bytes += memoryview(content).nbytes
        return memoryview(content).nbytes

    def tell(self) -> int:
        return self.written_bytes

    def flush(self) -> None:
        with _failing_as(self._path):
            self._handle.flush()

    def close(self) -> None:
        with _failing_as(self._path):
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
