"""Tests of the lock in Cloud Storage: one writer at a time, despite lost answers and killed processes."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from google.api_core.exceptions import Forbidden

from pipeline.google_cloud.jobs import DataflowJob
from pipeline.output_folder import lock
from pipeline.output_folder.lock import Held, hold_for_job, is_held, only_writer, release_for_job
from tests.cloud_storage.server import CloudStorage, Request
from transforms.storage import generations

JOB = DataflowJob("my-project", "europe-west4", "pairsift-0123456789ab-single-modality")
NEXT = JOB._replace(name="pairsift-0123456789ab-cross-modality")

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["pipeline.output_folder.lock"])


def of_lock(kind: str) -> Callable[[Request], bool]:
    return lambda request: request.kind == kind and request.name.endswith(".lock.json")


def hold(output: str, **more: object) -> None:
    with only_writer(output, **more):  # type: ignore[arg-type]
        pass


def unasked(job: DataflowJob, since: datetime.datetime) -> bool | None:
    raise AssertionError(f"Dataflow was asked about {job}")


@pytest.fixture
def output(bucket: str) -> str:
    return f"gs://{bucket}/out"


@pytest.fixture(autouse=True)
def _clock_as_it_was(store: CloudStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "clock", datetime.timedelta(days=-400))  # must not depend on the local clock


def pass_minutes(store: CloudStorage, minutes: float) -> None:
    store.clock += datetime.timedelta(minutes=minutes)


class Holder:
    """Another process that holds the lock until it is stopped."""

    def __init__(self, output: str, log: Path, refreshed_seconds: float = 60) -> None:
        held, self._ended, self._log = _FORKS.Event(), _FORKS.Event(), log
        given = (output, refreshed_seconds, dict(os.environ), str(log), held, self._ended)
        self.process = _FORKS.Process(target=_hold, args=given)
        self.process.start()
        assert held.wait(60)
        assert self.process.pid
        self.pid = self.process.pid

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()
        self.process.join()

    def end(self) -> None:
        """Make the process release the lock and end."""
        self._ended.set()
        self.process.join(60)

    @property
    def said(self) -> str:
        """Return its output on stderr."""
        return self._log.read_text()


def _hold(
    output: str, refreshed_seconds: float, environment: dict[str, str], log: str, held: Event, ended: Event
) -> None:
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    lock.REFRESHED_SECONDS = refreshed_seconds
    with only_writer(output):
        held.set()
        ended.wait()


@pytest.fixture
def holder(output: str, tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(output, tmp_path / "log")
    yield holder
    holder.kill()


def on_another_machine(store: CloudStorage, output: str) -> None:
    """Make the lock appear to be held on another machine."""
    path = f"{output}/.lock.json"
    found = generations.read(path)
    assert found
    who = json.loads(found.content)
    generations.replace(path, json.dumps({**who, "machine": "another"}).encode(), found.generation)


# A process ---------------------------------------------------------------------------------------------------------


def test_second_writer_is_refused_with_details_of_the_first(holder: Holder, output: str) -> None:
    with pytest.raises(Held, match=rf"{output}: process {holder.pid} of \S+ on \S+, since 20\d\d-.* is writing it"):
        hold(output)


def test_lock_is_released_on_success_and_failure(store: CloudStorage, bucket: str, output: str) -> None:
    hold(output)
    with pytest.raises(RuntimeError, match="boom"), only_writer(output):
        raise RuntimeError("boom")
    hold(output)
    assert store.names(bucket) == []


def test_two_runs_in_one_process_exclude_each_other(output: str) -> None:
    with only_writer(output), pytest.raises(Held, match=f"process {os.getpid()}"):
        hold(output)


def test_lock_of_a_dead_local_process_is_taken_over_at_once(
    store: CloudStorage, bucket: str, holder: Holder, output: str
) -> None:
    holder.kill()
    assert store.names(bucket) == ["out/.lock.json"]
    hold(output)
    assert store.names(bucket) == []


def test_unrefreshed_remote_lock_is_taken_over_after_minutes_on_the_server(
    store: CloudStorage, bucket: str, holder: Holder, output: str
) -> None:
    on_another_machine(store, output)
    pass_minutes(store, 4.9)
    with pytest.raises(Held, match=r"its lock expires in \d s at most"):
        hold(output)
    pass_minutes(store, 0.2)
    hold(output)
    assert store.names(bucket) == []


def test_refreshed_lock_is_kept(store: CloudStorage, output: str, tmp_path: Path) -> None:
    holder = Holder(output, tmp_path / "log", refreshed_seconds=0.05)
    before = generations.read(f"{output}/.lock.json")
    on_refresh = store.pause(of_lock("write"))
    assert on_refresh.reached.wait(10)
    pass_minutes(store, 60)
    on_refresh.resume()
    second = store.pause(of_lock("write"))
    assert second.reached.wait(10)
    after = generations.read(f"{output}/.lock.json")
    second.resume()
    assert before and after
    assert after.generation > before.generation
    assert after.updated - before.updated > datetime.timedelta(minutes=59)
    with pytest.raises(Held):
        hold(output)
    holder.end()
    assert holder.process.exitcode == 0
    hold(output)


def test_holder_ends_if_its_lock_was_taken_over(store: CloudStorage, output: str, tmp_path: Path) -> None:
    holder = Holder(output, tmp_path / "log", refreshed_seconds=0.3)
    path = f"{output}/.lock.json"
    while True:  # retries if the holder refreshes first
        found = generations.read(path)
        assert found
        try:
            taken = generations.replace(path, b'{"host": "elsewhere"}', found.generation)
            break
        except generations.GenerationConflict:
            continue
    holder.process.join(30)
    assert holder.process.exitcode == 1
    assert f"{output}: another run has taken its lock" in holder.said
    assert "the same command again" in holder.said
    assert generations.read(path) == taken


def test_holder_that_cannot_refresh_ends_before_a_takeover(
    store: CloudStorage, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gave_up: list[str] = []
    monkeypatch.setattr(lock, "REFRESHED_SECONDS", 0.02)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.6)
    monkeypatch.setattr(lock._Keeper, "_give_up", lambda self, reason: gave_up.append(reason))
    with only_writer(output):
        store.fail(of_lock("write"), 403, times=1)
        time.sleep(0.25)
        assert not gave_up  # a single failure is tolerated
        store.fail(of_lock("write"), 403, times=10_000)
        begun = time.monotonic()
        while not gave_up:
            time.sleep(0.005)
        assert 0.2 < time.monotonic() - begun < 0.55
        store._faults.clear()
    assert "its lock cannot be renewed: " in gave_up[0]
    assert "HTTP status 403" in gave_up[0]


def test_release_does_not_delete_the_lock_of_another_holder(store: CloudStorage, output: str) -> None:
    with only_writer(output):
        store.put(output.split("/")[2], "out/.lock.json", b"{}")
    assert generations.read(f"{output}/.lock.json") is not None


@pytest.mark.parametrize("status", [503, 500])
def test_lost_answer_has_no_effect(store: CloudStorage, bucket: str, output: str, status: int) -> None:
    store.fail(of_lock("write"), status, done=True)  # the client retries and gets 412
    with only_writer(output), pytest.raises(Held):
        hold(output)
    assert store.names(bucket) == []


def test_refresh_with_a_lost_answer_keeps_the_lock(
    store: CloudStorage, bucket: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "REFRESHED_SECONDS", 0.05)
    gave_up: list[str] = []
    monkeypatch.setattr(lock._Keeper, "_give_up", lambda self, reason: gave_up.append(reason))
    with only_writer(output):
        first = generations.read(f"{output}/.lock.json")
        store.fail(of_lock("write"), 503, done=True)
        for _ in range(2):
            refresh = store.pause(of_lock("write"))
            assert refresh.reached.wait(10)
            refresh.resume()
    assert first and not gave_up
    assert store.names(bucket) == []


def test_one_of_many_concurrent_writers_gets_the_lock(store: CloudStorage, bucket: str, output: str) -> None:
    store.put(bucket, "out/.lock.json", b'{"host": "a", "pid": 1, "user": "u", "since": "s"}')
    pass_minutes(store, 6)
    barrier, ended = threading.Barrier(8), threading.Event()

    def want(_: int) -> bool:
        barrier.wait()
        try:
            with only_writer(output):
                ended.wait()
                return True
        except Held:
            return False
        finally:
            outcomes.append(1)

    outcomes: list[int] = []
    with ThreadPoolExecutor(8) as pool:
        got = [pool.submit(want, n) for n in range(8)]
        while len(outcomes) < 7:
            time.sleep(0.01)
        ended.set()
    assert sorted(future.result() for future in got) == [False] * 7 + [True]
    assert store.names(bucket) == []


def test_two_concurrent_takeovers_do_not_both_succeed(store: CloudStorage, bucket: str, output: str) -> None:
    store.put(bucket, "out/.lock.json", b'{"host": "a", "pid": 1, "user": "u", "since": "s"}')
    pass_minutes(store, 6)
    slow = store.pause(of_lock("write"))
    refused: list[Held] = []

    def take() -> None:
        try:
            hold(output)
        except Held as error:
            refused.append(error)

    taker = threading.Thread(target=take)
    taker.start()
    assert slow.reached.wait(10)  # it considers the holder dead and writes the lock
    with only_writer(output):
        slow.resume()
        taker.join()
    assert len(refused) == 1
    assert f"process {os.getpid()}" in str(refused[0])


def test_unreadable_lock_is_not_taken_over_at_once(store: CloudStorage, bucket: str, output: str) -> None:
    for content in (b"", b"[]", b"\xff", b'{"pid": 1}'):
        store.put(bucket, "out/.lock.json", content)
        with pytest.raises(Held, match="another run is writing it"):
            hold(output)
    pass_minutes(store, 6)
    hold(output)


def test_missing_bucket(store: CloudStorage) -> None:
    with pytest.raises(OSError, match=r"gs://no-such/out/\.lock\.json: HTTP status 404: The specified bucket"):
        hold("gs://no-such/out")


# A Dataflow job ----------------------------------------------------------------------------------------------------


def test_job_holds_the_lock_until_its_last_step(store: CloudStorage, bucket: str, output: str) -> None:
    held = hold_for_job(output, JOB, unasked)
    (content,) = (json.loads(stored.content) for stored in store.buckets[bucket].values())
    assert {**JOB._asdict()}.items() <= content.items()
    expected = f"{output}: Dataflow job {JOB.name} of my-project in europe-west4, since 20"
    with pytest.raises(Held, match=re.escape(expected)):
        hold(output, is_over=lambda job, since: False)
    with pytest.raises(Held, match=re.escape(expected)):
        hold_for_job(output, NEXT, lambda job, since: False)
    release_for_job(output, held)
    release_for_job(output, held)  # a retried step
    assert store.names(bucket) == []


def test_job_of_the_same_name_gets_the_lock(output: str) -> None:
    first, second, third = (hold_for_job(output, JOB, unasked) for _ in range(3))
    for held in (first, second):  # for example, of two scheduled runs
        release_for_job(output, held)
        assert not is_held(output, held)
    assert is_held(output, third)
    release_for_job(output, third)
    assert not is_held(output, third)


def test_lock_of_another_holder_is_not_released(store: CloudStorage, bucket: str, output: str) -> None:
    held = hold_for_job(output, JOB)
    next_ = hold_for_job(output, NEXT, lambda job, since: True)
    release_for_job(output, held)
    assert store.names(bucket) == ["out/.lock.json"]
    with only_writer(output, lambda job, since: True):
        release_for_job(output, next_)
        with pytest.raises(Held):
            hold(output)


def test_next_stage_takes_over_from_an_ended_job(output: str) -> None:
    asked = []

    def is_over(job: DataflowJob, since: datetime.datetime) -> bool:
        asked.append(job)
        return True

    hold_for_job(output, JOB)
    held = hold_for_job(output, NEXT, is_over)
    assert asked == [JOB]
    release_for_job(output, held)


def test_only_jobs_created_after_the_lock_are_considered(store: CloudStorage, output: str) -> None:
    def is_over(job: DataflowJob, since: datetime.datetime) -> bool:
        moments.append(since)
        return False

    moments: list[datetime.datetime] = []
    for _ in range(2):
        hold_for_job(output, JOB)
        with pytest.raises(Held):
            hold(output, is_over=is_over)
        pass_minutes(store, 60 * 24 * 7)
    assert datetime.timedelta(days=7) <= moments[1] - moments[0] < datetime.timedelta(days=7, minutes=1)


def test_unknown_job_keeps_the_lock_for_a_while(store: CloudStorage, output: str) -> None:
    hold_for_job(output, JOB)
    pass_minutes(store, 14)
    with pytest.raises(Held):
        hold(output, is_over=lambda job, since: None)
    pass_minutes(store, 2)
    hold(output, is_over=lambda job, since: None)


def test_job_keeps_the_lock_if_dataflow_is_unavailable(store: CloudStorage, output: str) -> None:
    def is_over(job: DataflowJob, since: datetime.datetime) -> bool:
        raise Forbidden("no dataflow.jobs.list")

    hold_for_job(output, JOB)
    pass_minutes(store, 60 * 24)
    with pytest.raises(Held, match=r"cannot find out whether it is over \(403 no dataflow\.jobs\.list\)"):
        hold(output, is_over=is_over)


def test_process_excludes_a_job(holder: Holder, output: str) -> None:
    with pytest.raises(Held, match=f"process {holder.pid}"):
        hold_for_job(output, JOB, unasked)
