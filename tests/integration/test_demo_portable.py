"""A test of the complete demo with the portable runner and external workers."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.demo_run import POOL, RECIPE, demo_output, snapshot
from tests.integration.chaos import Case, Run
from tests.integration.portable import job_service, worker_pool
from tests.integration.test_faults import error_of, wait_for


@pytest.mark.slow  # tests/integration/test_portable.py runs a small pool on the portable path
def test_killed_worker_on_the_portable_runner_loses_no_work(tmp_path, tmp_path_factory):
    """With a job service and two external worker processes, one of which is killed during the run."""
    with worker_pool() as pool, job_service() as address:
        case = Case(Path(str(POOL)), Path(str(RECIPE)), pool.options(address))
        run = Run(case, tmp_path / "out")
        wait_for(lambda: list((tmp_path / "out").glob(".progress/cross_modality/*.count")), 400)
        pool.workers[0].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        message = error_of(run)
        assert time.monotonic() - killed < 60
        assert message.startswith(f"cross_modality: a worker process of the pool at {pool.address} is gone: ")
        again = Run(case, tmp_path / "out")
        assert again.finish() == 0, again.said
    assert snapshot(tmp_path / "out") == snapshot(demo_output(tmp_path_factory))
