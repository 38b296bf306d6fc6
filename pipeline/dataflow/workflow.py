"""The workflow that runs the three stages in sequence with Cloud Workflows, its executions, and its schedule.

An output folder has one workflow and one schedule, named after it (`pipeline.dataflow.names`). The workflow's argument
contains the complete bodies of the launch requests. A job therefore has the same parameters whether it is started by
`launch --stage`, by an execution of the workflow or by the schedule.
"""

from __future__ import annotations

import base64
import importlib.resources
import json
import time
from typing import Any

from pipeline.dataflow.launch import BY, REQUEST, Launch, check_same, fingerprint
from pipeline.dataflow.names import run_name
from pipeline.dataflow.settings import DataflowSettings
from pipeline.google_cloud.rest import CONSOLE, SCOPE, Api, ApiError, Request
from transforms.core.errors import Failure, UsageError
from transforms.core.recipe import STAGES

WORKFLOWS, EXECUTIONS, SCHEDULER = "workflows", "workflowexecutions", "cloudscheduler"

_POLL_SECONDS = 2.0
_SCHEDULE_FIELDS = ("description", "schedule", "timeZone", "httpTarget", "retryConfig")
_DEFINITION_FIELDS = ("description", "sourceContents", "serviceAccount")


class Workflow:
    """The requests for the workflow and the schedule of one output folder."""

    def __init__(self, settings: DataflowSettings, output: str) -> None:
        self._settings, self._output = settings, output
        self.name = run_name(output)
        self.location = f"projects/{settings.project}/locations/{settings.region}"
        self.path = f"{self.location}/workflows/{self.name}"
        self.schedule_path = f"{self.location}/jobs/{self.name}"

    @property
    def address(self) -> str:
        """The URL of the workflow's page in the Google Cloud console."""
        settings = self._settings
        return f"{CONSOLE}/workflows/workflow/{settings.region}/{self.name}/executions?project={settings.project}"

    @property
    def schedule_address(self) -> str:
        """The URL of the page of schedules in the Google Cloud console."""
        return f"{CONSOLE}/cloudscheduler?project={self._settings.project}"

    @property
    def definition(self) -> dict[str, Any]:
        """The body of a `Workflow`."""
        source = (importlib.resources.files("templates") / "workflow.yaml").read_text(encoding="utf-8")
        content = {"description": f"pairsift, stage by stage, into {self._output}"[:1000], "sourceContents": source}
        account = self._settings.service_account
        return content | ({"serviceAccount": account} if account else {})

    def creation(self) -> Request:
        """Return the request that creates the workflow."""
        query = {"workflowId": self.name}
        return self._definition_request("POST", f"{self.location}/workflows", "create", query, self.definition)

    def update(self) -> Request:
        """Return the request that updates the workflow to this definition."""
        query = {"updateMask": ",".join(field for field in _DEFINITION_FIELDS if field in self.definition)}
        return self._definition_request("PATCH", self.path, "update", query, self.definition)

    def reading(self) -> Request:
        """Return the request that gets the workflow."""
        return self._definition_request("GET", self.path, "get")

    def _definition_request(
        self, method: str, path: str, verb: str, query: dict[str, str] | None = None, body: dict[str, Any] | None = None
    ) -> Request:
        return self._request(WORKFLOWS, method, path, f"workflows.workflows.{verb}", query, body)

    def start(self, asked: Launch) -> Request:
        """Return the request that starts an execution."""
        body = execution_body(asked)
        return self._request(EXECUTIONS, "POST", f"{self.path}/executions", "workflows.executions.create", None, body)

    def executions(self) -> Request:
        """Return the request that lists the active executions."""
        query = {"view": "FULL", "filter": 'state="ACTIVE"'}
        return self._request(EXECUTIONS, "GET", f"{self.path}/executions", "workflows.executions.list", query)

    def execution(self, name: str) -> Request:
        """Return the request that gets an execution."""
        return self._request(EXECUTIONS, "GET", name, "workflows.executions.get")

    def schedule(self, asked: Launch, cron: str, time_zone: str) -> dict[str, Any]:
        """Return the body of Cloud Scheduler's `Job`. Raises UsageError if the settings name no service account."""
        if not asked.settings.service_account:
            raise UsageError("settings: service_account is missing; a schedule needs one to start runs: add it")
        start = self.start(asked)
        return {
            "name": self.schedule_path,
            "description": f"pairsift into {self._output}"[:500],
            "schedule": cron,
            "timeZone": time_zone,
            "retryConfig": {"retryCount": 3},
            "httpTarget": {
                "uri": start.url,
                "httpMethod": start.method,
                "headers": {"Content-Type": "application/json"},
                "body": base64.b64encode(json.dumps(start.body).encode()).decode(),
                "oauthToken": {"serviceAccountEmail": asked.settings.service_account, "scope": SCOPE},
            },
        }

    def schedule_creation(self, body: dict[str, Any]) -> Request:
        """Return the request that creates the schedule."""
        return self._schedule_request("POST", f"{self.location}/jobs", "create", None, body)

    def schedule_update(self, body: dict[str, Any]) -> Request:
        """Return the request that updates the schedule."""
        query = {"updateMask": ",".join(_SCHEDULE_FIELDS)}
        return self._schedule_request("PATCH", self.schedule_path, "update", query, body)

    def schedule_deletion(self) -> Request:
        """Return the request that deletes the schedule."""
        return self._schedule_request("DELETE", self.schedule_path, "delete")

    def _schedule_request(
        self, method: str, path: str, verb: str, query: dict[str, str] | None = None, body: dict[str, Any] | None = None
    ) -> Request:
        return self._request(SCHEDULER, method, path, f"cloudscheduler.jobs.{verb}", query, body)

    def _request(
        self,
        service: str,
        method: str,
        path: str,
        permission: str,
        query: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
    ) -> Request:
        return Request(
            service,
            method,
            f"v1/{path}",
            self._settings.project,
            permission,
            missing=f"check that the project {self._settings.project} exists and that its region offers {service}",
            query=query or {},
            body=body,
            service_account=self._settings.service_account,
        )


def argument(asked: Launch) -> dict[str, Any]:
    """Return the argument of templates/workflow.yaml."""
    return {
        "project": asked.settings.project,
        "region": asked.settings.region,
        "launches": [asked.body(stage) for stage in STAGES],
    }


def execution_body(asked: Launch) -> dict[str, Any]:
    """Return the body of an `Execution`."""
    given = argument(asked)
    # The hash does not cover who launches, so that `launch` adopts an execution started by the schedule.
    labels = [body["launchParameter"]["environment"]["additionalUserLabels"][REQUEST] for body in given["launches"]]
    return {"argument": json.dumps(given), "labels": {REQUEST: fingerprint(labels), BY: asked.by}}


def ensure(api: Api, workflow: Workflow) -> str:
    """Create or update the workflow if needed. Returns `created`, `updated` or `unchanged`."""
    try:
        found = api.send(workflow.reading())
    except ApiError as error:
        if error.status != 404:
            raise
        done, request = "created", workflow.creation()
    else:
        wanted = workflow.definition
        is_same = found.get("sourceContents") == wanted["sourceContents"]
        # The service adds the prefix projects/PROJECT/serviceAccounts/.
        is_same &= "serviceAccount" not in wanted or found.get("serviceAccount", "").endswith(wanted["serviceAccount"])
        if is_same:
            return "unchanged"
        done, request = "updated", workflow.update()
    try:
        operation = api.send(request)
    except ApiError as error:
        if error.status == 409 and done == "created":  # created by another client in the meantime
            return ensure(api, workflow)
        raise
    _wait(api, request, operation)
    return done


def execute(api: Api, workflow: Workflow, asked: Launch) -> tuple[dict[str, Any], bool]:
    """Start an execution, or adopt an active one with the same parameters.

    Returns the execution, and whether it is new. Raises UsageError if an execution with other parameters is active, and
    ApiError.
    """
    request = workflow.start(asked)
    assert isinstance(request.body, dict)
    for active in api.pages(workflow.executions(), "executions"):
        cancel = f"gcloud workflows executions cancel {active['name']}"
        check_same(
            active.get("labels", {}),
            request.body["labels"][REQUEST],
            f"{workflow.name}, the workflow of {asked.output},",
            active.get("startTime", "an unknown time"),
            f"wait for it, or cancel it with `{cancel}` ({workflow.address})",
        )
        return active, False
    return api.send(request), True


def put_schedule(api: Api, workflow: Workflow, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Create or update the schedule. Returns Cloud Scheduler's `Job`, and `created` or `updated`."""
    try:
        return api.send(workflow.schedule_update(body)), "updated"
    except ApiError as error:
        if error.status != 404:
            raise
    try:
        return api.send(workflow.schedule_creation(body)), "created"
    except ApiError as error:
        # 409: created by another client in the meantime, or by a first attempt whose answer was lost.
        if error.status != 409:
            raise
        return api.send(workflow.schedule_update(body)), "updated"


def delete_schedule(api: Api, workflow: Workflow) -> bool:
    """Delete the schedule. Returns whether it existed."""
    try:
        api.send(workflow.schedule_deletion())
    except ApiError as error:
        if error.status != 404:
            raise
        return False
    return True


def _wait(api: Api, request: Request, operation: dict[str, Any]) -> None:
    """Wait for a long-running operation. Raises Failure if it fails."""
    while not operation.get("done"):
        time.sleep(_POLL_SECONDS)
        reading = Request(
            request.service, "GET", f"v1/{operation['name']}", request.project, "workflows.operations.get"
        )
        operation = api.send(reading)
    if "error" in operation:
        why = operation["error"].get("message", operation["error"])
        raise Failure(f"{request.service} rejected the definition: {why}; nothing was started")
