"""Whole files through Beam's FileSystems, so that a local path and `gs://` are one code.

Whoever sees a file's final name sees all of it. A local file is written aside, renamed to its final name and verified;
what a killed process leaves aside, the next one to claim the folder clears (`clear_aside`). Cloud Storage has no
renaming, and needs none: an object is uploaded under its final name, is there once the upload is complete, and an
upload that never is leaves nothing to be seen. Objects with several
writers: `transforms.storage.generations`.
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
import tempfile
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from apache_beam.io.filesystem import BeamIOError, CompressionTypes, FileMetadata
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.gcp import gcsio
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils import retry
from filelock import FileLock
from google.api_core.exceptions import GoogleAPIError
from google.auth.exceptions import GoogleAuthError
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

Item = TypeVar("Item")
Result = TypeVar("Result")

_ASIDE = re.compile(r"\..+\.tmp-[0-9a-f]{32}", re.DOTALL)
_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
CLOUD_ERRORS = (GoogleAPIError, GoogleAuthError, InvalidResponse, DataCorruption)
"""What the client of Cloud Storage raises beside OSError."""
_SPOOLED_BYTES = 2**24  # in memory; beyond it on this machine's disk, until it is uploaded
_AT_ONCE = 32  # requests; an answer of Cloud Storage takes tens of milliseconds, nearly all of them waiting
_DELETED_AT_ONCE = 8  # requests of 100 objects each
_clients = threading.local()


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


def in_cloud_storage(path: str) -> bool:
    """Whether `path` names a place in Cloud Storage; all others are local."""
    return path.startswith("gs://")


def absolute(path: str) -> str:
    """`path` as it is called from any folder."""
    return path if in_cloud_storage(path) else os.path.abspath(path)


def each(folder: str, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of each item, in their order, where it asks something of `folder`: many at once in Cloud Storage."""
    if not in_cloud_storage(folder):
        return [function(item) for item in items]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))


def exists(path: str) -> bool:
    """Whether a file stands at `path`, or a local folder."""
    if in_cloud_storage(path):
        with as_os_errors(path):
            return _gcs().exists(path)
    return FileSystems.exists(path)


def matching(pattern: str) -> list[FileMetadata]:
    """The files that match; none where there is no such folder. Raises OSError."""
    with as_os_errors(pattern):
        found = FileSystems.match([pattern])[0].metadata_list
    # A console's folders are empty objects whose names end with a slash.
    return [metadata for metadata in found if not metadata.path.endswith("/")]


def names_in(folder: str) -> set[str]:
    """The names of the files that lie in `folder` itself; none where it is not there."""
    return set(sizes_bytes_in(folder))


def sizes_bytes_in(folder: str) -> dict[str, int]:
    """Name -> size of the files that lie in `folder` itself; none where it is not there."""
    found = matching(join(literal(folder), "*"))
    return {metadata.path.rpartition("/")[2]: metadata.size_in_bytes for metadata in found}


def folders_in(folder: str) -> set[str]:
    """The names of the folders in `folder` itself; none where it is not there. What lies in them is not listed."""
    if not in_cloud_storage(folder):
        return {entry.name for entry in os.scandir(folder) if entry.is_dir()} if os.path.isdir(folder) else set()
    bucket, prefix = gcsio.parse_gcs_path(f"{folder.rstrip('/')}/", object_optional=True)
    with as_os_errors(folder):
        listing = _gcs().client.list_blobs(bucket, prefix=prefix, delimiter="/")
        for _ in listing.pages:
            pass  # its prefixes are known when it is through
    return {name.removeprefix(prefix).rstrip("/") for name in listing.prefixes}


def cloud_blob(path: str) -> Any:
    """The object at `path` as the client of Cloud Storage has it, with the credentials that Beam uses. Asks nothing."""
    bucket, name = gcsio.parse_gcs_path(path)
    return _gcs().client.bucket(bucket).blob(name, chunk_size=_SPOOLED_BYTES)


def _gcs() -> gcsio.GcsIO:
    """This thread's client. Beam makes another one for each request, which connects anew, and which asks for the bucket
    too."""
    if not hasattr(_clients, "gcs"):
        # Without options it would look at this program's command line.
        _clients.gcs = gcsio.GcsIO(pipeline_options=PipelineOptions([]))
    return _clients.gcs


def open_binary(path: str) -> Any:
    """The bytes at `path`, as they are: nothing is decompressed by its name. Raises OSError."""
    if in_cloud_storage(path):
        with as_os_errors(path):
            return _gcs().open(path, "rb")
    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def read_bytes(path: str) -> bytes:
    """All bytes at `path`. Raises OSError."""
    with open_binary(path) as file, as_os_errors(path):
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
    with _uploaded(path) if in_cloud_storage(path) else _renamed(path) as file:
        yield file  # type: ignore[misc]


@contextlib.contextmanager
def _renamed(path: str) -> Iterator[_CountingWriter]:
    folder, _, name = path.rpartition("/")
    aside = join(folder, f".{name}.tmp-{uuid.uuid4().hex}")  # hidden: readers of a folder of tables leave it out
    with _failing_as(path):
        make_folder(folder)
        handle = FileSystems.create(aside, compression_type=CompressionTypes.UNCOMPRESSED)
    counter = _CountingWriter(path, handle)
    try:
        with _marked_live(aside, handle):
            with contextlib.closing(counter):
                yield counter
            with _failing_as(path):
                FileSystems.rename([aside], [path])
    except BaseException:
        with contextlib.suppress(BeamIOError, OSError):
            _delete(aside)
        raise
    _check_size(path, counter.written_bytes, _size_bytes(path))


@contextlib.contextmanager
def _uploaded(path: str) -> Iterator[_CountingWriter]:
    # Not Beam's writer: closing it completes the object, which the garbage collector does too when a write has failed.
    with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES) as spool:
        counter = _CountingWriter(path, spool, closes=False)
        yield counter
        with _failing_as(path):
            spool.seek(0)
            blob = cloud_blob(path)
            blob.upload_from_file(spool, size=counter.written_bytes, checksum="crc32c")
    _check_size(path, counter.written_bytes, blob.size)


def _check_size(path: str, written_bytes: int, found_bytes: int | None) -> None:
    if found_bytes != written_bytes:
        raise IncompleteWrite(
            f"{path}: wrote {written_bytes} bytes, found {'nothing' if found_bytes is None else found_bytes}; "
            "check the space and permissions there, then run again"
        )


def is_aside(path: str) -> bool:
    """Whether `path` is named as a file that `write_aside` has not finished."""
    return _ASIDE.fullmatch(path.rpartition("/")[2]) is not None


def holds_files(folder: str, besides: Collection[str] = ()) -> bool:
    """Whether a file lies anywhere under `folder`, but for those of the names `besides` and what is, or was, being
    written aside. Looks no further than the first."""
    if in_cloud_storage(folder):
        found = _objects_under(folder)
    else:
        found = (name for _, _, names in os.walk(folder) for name in names)
    ignored = ("", *besides)  # a console's folders are empty objects whose names end with a slash
    return any(path.rpartition("/")[2] not in ignored and not is_aside(path) for path in found)


def clear_aside(folder: str) -> None:
    """Delete, everywhere under a local `folder`, what killed processes were writing aside; what a living one is writing
    stays. In Cloud Storage nothing is written aside.
    """
    if in_cloud_storage(folder):
        return
    for path in (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names):
        if is_aside(path) and not _is_live(path):
            delete_if_there(path)


@contextlib.contextmanager
def _marked_live(path: str, handle: Any) -> Iterator[None]:
    """Holds a lock on a local file, which the system lets go of when this process dies, however it dies."""
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
        with as_os_errors():
            yield
    except OSError as error:
        reason, number = _reason(error), _number(error)
        if number in _SPACE:
            advice = "make room there"
        elif number in _PERMISSION or isinstance(error, PermissionError):
            advice = "give this user the right to write there"
        else:
            advice = "mend that"
        raise WriteFailed(
            f"{path}: cannot be written: {reason}; {advice}, then give the same command again: it goes on where it "
            "stopped"
        ) from error


@contextlib.contextmanager
def as_os_errors(path: str = "") -> Iterator[None]:
    """Raises OSErrors in place of those of Cloud Storage's client, so that callers need to know of one kind only. Their
    messages begin with `path`."""
    try:
        yield
    except BeamIOError as error:
        for cause in _causes(error):
            if isinstance(cause, CLOUD_ERRORS):
                raise _as_os_error(cause, path) from error
        raise
    except CLOUD_ERRORS as error:
        raise _as_os_error(error, path) from error


def _as_os_error(error: BaseException, path: str) -> OSError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    try:
        said = f"HTTP status {status}: {response.json()['error']['message']}"  # type: ignore[union-attr]
    except (AttributeError, ValueError, LookupError, TypeError):
        said = " ".join(str(error).split())
    kind = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}.get(status or 0, OSError)
    return kind(f"{path}: {said}" if path else said)


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
    """Give the file at `source` the name `target`, in place of what has it. In Cloud Storage it is copied and deleted:
    for a moment both are there."""
    make_folder(target.rpartition("/")[0])
    with as_os_errors(target):
        FileSystems.rename([source], [target])


def delete_if_there(path: str) -> None:
    """Delete `path` where it exists; where it is a local folder, with all that lies under it."""
    if in_cloud_storage(path):
        with as_os_errors(path):
            _gcs().delete(path)
    elif FileSystems.exists(path):
        _delete(path)


def delete_folder(path: str) -> None:
    """Delete `path` and all that lies under it, where there is something."""
    if not in_cloud_storage(path):
        delete_if_there(path)
        return
    with as_os_errors(path), ThreadPoolExecutor(_DELETED_AT_ONCE) as pool:
        found = list(_objects_under(path))
        batches = [found[start : start + 100] for start in range(0, len(found), 100)]
        failed = [name for names in pool.map(_delete_objects, batches) for name in names]
    if failed:
        raise OSError(f"{path}: {len(failed)} objects cannot be deleted ({failed[0]}, …); give the right to, there")


def _objects_under(folder: str) -> Iterator[str]:
    """The paths of all objects under a folder of Cloud Storage, as they are listed."""
    with as_os_errors(folder):
        for path, _ in _gcs().list_files(f"{folder}/"):
            yield path


def _delete_objects(paths: list[str]) -> list[str]:
    """Delete them in one request; those that could not be, and why."""
    outcomes = _gcs().delete_batch(paths)
    return [f"{path}: HTTP status {status}" for path, status in outcomes if status]


def _delete(path: str) -> None:
    if os.path.isdir(path):  # Beam would take its name for a pattern
        shutil.rmtree(path)
    else:
        os.remove(path)


def cache_folder() -> Path:
    """This user's folder on this machine for what can be had again: `PAIRSIFT_CACHE`, else the user's cache folder."""
    if named := os.environ.get("PAIRSIFT_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "pairsift"
    except RuntimeError:  # a container may run as a number that has no home
        return Path(tempfile.gettempdir()) / "pairsift"


def local_copy(path: str) -> str:
    """A local copy of the remote file or folder, made once per machine and state of the remote; a local path as it is.

    A copy is complete before it gets its name, and changed files give another name. Raises FileNotFoundError where
    nothing is there.
    """
    if "://" not in path:
        return path
    url = path.rstrip("/")
    found = sorted(matching(literal(url)) or matching(f"{literal(url)}/**"), key=lambda file: file.path)
    if not found:
        raise FileNotFoundError(f"{url}: nothing there")
    state = "\n".join(f"{f.path} {f.size_in_bytes} {f.last_updated_in_seconds}" for f in found)
    copy = cache_folder() / "models" / hashlib.sha256(state.encode()).hexdigest()[:32]
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):  # a machine's worker processes all start at once
        if not copy.exists():
            aside = copy.with_name(f"{copy.name}.tmp-{uuid.uuid4().hex}")
            try:
                for file in found:
                    target = aside / (file.path.removeprefix(url).lstrip("/") or url.rsplit("/", 1)[1])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open_binary(file.path) as remote, target.open("wb") as local, as_os_errors(file.path):
                        shutil.copyfileobj(remote, local, 2**20)
                aside.rename(copy)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return str(copy / url.rsplit("/", 1)[1] if found[0].path == url else copy)


def make_folder(path: str) -> None:
    """Make a local folder; Cloud Storage has none."""
    if path and not in_cloud_storage(path) and not FileSystems.exists(path):
        # Another worker may make it at the same moment.
        with contextlib.suppress(BeamIOError, OSError):
            FileSystems.mkdirs(path)


class _CountingWriter:
    """Counts what passes, because not every filesystem's handle can tell its position. Errors name `path`, the name
    that the file is to have. `closes`: whether closing it closes `handle` too."""

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
