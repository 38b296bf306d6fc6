"""Tests of machine faults: a killed worker, a full disk, a folder without write permission, a missing shard.

Each run ends, without hanging, with exit status 1 and one line that says what failed, where, and what to do next. The
next run has outputs identical to those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import pipeline.runs.stage as stage_module
from tests.integration.chaos import TWO_WORKERS, Case, Reference, Run, tree
from transforms.storage import files

HANGS_SECONDS = 180.0  # on a busy machine, starting alone takes a minute
SLOW = pytest.mark.slow  # run by `make test-slow`
LONG = pytest.mark.chaos  # run by `make chaos`


def error_of(run: Run) -> str:
    """Return the error message of a failed run, after checking that it printed no traceback."""
    assert run.finish(HANGS_SECONDS) == 1, run.said
    assert "Traceback" not in run.said, run.said
    *others, last = run.said.splitlines()
    events = {json.loads(line)["event"] for line in others if line}
    assert events <= {"stage_done", "stage_counts", "progress"}, run.said
    assert json.loads(last)["event"] == "error"
    return json.loads(last)["message"]


def finishes_like(case: Case, output: Path, reference: Reference) -> None:
    run = Run(case, output)
    assert run.finish() == 0, run.said
    assert tree(output) == reference.tree


# Worker processes -------------------------------------------------------------------------------------------------


def workers_of(run: Run) -> list[psutil.Process]:
    """Return the Python processes that Beam's local runner has started."""
    found = []
    for child in psutil.Process(run.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # the process has just ended
            if child.cmdline()[1:] == ["-m", "apache_beam.runners.worker.sdk_worker_main"]:
                found.append(child)
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("when", [pytest.param("at work", marks=SLOW), pytest.param("before it works", marks=LONG)])
def test_killed_worker(case: Case, reference: Reference, tmp_path: Path, when: str) -> None:
    output = tmp_path / "out"
    run = Run(dataclasses.replace(case, beam_options=TWO_WORKERS), output)
    if when == "at work":
        wait_for(lambda: list(output.glob(".progress/*/*.count")))
    workers = wait_for(lambda: workers_of(run))
    workers[0].send_signal(signal.SIGKILL)
    message = error_of(run)
    assert message.startswith("single_modality: a worker process was killed by signal 9 (Killed); ")
    assert "the same command again" in message
    assert psutil.wait_procs(workers, timeout=20)[1] == []  # no worker is left
    finishes_like(case, output, reference)


@LONG
def test_workers_end_when_the_run_is_killed_alone(case: Case, reference: Reference, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = Run(dataclasses.replace(case, beam_options=TWO_WORKERS), output)
    wait_for(lambda: list(output.glob(".progress/*/*.count")))
    workers = workers_of(run)
    assert len(workers) == 2
    run.process.kill()
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    finishes_like(case, output, reference)


# The disk --------------------------------------------------------------------------------------------------------


class FailingFile(io.FileIO):
    """A file on a failing disk: writes raise `error` once `left_bytes` have been written to all files."""

    left_bytes = 0
    error = OSError()

    def write(self, content: Any) -> int:
        FailingFile.left_bytes -= memoryview(content).nbytes
        if FailingFile.left_bytes < 0:
            raise FailingFile.error
        return super().write(content)


def fill_disk(left_bytes: int) -> None:
    """Simulate a full disk: after `left_bytes`, every write fails."""
    FailingFile.left_bytes, FailingFile.error = left_bytes, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    files.create = lambda path: FailingFile(path, "wb")


@pytest.mark.parametrize(
    "share", [pytest.param(0.25, marks=SLOW), *(pytest.param(share, marks=LONG) for share in (0.0, 0.6, 0.95))]
)
def test_a_full_disk(case: Case, reference: Reference, tmp_path: Path, share: float) -> None:
    output = tmp_path / "out"
    written = [path for path in reference.output.rglob("*") if path.is_file() and not path.is_symlink()]
    size_bytes = int(sum(path.stat().st_size for path in written) * share)
    message = error_of(Run(case, output, before=functools.partial(fill_disk, size_bytes)))
    assert str(output) in message
    assert ": cannot be written: No space left on device; free space there, then run the same command again" in message
    assert not [path for path in output.rglob("*") if files.is_aside(str(path))]
    finishes_like(case, output, reference)


def deny(names: str, function: str) -> None:
    """Simulate a path without write permission, because tests that run as root could write to any path."""
    module = files if function == "create" else os
    plain = getattr(module, function)

    def denied(path: Any, *others: Any, **options: Any) -> Any:
        if names in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path, *others, **options)

    setattr(module, function, denied)


@LONG
@pytest.mark.parametrize(
    ("function", "names", "where"),
    [
        ("create", "manifest.json", "annotations/manifest.json"),
        ("create", "annotations/single_modality/.00002", "annotations/single_modality/00002.parquet"),
        ("rename", "decisions/", "versions/1/decisions/part-"),
        ("rename", "subset.npy", "versions/1/subset.npy"),
    ],
)
def test_path_without_write_permission(
    case: Case, reference: Reference, tmp_path: Path, function: str, names: str, where: str
) -> None:
    output = tmp_path / "out"
    message = error_of(Run(case, output, before=functools.partial(deny, names, function)))
    assert message.startswith(f"{output}/{where}")
    assert ": cannot be written: Permission denied; allow this user to write there, then run" in message
    finishes_like(case, output, reference)


# Shards ----------------------------------------------------------------------------------------------------------


def delete_before(stage: str, shard: Path) -> None:
    """Delete the shard after it has been listed, before the stage starts."""
    plain = stage_module._run_stage

    def run_stage(name: str, *others: Any) -> Any:
        if name == stage:
            shard.unlink()
        return plain(name, *others)

    stage_module._run_stage = run_stage  # type: ignore[assignment]


@LONG
@pytest.mark.parametrize(
    ("stage", "beam_options"), [("single_modality", ()), ("cross_modality", ()), ("single_modality", TWO_WORKERS)]
)
def test_shard_deleted_before_it_is_read(
    case: Case, reference: Reference, tmp_path: Path, stage: str, beam_options: tuple[str, ...]
) -> None:
    output, shard, kept = tmp_path / "out", case.pool / "00002.tar", tmp_path / "kept.tar"
    case = dataclasses.replace(case, beam_options=beam_options)
    shutil.copy2(shard, kept)
    try:
        message = error_of(Run(case, output, before=functools.partial(delete_before, stage, shard)))
    finally:
        shutil.copy2(kept, shard)
    assert message.startswith(f"{shard}: cannot be read at byte 0: No such file or directory; put it back ")
    assert not list(output.glob("dead_letters/*00002*"))
    finishes_like(case, output, reference)


class Flaky:
    """A tar on a disk that fails a limited number of times at a certain byte."""

    def __init__(self, file: Any, failures: Iterator[None]) -> None:
        self._file, self._failures = file, failures

    def read(self, size_bytes: int) -> bytes:
        if self._file.tell() > 20_000:
            for _ in self._failures:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._file.read(size_bytes)

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def close(self) -> None:
        self._file.close()


def flake(failures: int) -> None:
    plain, left = files.open_binary, iter([None] * failures)
    files.open_binary = lambda path: Flaky(plain(path), left) if path.endswith("00000.tar") else plain(path)


@LONG
def test_transient_disk_error_is_retried(case: Case, reference: Reference, tmp_path: Path) -> None:
    run = Run(case, tmp_path / "out", before=functools.partial(flake, 3))
    assert run.finish() == 0, run.said
    assert tree(tmp_path / "out") == reference.tree


@LONG
def test_permanent_disk_error_is_an_error_and_not_a_dead_letter(
    case: Case, reference: Reference, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    message = error_of(Run(case, output, before=functools.partial(flake, 1000)))
    assert message.startswith(f"{case.pool}/00000.tar: cannot be read at byte ")
    assert "Input/output error" in message
    assert not list(output.glob("dead_letters/*00000*"))
    finishes_like(case, output, reference)
