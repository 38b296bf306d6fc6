"""Marks of files that a running process is writing."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def marked_live(path: str, handle: Any) -> Iterator[None]:
    """Hold a lock on a local file. The system releases it when this process dies, however it dies."""
    descriptor = os.dup(handle.fileno())  # stays open after the handle is closed, until the rename
    try:
        with contextlib.suppress(OSError):  # no locks on this filesystem: `is_live` then takes every file for live
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_live(path: str) -> bool:
    """Whether a running process holds the lock on a local file, or that cannot be found out."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
