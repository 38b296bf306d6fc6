"""Objects of Cloud Storage that several may want to write at once: a lock, a pointer.

Each state of an object has a generation of its own, and who replaces or deletes an object names the generation that it
saw. Of several that saw the same, the store lets one through and answers the others with 412. An answer can be lost,
too: who is told that somebody else was first may be that somebody, and looks at what lies there.
"""

from __future__ import annotations

import contextlib
import datetime
from typing import NamedTuple

from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud.storage.retry import DEFAULT_RETRY

from transforms.storage import files

NOTHING = 0
"""The generation of an object that is not there."""

_RETRY = DEFAULT_RETRY.with_timeout(30.0)  # seconds; safe, because a generation is replaced once


class GenerationConflict(RuntimeError):
    """The object is not, or no longer, of the generation that was named."""


class Object(NamedTuple):
    """One state of an object, and when the store took it in by its own clock."""

    content: bytes
    generation: int
    updated: datetime.datetime


def read(path: str) -> Object | None:
    """The object at `path`; None where there is none. Raises OSError."""
    with files.as_os_errors(path):
        while True:
            blob = files.cloud_blob(path)
            try:
                blob.reload(retry=_RETRY)
            except NotFound:
                return None
            with contextlib.suppress(NotFound):  # replaced in between: this generation is no longer there
                return Object(blob.download_as_bytes(retry=_RETRY), blob.generation, blob.updated)


def replace(path: str, content: bytes, generation: int) -> Object:
    """Write `content` to `path` in place of the object of that generation (`NOTHING`: where none lies).

    Raises GenerationConflict where another lies there, OSError where the store cannot be written to.
    """
    blob = files.cloud_blob(path)
    with files.as_os_errors(path):
        try:
            blob.upload_from_string(content, "application/json", if_generation_match=generation, retry=_RETRY)
        except PreconditionFailed as error:
            raise GenerationConflict(f"{path}: somebody else has written it meanwhile") from error
    return Object(content, blob.generation, blob.updated)


def remove(path: str, generation: int) -> None:
    """Delete the object of that generation. Raises GenerationConflict where another lies there, or none; OSError."""
    with files.as_os_errors(path):
        try:
            files.cloud_blob(path).delete(if_generation_match=generation, retry=_RETRY)
        except (NotFound, PreconditionFailed) as error:
            raise GenerationConflict(f"{path}: somebody else has written or deleted it meanwhile") from error


def now(path: str) -> datetime.datetime:
    """The time by the store's own clock: that of an object written to `path` for it, and deleted. Raises OSError."""
    blob = files.cloud_blob(path)
    with files.as_os_errors(path):
        blob.upload_from_string(b"", retry=_RETRY)
        with contextlib.suppress(NotFound):  # somebody else asked at the same time
            files.cloud_blob(path).delete(retry=_RETRY)
    return blob.updated
