"""How many cores each worker process has."""

import os

import pytest

from pipeline.runners.cores import cores_per_worker

PROCESSES = "--direct_running_mode=multi_processing"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], 8),
        (["--direct_num_workers=4"], 8),  # without processes these are threads
        (["--direct_num_workers=4", PROCESSES], 2),
        (["--direct_num_workers=0", PROCESSES], 1),  # Beam starts one for each core
        (["--direct_num_workers=16", PROCESSES], 1),
        (["--runner=PortableRunner", "--environment_type=LOOPBACK", "--direct_num_workers=2"], 4),
        (["--runner=DataflowRunner"], 1),
    ],
)
def test_cores_of_a_worker(options: list[str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert cores_per_worker(options) == expected
