"""A worker pool and a job service, each in a separate process group."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[2]


class Pool(NamedTuple):
    """A worker pool: its address, and the process that starts workers on request."""

    address: str
    process: psutil.Process

    def options(self, job_endpoint: str = "embed", workers: int = 2) -> tuple[str, ...]:
        """Return the Beam options for running on this pool."""
        return (
            "--runner=PortableRunner",
            f"--job_endpoint={job_endpoint}",
            "--environment_type=EXTERNAL",
            f"--environment_config={self.address}",
            f"--direct_num_workers={workers}",
        )

    @property
    def workers(self) -> list[psutil.Process]:
        """The live workers."""
        return [child for child in self.process.children() if lives(child)]


def lives(process: psutil.Process) -> bool:
    """Return whether a process is alive. A pool keeps ended workers as zombies, which are not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def worker_pool() -> Iterator[Pool]:
    """Start `worker_pool_main` with workers that import this checkout."""
    address = f"localhost:{_free_port()}"
    command = ["-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={address.rpartition(':')[2]}"]
    with _started(command) as process:
        _wait_until_open(address)
        yield Pool(address, psutil.Process(process.pid))


@contextlib.contextmanager
def job_service(module: str = "pipeline.runners.job_service") -> Iterator[str]:
    """Start a job service and provide its address."""
    address = f"localhost:{_free_port()}"
    with _started(["-m", module, f"--port={address.rpartition(':')[2]}"]):
        _wait_until_open(address)
        yield address


@contextlib.contextmanager
def _started(arguments: list[str]) -> Iterator[subprocess.Popen]:
    # The pool starts `python`, which must be the current interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_WAIT_POLICY": "PASSIVE"}  # there are more threads than cores
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _wait_until_open(address: str) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens at {address}")
