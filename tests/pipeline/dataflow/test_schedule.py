"""Tests of `pairsift schedule` against a local server that answers like the APIs."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.dataflow.launch import BY, REQUEST
from pipeline.dataflow.names import run_name
from tests.pipeline.dataflow.conftest import ACCOUNT, PLACES, Pairsift
from tests.pipeline.dataflow.discovery import service
from tests.pipeline.dataflow.google_cloud import Answer, GoogleCloud

SCHEDULE = ("schedule", "recipe.yaml", *PLACES)
WEEKLY = (*SCHEDULE, "--weekly", "Mon 03:00")
NAME = run_name("gs://my-bucket/out")
PATH = f"projects/my-project/locations/us-central1/jobs/{NAME}"


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_schedule_starts_the_same_execution_as_launch(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    dry = pairsift(*WEEKLY, "--time-zone", "Europe/Berlin", "--dry-run", "--json")
    assert cloud.sent == []
    result = pairsift(*WEEKLY, "--time-zone", "Europe/Berlin")
    assert result.exit_code == 0, result.output
    assert f"created {NAME}: runs at 0 3 * * 1 (Europe/Berlin), next at 2026-11-30T03:00:00Z" in result.stdout
    upload, workflow, schedule = events(dry.stdout)
    assert upload["url"].startswith(f"{cloud.url}/storage/upload/")
    assert [workflow["body"]] == cloud.bodies("workflows.create")
    assert [schedule["body"]] == cloud.bodies("jobs.create")

    job = cloud.schedules[PATH]
    assert (job["schedule"], job["timeZone"]) == ("0 3 * * 1", "Europe/Berlin")
    target = job["httpTarget"]
    assert target["oauthToken"]["serviceAccountEmail"] == "pairsift@my-project.iam.gserviceaccount.com"
    verb, path = target["httpMethod"], target["uri"].removeprefix(f"{cloud.url}/workflowexecutions/")
    method = service("workflowexecutions").method(verb, path)
    assert method.id == "workflowexecutions.projects.locations.workflows.executions.create"
    assert method.named["workflowsId"] == NAME in cloud.workflows
    execution = json.loads(base64.b64decode(target["body"]))
    assert service("workflowexecutions").faults(method, execution) == []

    assert pairsift("launch", *SCHEDULE[1:]).exit_code == 0
    (launched,) = cloud.bodies("executions.create")
    assert launched["labels"][REQUEST] == execution["labels"][REQUEST]
    assert execution["labels"][BY] == "schedule" != launched["labels"][BY]


def test_second_schedule_of_an_output_updates_the_first(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    assert pairsift(*WEEKLY).exit_code == 0
    cloud.schedules[PATH]["state"] = "PAUSED"
    result = pairsift(*SCHEDULE, "--cron", "30 4 * * 2,5")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"updated {NAME}: runs at 30 4 * * 2,5 (Etc/UTC)")
    assert f"`gcloud scheduler jobs resume {NAME} --location=us-central1 --project=my-project`" in result.stdout
    assert cloud.schedules[PATH]["schedule"] == "30 4 * * 2,5"
    assert len(cloud.schedules) == len(cloud.workflows) == 1


def test_schedule_created_concurrently(cloud: GoogleCloud, pairsift: Pairsift, waits: list[float]) -> None:
    cloud.fail("jobs.create", Answer(503, "lost on the way", does_it=True))
    result = pairsift(*WEEKLY)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("updated")
    assert len(cloud.schedules) == 1


def test_deleting(cloud: GoogleCloud, pairsift: Pairsift) -> None:
    delete = ("schedule", *PLACES[2:], "--delete")
    assert pairsift(*WEEKLY).exit_code == 0
    dry = pairsift(*delete, "--dry-run")
    assert dry.stdout.split() == ["DELETE", f"{cloud.url}/cloudscheduler/v1/{PATH}"]
    assert list(cloud.schedules) == [PATH]
    assert f"deleted the schedule {NAME}; active runs continue" in pairsift(*delete).stdout
    assert cloud.schedules == {}
    result = pairsift(*delete)
    assert result.exit_code == 0 and f"there is no schedule {NAME}" in result.stdout
    assert list(cloud.workflows) == [NAME]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "one of --weekly and --cron"),
        (["--weekly", "Mon 03:00", "--cron", "0 3 * * 1"], "one of --weekly and --cron"),
        (["--weekly", "Mo 03:00"], '--weekly: got Mo 03:00; allowed: a day and a time, for example "Mon 03:00"'),
        (["--weekly", "Mon 24:00"], "--weekly: got Mon 24:00"),
        (["--cron", "0 3 * *"], "--cron: got 0 3 * *; allowed: minute, hour, day, month, weekday"),
        (["--cron", "@weekly"], "--cron: got @weekly"),
        (["--weekly", "Mon 03:00", "--time-zone", "CEST"], "--time-zone: got CEST"),
        (["--weekly", "Mon 03:00", "--input", "pool"], "--input 2: got pool"),
    ],
)
def test_wrong_use(cloud: GoogleCloud, pairsift: Pairsift, more: list[str], message: str) -> None:
    result = pairsift(*SCHEDULE, *more)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert cloud.sent == []


def test_schedule_needs_a_service_account(cloud: GoogleCloud, pairsift: Pairsift, place: Path) -> None:
    content = yaml.safe_load((place / "dataflow.yaml").read_text())
    del content["service_account"]
    (place / "dataflow.yaml").write_text(yaml.safe_dump(content))
    result = pairsift(*WEEKLY)
    assert result.exit_code == 2 and "service_account is missing" in result.stderr
    assert cloud.sent == []


@pytest.mark.parametrize(
    ("weekly", "cron"),
    [("Mon 03:00", "0 3 * * 1"), ("sunday 23:59", "59 23 * * 0"), ("SAT  7:05", "5 7 * * 6")],
)
def test_weekly_time(pairsift: Pairsift, weekly: str, cron: str) -> None:
    *_, request = events(pairsift(*SCHEDULE, "--weekly", weekly, "--dry-run", "--json").stdout)
    assert request["body"]["schedule"] == cron


@pytest.mark.parametrize(
    ("method", "answer", "advice"),
    [
        ("jobs.patch", Answer(403, "no"), "cloudscheduler.jobs.update; `gcloud projects add-iam-policy-binding "
         f"my-project --member=serviceAccount:{ACCOUNT} --role=roles/cloudscheduler.admin` grants it"),
        ("workflows.create", Answer(403, "no"), "--role=roles/workflows.editor` grants it"),
        ("workflows.get", Answer(403, "off", "SERVICE_DISABLED", {"service": "workflows.googleapis.com"}),
         "run `gcloud services enable workflows.googleapis.com --project=my-project`"),
        ("jobs.create", Answer(404, "no such location"), "that its region offers cloudscheduler"),
    ],
)  # fmt: skip
def test_error_says_what_to_do_next(
    cloud: GoogleCloud, pairsift: Pairsift, method: str, answer: Answer, advice: str
) -> None:
    cloud.fail(method, answer)
    result = pairsift(*WEEKLY)
    assert result.exit_code == 1
    assert advice in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert cloud.schedules == {}
