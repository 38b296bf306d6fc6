"""The lock of an output folder: one run at a time may write it.

On a file system the lock is a file lock, which the operating system releases when the process ends. A file beside it
names the holder.

In Cloud Storage that file is the lock, as a lease: the object is created only if it does not exist, and replaced or
deleted only at the generation that was read (`transforms.storage.generations`), so exactly one of two contenders gets
it. A process renews its lease every minute. The lease expires after five minutes without renewal, by the clock of the
store, or at once if its process died on this machine. A process that cannot renew its lease, or finds that another run
holds it, exits before the lease expires. A Dataflow job, whose workers come and go, holds the lock by its job name;
Dataflow is queried to find out whether the job has ended.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from pipeline.google_cloud import jobs
from pipeline.google_cloud.jobs import DataflowJob
from transforms.core.errors import Failure, UsageError
from transforms.storage import files, generations

NAMES = (".lock", ".lock.json", ".lock.clock")
"""The files of the lock. A killed run leaves them behind."""

REFRESHED_SECONDS = 60.0
STALE_SECONDS = 300.0
STARTING_SECONDS = 900.0  # a job still unknown to Dataflow this long after it got the lock was never started


class Held(RuntimeError):
    """Another run is writing the output folder. The message names it and says since when."""


class HeldForJob(NamedTuple):
    """A lock held for a job. `token` is unique to this acquisition, even among jobs of the same name."""

    job: DataflowJob
    token: str


IsOver = Callable[[DataflowJob, datetime.datetime], bool | None]
"""Whether the job of that name that got its lock at that time is over; None if Dataflow knows no such job."""


@contextlib.contextmanager
def only_writer(output: str, is_over: IsOver | None = None) -> Iterator[None]:
    """Lock the output folder while the body runs. Raises Held if another run holds the lock.

    `is_over` says whether a Dataflow job that holds the lock is over; by default Dataflow is queried.
    """
    with _held_object(output, is_over) if files.in_cloud_storage(output) else _held_file(output):
        yield


def hold_for_job(output: str, job: DataflowJob, is_over: IsOver | None = None) -> HeldForJob:
    """Lock a folder in Cloud Storage for a job that is about to start. A lock held by a job of that name is taken over.

    The lock is held until `release_for_job`, which is the job's last step, or until the job is over. Raises Held.
    """
    held = _take(output, {**job._asdict(), "since": _since()}, is_over)
    return HeldForJob(job, _content(held)["token"])


def is_held(output: str, held: HeldForJob) -> bool:
    """Whether `held` is still the lock of the folder."""
    return _object_of(output, held) is not None


def release_for_job(output: str, held: HeldForJob) -> None:
    """Release the lock if `held` still holds it. Calling it again, as a retried step does, changes nothing."""
    if found := _object_of(output, held):
        with contextlib.suppress(generations.GenerationConflict):
            generations.remove(_object_path(output), found.generation)


def _object_of(output: str, held: HeldForJob) -> generations.Object | None:
    found = generations.read(_object_path(output))
    return found if found and _content(found).get("token") == held.token else None


@contextlib.contextmanager
def _held_file(output: str) -> Iterator[None]:
    lock_path, holder_path = (files.join(output, name) for name in NAMES[:2])
    files.make_folder(output)
    lock = FileLock(lock_path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Held(f"{output}: {_holder(holder_path)} is writing it; wait for that run, or end it") from error
    except OSError as error:
        if error.errno not in files.NO_LOCKS:
            raise
        raise UsageError(
            f"{output}: its filesystem offers no file locks ({files.reason(error)}), so two runs could write it at "
            "once; name an --output on a local disk, on a network filesystem mounted with locks, or on gs://"
        ) from error
    try:
        files.write_json(holder_path, _this_process())
        yield
    finally:
        files.delete_if_there(holder_path)
        lock.release()


@contextlib.contextmanager
def _held_object(output: str, is_over: IsOver | None) -> Iterator[None]:
    begun = time.monotonic()
    keeper = _Keeper(output, _take(output, _this_process(), is_over), begun)
    try:
        yield
    finally:
        keeper.release()


def _take(output: str, me: dict[str, Any], is_over: IsOver | None) -> generations.Object:
    """Acquire the lock and return its object. Raises Held."""
    path = _object_path(output)
    content = (json.dumps({**me, "token": uuid.uuid4().hex}) + "\n").encode()
    while True:
        found = generations.read(path)
        if found and found.content == content:  # an earlier attempt succeeded, and its response was lost
            return found
        if found:
            _check_free(output, found, _job_of(me), is_over)
        with contextlib.suppress(generations.GenerationConflict):  # the next iteration reads the new state
            return generations.replace(path, content, found.generation if found else generations.NOTHING)


def _check_free(output: str, found: generations.Object, us: DataflowJob | None, is_over: IsOver | None) -> None:
    """Raise Held unless the holder is this job (`us`) or is gone."""
    who = _content(found)
    job = _job_of(who)
    if job and job == us:
        return
    if _died_here(who):
        return
    age_seconds = (generations.now(files.join(output, NAMES[2])) - found.updated).total_seconds()
    advice = "wait for that run, or end it"
    if job:
        from transforms.storage import cloud_storage  # imported already: the lock is an object

        try:
            over = (is_over or _ask_dataflow)(job, found.updated)
        except (OSError, Failure, *cloud_storage.ERRORS) as error:
            over, advice = False, f"cannot find out whether it is over ({' '.join(str(error).split())})"
        is_free = age_seconds > STARTING_SECONDS if over is None else over
    else:
        is_free = age_seconds > STALE_SECONDS
        if not is_free:
            advice += f"; if it was killed, its lock expires in {STALE_SECONDS - age_seconds:.0f} s at most"
    if not is_free:
        raise Held(f"{output}: {_named(who)} is writing it; {advice}")


def _ask_dataflow(job: DataflowJob, since: datetime.datetime) -> bool | None:
    return jobs.is_over(job, since)


class _Keeper:
    """Renews a lock object in a thread of its own."""

    def __init__(self, output: str, held: generations.Object, begun: float) -> None:
        self._output, self._held, self._renewed = output, held, begun
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="keep_lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing, and delete the lock object if it is still this process's."""
        self._done.set()
        self._thread.join()
        try:
            generations.remove(_object_path(self._output), self._held.generation)
        except generations.GenerationConflict:
            logging.warning("%s: when this run ended, another run held its lock, or the lock was deleted", self._output)
        except OSError as error:
            logging.warning("%s: its lock cannot be deleted (%s); it expires by itself", self._output, error)

    def _keep(self) -> None:
        while not self._done.wait(REFRESHED_SECONDS):
            begun = time.monotonic()
            try:
                self._held = self._refreshed()
                self._renewed = begun
            except generations.GenerationConflict:
                self._give_up("another run has taken its lock, which this run had not renewed for minutes")
            except OSError as error:
                if time.monotonic() - self._renewed > STALE_SECONDS / 2:  # another run may take it after STALE_SECONDS
                    self._give_up(f"its lock cannot be renewed: {error}")

    def _refreshed(self) -> generations.Object:
        path = _object_path(self._output)
        try:
            return generations.replace(path, self._held.content, self._held.generation)
        except generations.GenerationConflict:
            found = generations.read(path)
            if found and found.content == self._held.content:  # our own write, whose response was lost
                return found
            raise

    def _give_up(self, reason: str) -> None:
        if self._done.is_set():
            return
        logging.critical(
            "%s: %s; this process exits, so that only one run writes the folder; run the same command again to resume",
            self._output,
            reason,
        )
        os._exit(1)  # `sys.exit` would end this thread only


def _object_path(output: str) -> str:
    return files.join(output, NAMES[1])


def _content(found: generations.Object) -> dict[str, Any]:
    try:
        who = json.loads(found.content)
    except ValueError:
        return {}
    return who if isinstance(who, dict) else {}


def _job_of(who: dict[str, Any]) -> DataflowJob | None:
    return DataflowJob(*(str(who.get(field)) for field in DataflowJob._fields)) if "region" in who else None


def _this_process() -> dict[str, Any]:
    who = {"host": socket.gethostname(), "pid": os.getpid(), "user": _user(), "since": _since()}
    return {**who, "machine": _machine()}


def _machine() -> str | None:
    """An identifier shared by processes that can see each other's ids, until this machine restarts; None if the system
    has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _died_here(who: dict[str, Any]) -> bool:
    if who.get("machine") is None or who["machine"] != _machine():
        return False
    try:
        os.kill(int(who["pid"]), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except PermissionError:  # it is alive, and another user's
        pass
    return False


def _since() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user id without a name
        return str(os.getuid())


def _holder(path: str) -> str:
    try:
        return _named(json.loads(files.read_bytes(path)))
    except (OSError, ValueError):  # it has just started or just ended
        return "another run"


def _named(who: Any) -> str:
    try:
        if "region" in who:
            return f"Dataflow job {who['name']} of {who['project']} in {who['region']}, since {who['since']},"
        return f"process {who['pid']} of {who['user']} on {who['host']}, since {who['since']},"
    except (LookupError, TypeError):
        return "another run"
