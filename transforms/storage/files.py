"""Files by path: local paths and Cloud Storage objects (`gs://`) through one set of functions.

A file is visible under its final name only when it is complete. A local file is written under a temporary name, renamed
and verified; `clear_aside` deletes what killed processes left. A Cloud Storage object is uploaded under its final name,
because the store shows it only once the upload is complete.

Objects with several writers: `transforms.storage.generations`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from transforms.storage import globs, liveness, trees
from transforms.storage.trees import FileStatus as FileStatus

if TYPE_CHECKING:
    from types import ModuleType

Item = TypeVar("Item")
Result = TypeVar("Result")

_ASIDE = re.compile(r"\..+\.tmp-[0-9a-f]{32}", re.DOTALL)
_SCHEME = re.compile(r"([a-zA-Z][-+.a-zA-Z0-9]*)://")
_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)
"""What a filesystem without file locks, or without its lock service, answers."""
_SPOOLED_BYTES = 2**24  # kept in memory; larger files are kept on the local disk until they are uploaded
_REQUESTS_AT_ONCE = 32  # a request to Cloud Storage takes tens of milliseconds, nearly all of it waiting


class WriteFailed(OSError):
    """A file that could not be written. The message names the file, the reason and the next step."""


class IncompleteWrite(WriteFailed):
    """A file that is missing or has another size after it was written."""


class ReadFailed(OSError):
    """A file that could not be read after retries. The message names the file, the reason and the next step."""


class UnsupportedScheme(OSError):
    """A path such as `s3://…`."""


def join(folder: str, *names: str) -> str:
    """`folder` and `names` as one path."""
    if not in_cloud_storage(folder):
        return os.path.join(folder, *names)
    for name in names:
        folder = f"{folder.rstrip('/')}/{name.lstrip('/')}"
    return folder


def literal(path: str) -> str:
    """The glob pattern that matches only `path`."""
    return re.sub(r"[*?[]", r"[\g<0>]", path)


def matches(pattern: str, path: str) -> bool:
    """Whether the glob `pattern` matches all of `path`. `*` matches within a folder, `**` across folders, `?` any
    character; `[abc]`, `[a-z]` and `[!a]` match one character."""
    return globs.regex(pattern).fullmatch(path) is not None


def in_cloud_storage(path: str) -> bool:
    """Whether `path` is in Cloud Storage; otherwise it is local. Raises UnsupportedScheme for other schemes."""
    scheme = _SCHEME.match(path)
    if scheme and scheme[1] != "gs":
        raise UnsupportedScheme(f"{path}: {scheme[1]}:// is not supported; give a local path or gs://BUCKET/…")
    return scheme is not None


def absolute(path: str) -> str:
    """`path` as an absolute path."""
    return path if in_cloud_storage(path) else os.path.abspath(path)


def each(folder: str, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of each item, in order. Calls run in parallel if `folder` is in Cloud Storage."""
    if not in_cloud_storage(folder):
        return [function(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, items))


def exists(path: str) -> bool:
    """Whether there is a file, or a local folder, at `path`."""
    return _cloud().exists(path) if in_cloud_storage(path) else os.path.exists(path)


def status(path: str) -> FileStatus | None:
    """Size and time of the file at `path`; None if there is none. Raises OSError."""
    if in_cloud_storage(path):
        found = _cloud().status(path)
        return found and FileStatus(path, *found)
    try:
        local = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return FileStatus(path, local.st_size, local.st_mtime)


def matching(pattern: str) -> list[FileStatus]:
    """The files that match the glob `pattern` (see `matches`); folders are not listed. Raises OSError."""
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    if not in_cloud_storage(pattern) and fixed == pattern:
        return list(_statuses([pattern]))
    regex = globs.regex(pattern)
    found = under(fixed if in_cloud_storage(pattern) else os.path.dirname(fixed))
    return [file for file in found if not file.fault and regex.fullmatch(file.path)]


def under(prefix: str) -> Iterator[FileStatus]:
    """All files under a local folder, through links, and what is no readable file there; in Cloud Storage, all objects
    whose paths begin with `prefix`. Raises OSError."""
    if in_cloud_storage(prefix):
        # Consoles represent folders by empty objects whose names end with a slash.
        yield from (FileStatus(*one) for one in _cloud().objects(prefix) if not one[0].endswith("/"))
        return
    yield from trees.walk(prefix)


def _statuses(paths: Iterable[str]) -> Iterator[FileStatus]:
    for path in paths:
        with contextlib.suppress(OSError):  # deleted since it was listed, or a broken link
            if not os.path.isdir(path) and (found := status(path)):
                yield found


def names_in(folder: str) -> set[str]:
    """The names of the files directly in `folder`; empty if there is no such folder."""
    return set(sizes_bytes_in(folder))


def sizes_bytes_in(folder: str) -> dict[str, int]:
    """Name -> size in bytes of the files directly in `folder`; empty if there is no such folder."""
    if in_cloud_storage(folder):
        return _cloud().files_in(folder)
    if not os.path.isdir(folder):
        return {}
    found = _statuses(entry.path for entry in os.scandir(folder))
    return {os.path.basename(file.path): file.size_bytes for file in found}


def folders_in(folder: str) -> set[str]:
    """The names of the folders directly in `folder`; empty if there is no such folder."""
    if in_cloud_storage(folder):
        return _cloud().folders_in(folder)
    return {entry.name for entry in os.scandir(folder) if entry.is_dir()} if os.path.isdir(folder) else set()


def open_binary(path: str) -> Any:
    """A reader of the bytes at `path`; nothing is decompressed. Raises OSError."""
    return _cloud().open_binary(path) if in_cloud_storage(path) else open(path, "rb")


def read_bytes(path: str) -> bytes:
    """All bytes at `path`. Raises OSError."""
    with open_binary(path) as file, client_errors(path):
        return file.read()


def sha256(path: str) -> str:
    """sha256 of the file at `path`, in hex."""
    with open_binary(path) as file, client_errors(path):
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def write_aside(path: str) -> Iterator[BinaryIO]:
    """Open a file that gets the name `path` only once it is complete.

    Raises WriteFailed if it cannot be written, IncompleteWrite if it is missing or truncated afterwards. Errors
    of the body are passed on unchanged.
    """
    with _uploaded(path) if in_cloud_storage(path) else _renamed(path) as file:
        yield file  # type: ignore[misc]


@contextlib.contextmanager
def _renamed(path: str) -> Iterator[_CountingWriter]:
    folder, _, name = path.rpartition("/")
    aside = join(folder, f".{name}.tmp-{uuid.uuid4().hex}")  # hidden, so that readers of table folders ignore it
    with _failing_as(path):
        if folder:
            os.makedirs(folder, exist_ok=True)
        handle = create(aside)
    counter = _CountingWriter(path, handle)
    try:
        with liveness.marked_live(aside, handle):
            with contextlib.closing(counter):
                yield counter
            with _failing_as(path):
                os.rename(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise
    found = status(path)
    _check_size(path, counter.written_bytes, found and found.size_bytes)


def create(path: str) -> BinaryIO:
    """A new local file, open for writing."""
    return open(path, "wb")


@contextlib.contextmanager
def _uploaded(path: str) -> Iterator[_CountingWriter]:
    # Not the client's own writer: it completes the object when it is closed or collected, even after a failed write.
    import tempfile  # slow to import

    with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES) as spool:
        counter = _CountingWriter(path, spool, closes=False)
        yield counter
        with _failing_as(path):
            spool.seek(0)
            uploaded_bytes = _cloud().upload(path, spool, counter.written_bytes)
    _check_size(path, counter.written_bytes, uploaded_bytes)


def _check_size(path: str, written_bytes: int, found_bytes: int | None) -> None:
    if found_bytes != written_bytes:
        raise IncompleteWrite(
            f"{path}: wrote {written_bytes} bytes, found {'nothing' if found_bytes is None else found_bytes}; "
            "check the space and permissions there, then run again"
        )


def is_aside(path: str) -> bool:
    """Whether `path` is the temporary name of a file that `write_aside` has not finished."""
    return _ASIDE.fullmatch(path.rpartition("/")[2]) is not None


def holds_files(folder: str, besides: Collection[str] = ()) -> bool:
    """Whether there is a file anywhere under `folder`, except those named in `besides` and temporary ones. Stops at the
    first."""
    if in_cloud_storage(folder):
        found = (path for path, _, _ in _cloud().objects(f"{folder}/"))
    else:
        found = (name for _, _, names in os.walk(folder) for name in names)
    ignored = ("", *besides)  # consoles represent folders by empty objects whose names end with a slash
    return any(path.rpartition("/")[2] not in ignored and not is_aside(path) for path in found)


def clear_aside(folder: str) -> None:
    """Delete temporary files of killed processes everywhere under a local `folder`; those of running processes stay.
    Does nothing in Cloud Storage, where there are none."""
    if in_cloud_storage(folder):
        return
    # A link to a folder, as a switch of versions leaves, is among the folders.
    for path in (os.path.join(place, name) for place, *found in os.walk(folder) for name in itertools.chain(*found)):
        if is_aside(path) and (os.path.islink(path) or not liveness.is_live(path)):
            delete_if_there(path)


@contextlib.contextmanager
def _failing_as(path: str) -> Iterator[None]:
    """Raise OSErrors as WriteFailed, whose message names the file and the next step."""
    try:
        yield
    except OSError as error:
        if error.errno in _SPACE:
            advice = "free space there"
        elif error.errno in _PERMISSION or isinstance(error, PermissionError):
            advice = "allow this user to write there"
        else:
            advice = "fix the cause"
        raise WriteFailed(
            f"{path}: cannot be written: {reason(error)}; {advice}, then run the same command again to resume"
        ) from error


def reason(error: Exception) -> str:
    """The error's reason on one line, without the path."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else " ".join(str(error).split()) or type(error).__name__


def write_bytes(path: str, content: bytes) -> None:
    """Write `content` to `path`, completely or not at all."""
    with write_aside(path) as file:
        file.write(content)


def write_json(path: str, content: Any) -> None:
    """Write `content` as indented JSON; keys keep their order."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def rename(source: str, target: str) -> None:
    """Rename the file at `source` to `target`, replacing it. In Cloud Storage it is copied and deleted, so both exist
    for a moment."""
    if in_cloud_storage(target):
        _cloud().rename(source, target)
    else:
        make_folder(target.rpartition("/")[0])
        os.rename(source, target)


def delete_if_there(path: str) -> None:
    """Delete `path` if it exists: a local folder with everything in it, a link without its target."""
    if in_cloud_storage(path):
        _cloud().delete(path)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.remove(path)


def delete_folder(path: str) -> None:
    """Delete `path` with everything in it, if it exists."""
    if in_cloud_storage(path):
        _cloud().delete_all(f"{path}/")
    else:
        delete_if_there(path)


def make_folder(path: str) -> None:
    """Make a local folder; does nothing in Cloud Storage, which has none. A failure shows when a file is created."""
    if path and not in_cloud_storage(path):
        with contextlib.suppress(OSError):
            os.makedirs(path, exist_ok=True)


def client_errors(path: str) -> contextlib.AbstractContextManager[None]:
    """Raises errors of the Cloud Storage client as OSError, for reads from a file that `open_binary` opened."""
    return _cloud().as_os_errors(path) if in_cloud_storage(path) else contextlib.nullcontext()


def _cloud() -> ModuleType:
    from transforms.storage import cloud_storage  # takes half a second to import

    return cloud_storage


class _CountingWriter:
    """Counts the bytes written to `handle`. Errors name `path`, the final name of the file. `closes`: whether closing
    it closes `handle` too."""

    def __init__(self, path: str, handle: Any, closes: bool = True) -> None:
        self._path, self._handle, self._closes = path, handle, closes
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
        if self._closes:
            with _failing_as(self._path):
                self._handle.close()

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False
