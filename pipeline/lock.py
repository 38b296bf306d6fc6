"""One writer: an output folder belongs to one run at a time.

On a file system the lock is the operating system's own, which vanishes with its process, so a dead holder's is taken
over by itself; who holds it stands in a file beside it. An object store has no such lock yet (its form of this will be
an object that is made only where there is none): there nothing is held.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import json
import os
import socket
from collections.abc import Iterator

from filelock import FileLock, Timeout

from pipeline import files

NAMES = (".lock", ".lock.json")
"""The files of the lock; one that was killed leaves them behind."""


class Held(RuntimeError):
    """An output folder that another run is writing: who, and since when."""


@contextlib.contextmanager
def only_writer(output: str) -> Iterator[None]:
    """Hold the output folder while the body runs. Raises Held where another run does."""
    if "://" in output:
        yield
        return
    lock_path, holder_path = (files.join(output, name) for name in NAMES)
    files.make_folder(output)
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Held(f"{output}: {_holder(holder_path)} is writing it; wait for that run, or end it") from error
    try:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        me = {"host": socket.gethostname(), "pid": os.getpid(), "user": _user(), "since": now}
        files.write_json(holder_path, me)
        yield
    finally:
        files.delete_if_there(holder_path)
        lock.release()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that nobody named
        return str(os.getuid())


def _holder(path: str) -> str:
    try:
        who = json.loads(files.read_bytes(path))
        return f"process {who['pid']} of {who['user']} on {who['host']}, since {who['since']},"
    except (OSError, ValueError, LookupError, TypeError):  # just begun, or just ended
        return "another run"
