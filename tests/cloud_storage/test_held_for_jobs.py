"""Tests of the lock that is held for a Dataflow job from its launcher to its last step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import graphs
from pipeline.dataflow.names import job_name
from pipeline.dataflow.template import launcher, limits
from pipeline.google_cloud.jobs import DataflowJob
from pipeline.output_folder import lock
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import write_listing
from pipeline.output_folder.lock import hold_for_job
from pipeline.sinks.publication import NotHeld, Publication, publish
from tests.pipeline.dataflow.jobs import handed_over
from transforms.core.errors import UsageError
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY
from transforms.distribution_alignment.work_folder import WorkFolder
from transforms.storage import files, generations


@pytest.fixture
def output(bucket: str) -> str:
    return f"gs://{bucket}/out"


def holder(output: str) -> str | None:
    found = generations.read(f"{output}/.lock.json")
    return json.loads(found.content)["name"] if found else None


def test_submitted_job_holds_the_folder(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = f"{output}/.distribution_alignment/tiles/0-0.npz"  # left by a killed run
    files.write_bytes(left, b"left")
    handed_over(tmp_path, monkeypatch, "demo", DISTRIBUTION_ALIGNMENT, output=output)
    assert holder(output) == job_name(output, DISTRIBUTION_ALIGNMENT)
    assert not files.exists(left)


def test_refused_job_releases_the_folder(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(UsageError, match="the job's graph has"):
        handed_over(tmp_path, monkeypatch, "demo", CROSS_MODALITY, output=output)
    assert holder(output) is None


@pytest.mark.parametrize("over", [False, True])
def test_next_job_takes_over_after_the_previous_one_has_ended(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    before = DataflowJob("my-project", "us-central1", job_name(output, SINGLE_MODALITY))
    hold_for_job(output, before)
    monkeypatch.setattr(lock, "_ask_dataflow", lambda job, since: over)
    if over:
        handed_over(tmp_path, monkeypatch, "demo", CROSS_MODALITY, output=output)
        assert holder(output) == job_name(output, CROSS_MODALITY)
    else:
        with pytest.raises(UsageError, match=f"Dataflow job {before.name} of my-project in us-central1, since .* is w"):
            handed_over(tmp_path, monkeypatch, "demo", CROSS_MODALITY, output=output)
        assert holder(output) == before.name


def test_publishing_releases_the_folder_even_on_retry(output: str) -> None:
    job = DataflowJob("my-project", "us-central1", job_name(output, DISTRIBUTION_ALIGNMENT))
    layout = written(output)
    publication = Publication({"seed": 0}, 3, hold_for_job(output, job))
    for _ in range(2):
        publish(layout, publication)
        assert holder(output) is None
        assert json.loads(files.read_bytes(f"{output}/current.json")) == {"version": 1}


def written(output: str) -> Layout:
    """Return a version that only lacks its last step."""
    layout = Layout(output, f"{output}/versions/1")
    files.write_json(layout.funnel, {})
    write_listing(layout, [])
    return layout


def test_late_retry_of_the_last_step_does_not_affect_the_next_run(output: str) -> None:
    job = DataflowJob("my-project", "us-central1", job_name(output, DISTRIBUTION_ALIGNMENT))
    layout = written(output)
    publication = Publication({"seed": 0}, 3, hold_for_job(output, job))
    publish(layout, publication)
    hold_for_job(output, job)  # the job of the next scheduled run has the same name
    theirs = (
        f"{output}/versions/2/subset.npy",
        f"{layout.alignment_work}/tiles/0",
    )
    for path in theirs:
        files.write_bytes(path, b"at work")
    publish(layout, publication)
    graphs._clear(0, WorkFolder(layout.alignment_work), layout, publication)
    assert all(map(files.exists, theirs))
    assert holder(output) == job.name


def test_job_whose_folder_was_taken_over_publishes_nothing(output: str) -> None:
    job = DataflowJob("my-project", "us-central1", job_name(output, DISTRIBUTION_ALIGNMENT))
    layout = written(output)
    publication = Publication({"seed": 0}, 3, hold_for_job(output, job))
    message = f"another run has taken over this folder from {job.name}"
    with lock.only_writer(output, lambda job, since: True), pytest.raises(NotHeld, match=message):
        publish(layout, publication)
    assert not files.exists(layout.manifest) and not files.exists(f"{output}/current.json")


def test_launcher_does_not_lock_for_an_unknown_job(output: str) -> None:
    with (
        pytest.raises(UsageError, match="has no listing of a pool"),
        launcher._held_for(DataflowJob("p", "r", "n"), Layout(output)),
    ):
        launcher._listed(Layout(output))
    assert holder(output) is None
