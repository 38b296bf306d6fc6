"""Objects of Cloud Storage. `transforms.storage.files` calls this module for paths that begin with `gs://`.

Importing it takes half a second, so `files` and `generations` import it when they first need it. All functions raise
OSError if the store refuses a request or cannot be reached; `as_os_errors` does the translation.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import google.auth
from google.api_core.exceptions import GoogleAPIError, NotFound, RetryError, from_http_response
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.fileio import BlobReader
from google.cloud.storage.retry import DEFAULT_RETRY

ERRORS = (GoogleAPIError, GoogleAuthError, InvalidResponse, DataCorruption)
"""The errors that the Cloud Storage client raises besides OSError."""

CHUNK_BYTES = 2**24  # read per request, and sent per request of a resumable upload
_BATCH_OBJECTS = 100  # the most that Cloud Storage accepts in one batch request
_BATCHES_AT_ONCE = 8
_ERROR_TYPES: dict[int | None, type[OSError]] = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}
_clients = threading.local()


@contextlib.contextmanager
def as_os_errors(path: str = "") -> Iterator[None]:
    """Raise the client's errors as OSError, with a message that begins with `path`."""
    try:
        yield
    except ERRORS as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        try:
            message = f"HTTP status {status}: {response.json()['error']['message']}"  # type: ignore[union-attr]
        except (AttributeError, ValueError, LookupError, TypeError):
            message = " ".join(str(error).split())
        raise _ERROR_TYPES.get(status, OSError)(f"{path}: {message}" if path else message) from error


@functools.cache
def credentials() -> Credentials:
    """The user's default credentials; anonymous ones if there are none, which is enough to read a public bucket.

    An emulator (`STORAGE_EMULATOR_HOST`) gets credentials only if `GOOGLE_APPLICATION_CREDENTIALS` names them.
    """
    if "STORAGE_EMULATOR_HOST" in os.environ and "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ:
        return AnonymousCredentials()
    try:
        return google.auth.default(scopes=storage.Client.SCOPE)[0]
    except DefaultCredentialsError:
        return AnonymousCredentials()


def blob(path: str) -> storage.Blob:
    """The client's handle for the object at `path`. Sends no request."""
    bucket, name = _bucket_and_name(path)
    if not name:
        raise OSError(f"{path}: names no object; allowed: gs://BUCKET/OBJECT")
    return _client().bucket(bucket).blob(name, chunk_size=CHUNK_BYTES)


def exists(path: str) -> bool:
    """Whether there is an object at `path`."""
    with as_os_errors(path):
        return blob(path).exists(retry=DEFAULT_RETRY)


def status(path: str) -> tuple[int, float] | None:
    """Size in bytes and time of the last change (Unix time, seconds) of the object at `path`; None if it is gone."""
    found = blob(path)
    with as_os_errors(path):
        try:
            found.reload(retry=DEFAULT_RETRY)
        except NotFound:
            return None
    return found.size, found.updated.timestamp()


def objects(prefix: str) -> Iterator[tuple[str, int, float]]:
    """Path, size in bytes and time of the last change (Unix time, seconds) of all objects that begin with `prefix`,
    in pages as they are listed."""
    bucket, name = _bucket_and_name(prefix)
    with as_os_errors(prefix):
        for found in _client().list_blobs(bucket, prefix=name, retry=DEFAULT_RETRY):
            yield f"gs://{bucket}/{found.name}", found.size, found.updated.timestamp()


def files_in(folder: str) -> dict[str, int]:
    """Name -> size in bytes of the objects directly in `folder`."""
    prefix, listing = _listing(folder)
    with as_os_errors(folder):
        return {found.name.removeprefix(prefix): found.size for found in listing if found.name != prefix}


def folders_in(folder: str) -> set[str]:
    """The names of the folders directly in `folder`. Their objects are not listed."""
    prefix, listing = _listing(folder)
    with as_os_errors(folder):
        for _ in listing.pages:
            pass  # the listing collects its prefixes page by page
    return {name.removeprefix(prefix).rstrip("/") for name in listing.prefixes}


def open_binary(path: str) -> BlobReader:
    """A reader of the object's stored bytes, all of one generation."""
    found = blob(path)
    with as_os_errors(path):
        found.reload(retry=DEFAULT_RETRY)  # pins the generation; and `seek` needs the size
    return BlobReader(found, raw_download=True, retry=DEFAULT_RETRY)


def upload(path: str, file: BinaryIO, size_bytes: int) -> int:
    """Write all of `file` to the object at `path`; returns the size that the store reports, in bytes.

    The object appears, or is replaced, once the upload is complete.
    """
    target = blob(path)
    with as_os_errors():
        target.upload_from_file(file, size=size_bytes, checksum="crc32c", retry=DEFAULT_RETRY)
    return target.size


def rename(source: str, target: str) -> None:
    """Copy an object to `target` and delete it at `source`. For a moment both exist."""
    copied, (bucket, name) = blob(source), _bucket_and_name(target)
    with as_os_errors(target):
        copied.bucket.copy_blob(copied, _client().bucket(bucket), name, retry=DEFAULT_RETRY)
        delete(source)


def delete(path: str) -> None:
    """Delete the object at `path` if there is one."""
    found = blob(path)
    with as_os_errors(path), contextlib.suppress(NotFound):
        found.delete(retry=DEFAULT_RETRY)


def delete_all(prefix: str) -> None:
    """Delete all objects that begin with `prefix`."""
    bucket, _ = _bucket_and_name(prefix)
    names = [path.removeprefix(f"gs://{bucket}/") for path, _, _ in objects(prefix)]
    batches = [names[start : start + _BATCH_OBJECTS] for start in range(0, len(names), _BATCH_OBJECTS)]
    with as_os_errors(prefix), ThreadPoolExecutor(_BATCHES_AT_ONCE) as pool:
        outcomes = pool.map(functools.partial(_delete_batch, bucket), batches)
        failed = [f"gs://{bucket}/{name}: HTTP status {code}" for outcome in outcomes for name, code in outcome.items()]
    if failed:
        raise OSError(
            f"{prefix}: {len(failed)} objects cannot be deleted ({failed[0]}, …); grant the right to delete there"
        )


def _delete_batch(bucket: str, names: list[str]) -> dict[str, int]:
    """Delete objects in one request, and again those that failed for a moment; returns the HTTP status of those that
    could not be deleted."""
    failed: dict[str, int] = {}

    @DEFAULT_RETRY
    def attempt() -> None:
        pending = list(failed) or names
        target = _client().bucket(bucket)
        with _client().batch(raise_exception=False) as batch:
            for name in pending:
                target.delete_blob(name)
        failed.clear()
        errors = []
        for name, response in zip(pending, batch._responses, strict=True):  # the client has no public name for them
            if response.status_code >= 400 and response.status_code != 404:
                failed[name] = response.status_code
                errors.append(from_http_response(response))
        transient = [error for error in errors if DEFAULT_RETRY._predicate(error)]
        if transient:
            raise transient[0]

    with contextlib.suppress(RetryError):
        attempt()
    return failed


def _listing(folder: str) -> tuple[str, Any]:
    """The prefix of a folder's objects, and the listing of what is directly in it."""
    bucket, prefix = _bucket_and_name(f"{folder.rstrip('/')}/")
    return prefix, _client().list_blobs(bucket, prefix=prefix, delimiter="/", retry=DEFAULT_RETRY)


def _bucket_and_name(path: str) -> tuple[str, str]:
    bucket, _, name = path.removeprefix("gs://").partition("/")
    if not bucket:
        raise OSError(f"{path}: names no bucket; allowed: gs://BUCKET/FOLDER")
    return bucket, name


def _client() -> storage.Client:
    """This thread's client; its connections are reused. Made without a project, which reading and writing objects do
    not need."""
    if not hasattr(_clients, "client"):
        _clients.client = storage.Client(project=None, credentials=credentials())
    return _clients.client
