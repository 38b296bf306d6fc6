"""Tests of stage 3 over 20,000 generated rows: planted cases are found, and bytes do not depend on parallelism."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import alignment
from pipeline import graphs
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import write_listing
from pipeline.runners.supported import pipeline_of
from pipeline.sources.pool import list_shards

ROWS = 20_000
SLOW = pytest.mark.slow  # test_alignment_graph.py compares orders and numbers of workers on few rows
WRITTEN = ("centroids.npy", "clusters.parquet", "clusters.svg", "subset.npy", "funnel.json", "decisions")


@pytest.fixture(scope="module")
def pool() -> alignment.Pool:
    return alignment.make_pool(ROWS)


@pytest.fixture(scope="module")
def annotated(pool: alignment.Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annotated")
    alignment.write_tables(pool, folder)
    return folder


@pytest.fixture(scope="module")
def one_thread(annotated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    return in_a_process(annotated, folder, threads=1)


def in_a_process(annotated: Path, folder: Path, threads: int, *beam_options: str) -> Path:
    shutil.copytree(annotated, folder)
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks.alignment", "--stage", str(folder), str(ROWS), "", *beam_options]
    subprocess.run(command, env={**os.environ, **limits}, check=True, cwd=Path(__file__).parents[2])
    return folder


def written(folder: Path) -> dict[str, bytes]:
    found = [path for name in WRITTEN for path in sorted([folder / "out" / name, *(folder / "out" / name).glob("*")])]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


def test_exactly_what_was_planted_is_found(pool: alignment.Pool, one_thread: Path):
    found = alignment.found(pool, one_thread)
    assert found["planted_above"] > 900
    assert found["planted_above_found"] == found["planted_above"]
    assert found["planted_below"] == 1000
    assert found["dropped_otherwise"] == found["oracle_differs"] == 0
    assert sorted(path.name for path in (one_thread / "out").iterdir()) == sorted([*WRITTEN, "annotations"])


@SLOW
def test_two_threads_change_nothing(annotated: Path, one_thread: Path, tmp_path: Path):
    assert written(in_a_process(annotated, tmp_path / "run", threads=2)) == written(one_thread)


@SLOW
def test_two_worker_processes_change_nothing(annotated: Path, one_thread: Path, tmp_path: Path):
    options = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
    assert written(in_a_process(annotated, tmp_path / "run", 1, *options)) == written(one_thread)


@SLOW
def test_another_order_of_the_shards_changes_nothing(annotated: Path, one_thread: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(annotated, folder)
    shards = list_shards(str(folder / "pool"))
    job = graphs.Job(
        alignment.recipe(ROWS, str(folder / "tasks.npz"), None), tuple(shards[::-1]), Layout(str(folder / "out")), {}
    )
    write_listing(job.layout, job.shards)
    pipeline = pipeline_of([])
    graphs.build(graphs.distribution_alignment, pipeline, job)
    pipeline.run().wait_until_finish()
    assert len(shards) == ROWS // alignment.SHARD_ROWS
    assert written(folder) == written(one_thread)
