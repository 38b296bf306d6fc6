"""The lock: one writer at a time; the lock of a dead writer is taken over."""

from __future__ import annotations

import errno
import getpass
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.output_folder.lock import Held, only_writer
from transforms.core.errors import UsageError

HOLDER = """
import sys, time
from pipeline.output_folder.lock import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(output: Path) -> None:
    with only_writer(str(output)):
        pass


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock."""
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_run_is_refused_with_holder_and_time(holder: subprocess.Popen, tmp_path: Path) -> None:
    with pytest.raises(Held, match=rf"out: process {holder.pid} of {getpass.getuser()} on \S+, since 20\d\d-"):
        hold(tmp_path / "out")


def test_lock_of_a_dead_holder_is_taken_over(holder: subprocess.Popen, tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / ".lock.json").exists()  # it could not clean up
    hold(tmp_path / "out")
    hold(tmp_path / "out")
    assert not (tmp_path / "out" / ".lock.json").exists()


def test_second_run_of_one_process_is_refused(tmp_path: Path) -> None:
    with only_writer(str(tmp_path / "out")), pytest.raises(Held, match=f"process {os.getpid()}"):
        hold(tmp_path / "out")


def test_other_folders_are_free(holder: subprocess.Popen, tmp_path: Path) -> None:
    hold(tmp_path / "other")


def test_failed_run_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), only_writer(str(tmp_path / "out")):
        raise RuntimeError("boom")
    hold(tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_filesystem_without_locks_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    expected = rf"out: its filesystem offers no file locks \({os.strerror(number)}\), .*; name an --output on a local"
    with pytest.raises(UsageError, match=expected):
        hold(tmp_path / "out")
