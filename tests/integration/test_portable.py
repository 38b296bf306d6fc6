"""Tests of the portable runner, with a job service and a pool of external workers.

The outputs are identical to those of a local run. If any process dies, the run ends with a message and can be resumed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.runners import workers
from pipeline.runners.supported import EMBED
from tests.integration.chaos import Case, Reference, Run, tree
from tests.integration.portable import Pool, job_service, lives, worker_pool
from tests.integration.test_faults import LONG, error_of, finishes_like, wait_for


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with worker_pool() as pool:
        yield pool


def portable(case: Case, pool: Pool, job_endpoint: str = EMBED) -> Case:
    return dataclasses.replace(case, beam_options=pool.options(job_endpoint))


def at_work(output: Path, stage: str = "*") -> None:
    wait_for(lambda: list(output.glob(f".progress/{stage}/*.count")), 300)  # the stage has started


@pytest.mark.slow
def test_two_workers_of_a_pool_give_the_bytes_of_a_local_run(
    case: Case, reference: Reference, pool: Pool, tmp_path: Path
) -> None:
    run = Run(portable(case, pool), tmp_path / "out")
    wait_for(lambda: len(pool.workers) == 2)
    assert run.finish() == 0, run.said
    assert tree(tmp_path / "out") == reference.tree
    outputs = tmp_path / "out", reference.output
    counts, expected = (json.loads((output / "run.json").read_text())["counts"] for output in outputs)
    of_shards = {"shards_done", "shards_finished_before", "samples_done", "samples_back", "tars_opened"}
    for stage in expected:  # each worker loads a model once
        assert {name: counts[stage][name] for name in of_shards} == {name: expected[stage][name] for name in of_shards}
    assert pool.process.children() == []


@LONG
@pytest.mark.parametrize("service", ["in this process", "in its own process"])
@pytest.mark.parametrize("stage", ["single_modality", "cross_modality"])
def test_killed_worker(
    case: Case, reference: Reference, pool: Pool, tmp_path: Path, stage: str, service: str
) -> None:
    output = tmp_path / "out"
    with job_service() as address:
        endpoint = EMBED if service == "in this process" else address
        run = Run(portable(case, pool, endpoint), output)
        at_work(output, stage)
        there = wait_for(lambda: len(pool.workers) == 2 and pool.workers)
        there[0].send_signal(signal.SIGKILL)
        message = error_of(run)
        assert message.startswith(f"{stage}: a worker process of the pool at {pool.address} is gone: ")
        assert "the same command again" in message
        wait_for(lambda: not any(map(lives, there)))
        finishes_like(portable(case, pool, endpoint), output, reference)


@LONG
def test_workers_as_threads_of_the_run(case: Case, reference: Reference, tmp_path: Path) -> None:
    options = ("--runner=PortableRunner", f"--job_endpoint={EMBED}", "--environment_type=LOOPBACK")
    finishes_like(dataclasses.replace(case, beam_options=options), tmp_path / "out", reference)


@LONG
def test_a_job_ends_with_its_run(case: Case, reference: Reference, pool: Pool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with job_service() as address:
        run = Run(portable(case, pool, address), output)
        at_work(output)
        there = wait_for(lambda: len(pool.workers) == 2 and pool.workers)
        run.kill()
        wait_for(lambda: not any(map(lives, there)))
        finishes_like(portable(case, pool, address), output, reference)


@LONG
def test_killed_job_service(case: Case, reference: Reference, pool: Pool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with job_service() as address:
        run = Run(portable(case, pool, address), output)
        at_work(output)
        there = wait_for(lambda: len(pool.workers) == 2 and pool.workers)
    assert error_of(run).startswith("single_modality: the job service is gone (UNAVAILABLE: ")
    wait_for(lambda: not any(map(lives, there)))
    finishes_like(portable(case, pool), output, reference)


@LONG
def test_killed_pool_starts_no_more_workers(case: Case, reference: Reference, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with worker_pool() as pool:
        run = Run(portable(case, pool), output)
        at_work(output)
        there = wait_for(lambda: len(pool.workers) == 2 and pool.workers)
        pool.process.kill()  # only the pool itself; its workers finish the stage
        assert error_of(run).startswith(f"the worker pool at {pool.address} starts no worker (UNAVAILABLE: ")
        assert run.stage == 1
        wait_for(lambda: not any(map(lives, there)))
    with worker_pool() as pool:
        finishes_like(portable(case, pool), output, reference)


def hurry(ask_seconds: float, answer_seconds: float) -> None:
    workers._ASK_SECONDS, workers._ANSWER_SECONDS = ask_seconds, answer_seconds


@LONG
def test_worker_that_never_answers(case: Case, reference: Reference, pool: Pool, tmp_path: Path) -> None:
    """Simulates a worker that has died on a machine or network failure without closing its connection."""
    output = tmp_path / "out"
    run = Run(portable(case, pool), output, before=functools.partial(hurry, 1.0, 15.0))
    at_work(output)
    there = wait_for(lambda: len(pool.workers) == 2 and pool.workers)
    there[0].suspend()
    message = error_of(run)
    assert message.startswith(f"single_modality: a worker process of the pool at {pool.address} has not answered for ")
    wait_for(lambda: not any(map(lives, there)))
    finishes_like(portable(case, pool), output, reference)


@LONG
def test_a_job_outlasts_the_timeout_of_its_service(
    case: Case, reference: Reference, pool: Pool, tmp_path: Path
) -> None:
    """By default, Beam follows a job on an external service for `--job_server_timeout` seconds and then reports it as
    failed."""
    with job_service() as address:
        patient = portable(case, pool, address)
        patient = dataclasses.replace(patient, beam_options=(*patient.beam_options, "--job_server_timeout=2"))
        finishes_like(patient, tmp_path / "out", reference)
