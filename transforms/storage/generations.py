"""Cloud Storage objects that several processes may write at once: a lock, a pointer.

Each state of an object has its own generation. A writer names the generation that it read, and the store accepts only
one of several writers that name the same; the others get status 412. The response to the accepted request can be lost,
so a writer that gets a conflict has to check whether the object is its own.
"""

from __future__ import annotations

import contextlib
import datetime
from typing import Any, NamedTuple

NOTHING = 0
"""The generation of an object that does not exist."""

_RETRY_SECONDS = 30.0


class GenerationConflict(RuntimeError):
    """The object does not have the expected generation."""


class Object(NamedTuple):
    """One state of an object. `updated` is by the store's clock."""

    content: bytes
    generation: int
    updated: datetime.datetime


def read(path: str) -> Object | None:
    """The object at `path`; None if there is none. Raises OSError."""
    from google.api_core.exceptions import NotFound

    from transforms.storage import cloud_storage

    with cloud_storage.as_os_errors(path):
        while True:
            blob = cloud_storage.blob(path)
            try:
                blob.reload(retry=_retry())
            except NotFound:
                return None
            with contextlib.suppress(NotFound):  # this generation was replaced in between
                return Object(blob.download_as_bytes(retry=_retry()), blob.generation, blob.updated)


def replace(path: str, content: bytes, generation: int) -> Object:
    """Write `content` to `path` in place of the object of that generation (`NOTHING`: where there is none).

    Raises GenerationConflict if the object has another generation, OSError if it cannot be written.
    """
    from google.api_core.exceptions import PreconditionFailed

    from transforms.storage import cloud_storage

    blob = cloud_storage.blob(path)
    with cloud_storage.as_os_errors(path):
        try:
            blob.upload_from_string(content, "application/json", if_generation_match=generation, retry=_retry())
        except PreconditionFailed as error:
            raise GenerationConflict(f"{path}: somebody else has written it meanwhile") from error
    return Object(content, blob.generation, blob.updated)


def remove(path: str, generation: int) -> None:
    """Delete the object of that generation. Raises GenerationConflict if it has another one or is gone; OSError."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    from transforms.storage import cloud_storage

    with cloud_storage.as_os_errors(path):
        try:
            cloud_storage.blob(path).delete(if_generation_match=generation, retry=_retry())
        except (NotFound, PreconditionFailed) as error:
            raise GenerationConflict(f"{path}: somebody else has written or deleted it meanwhile") from error


def now(path: str) -> datetime.datetime:
    """The time by the store's clock, read from an object that is written to `path` and deleted. Raises OSError."""
    from google.api_core.exceptions import NotFound

    from transforms.storage import cloud_storage

    blob = cloud_storage.blob(path)
    with cloud_storage.as_os_errors(path):
        blob.upload_from_string(b"", retry=_retry())
        with contextlib.suppress(NotFound):  # deleted by another process that asked at the same time
            cloud_storage.blob(path).delete(retry=_retry())
    return blob.updated


def _retry() -> Any:
    """The client's own retries, for 30 s. Safe, because a generation is replaced only once."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_RETRY_SECONDS)
