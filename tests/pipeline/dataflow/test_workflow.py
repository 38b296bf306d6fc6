"""Tests that interpret templates/workflow.yaml, with the argument of `pairsift launch`, against a local server.

The server answers like Dataflow. `workflow_language` interprets the definition in place of Cloud Workflows.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from pipeline.dataflow.launch import BY, REQUEST
from pipeline.dataflow.names import job_name
from tests.pipeline.dataflow.conftest import PLACES, Pairsift
from tests.pipeline.dataflow.google_cloud import Answer, GoogleCloud
from tests.pipeline.dataflow.workflow_language import Raised, execute
from transforms.core.recipe import STAGES

NAMES = [job_name("gs://my-bucket/out", stage) for stage in STAGES]


@pytest.fixture
def run(cloud: GoogleCloud, pairsift: Pairsift) -> Any:
    """Run the execution that `pairsift launch` has started."""
    assert pairsift("launch", "recipe.yaml", *PLACES).exit_code == 0
    (definition,), (execution,) = cloud.bodies("workflows.create"), cloud.bodies("executions.create")
    cloud.sent.clear()
    cloud.states = {name: ["JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_DONE"] for name in NAMES}
    return lambda: execute(yaml.safe_load(definition["sourceContents"]), json.loads(execution["argument"]), cloud)


def test_stages_run_in_sequence(cloud: GoogleCloud, run: Any) -> None:
    addresses = run()
    assert cloud.ids() == ["flexTemplates.launch", "jobs.get", "jobs.get", "jobs.get"] * 3
    assert [body["launchParameter"]["jobName"] for body in cloud.bodies("flexTemplates.launch")] == NAMES
    regional = "https://console.cloud.google.com/dataflow/jobs/us-central1"
    assert addresses == [f"{regional}/{job}?project=my-project" for job in cloud.jobs]


@pytest.mark.parametrize("end", ["FAILED", "CANCELLED", "DRAINED", "UPDATED"])
def test_failed_job_ends_the_execution(cloud: GoogleCloud, run: Any, end: str) -> None:
    cloud.states[NAMES[1]] = ["JOB_STATE_RUNNING", f"JOB_STATE_{end}"]
    with pytest.raises(Raised, match=f"job {NAMES[1]} ended as JOB_STATE_{end}; https://console"):
        run()
    assert [job["name"] for job in cloud.jobs.values()] == NAMES[:2]


def test_running_job_is_adopted(cloud: GoogleCloud, run: Any, pairsift: Pairsift) -> None:
    assert pairsift("launch", "recipe.yaml", *PLACES, "--stage", "single_modality").exit_code == 0
    run()
    assert [job["name"] for job in cloud.jobs.values()] == NAMES


@pytest.mark.parametrize("labels", [{REQUEST: "0" * 32, BY: "ada"}, {}])
def test_running_job_with_other_parameters_is_an_error(cloud: GoogleCloud, run: Any, labels: dict[str, str]) -> None:
    cloud.add_job(NAMES[0], labels, "JOB_STATE_RUNNING")
    cloud.states[NAMES[0]] = []
    with pytest.raises(Raised, match=f"job {NAMES[0]} runs with other parameters"):
        run()
    assert len(cloud.jobs) == 1


def test_job_without_labels_yet_is_requested_again(
    cloud: GoogleCloud, run: Any, pairsift: Pairsift, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pairsift("launch", "recipe.yaml", *PLACES, "--stage", "single_modality").exit_code == 0
    (job,) = cloud.jobs.values()
    cloud.states[NAMES[0]] = ["JOB_STATE_QUEUED", "JOB_STATE_QUEUED", "JOB_STATE_RUNNING", "JOB_STATE_DONE"]
    labels, get = job.pop("labels"), cloud._dataflow_jobs_get

    def look(*arguments: Any) -> tuple[int, Any]:
        status, found = get(*arguments)
        return status, dict(found) | ({"labels": labels} if found["currentState"] == "JOB_STATE_RUNNING" else {})

    monkeypatch.setattr(cloud, "_dataflow_jobs_get", look)
    cloud.sent.clear()
    run()
    assert cloud.ids()[:7] == ["flexTemplates.launch", *["jobs.list", "jobs.get"] * 3]
    assert [job["name"] for job in cloud.jobs.values()] == NAMES


def test_lost_answer_does_not_start_a_second_job(cloud: GoogleCloud, run: Any) -> None:
    cloud.fail("flexTemplates.launch", Answer(503, "lost on the way", does_it=True))
    run()
    assert [job["name"] for job in cloud.jobs.values()] == NAMES


def test_refused_launch_ends_the_execution(cloud: GoogleCloud, run: Any) -> None:
    cloud.fail("flexTemplates.launch", Answer(403))
    with pytest.raises(Raised, match="403"):
        run()
    assert cloud.jobs == {}
