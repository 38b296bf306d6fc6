"""The three stages in turn: a definition for Cloud Workflows, its executions, and the schedule that starts them.

An output folder has one workflow and one schedule, named after it (`pipeline.dataflow.names`). The workflow's argument
holds the complete bodies of the launches, so that a job is started with the same by `launch --stage`, by an execution
and on schedule.
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
    """The requests about one output folder's workflow and schedule."""

    def __init__(self, settings: DataflowSettings, output: str) -> None:
        self._settings, self._output = settings, output
        self.name = run_name(output)
        self.place = f"projects/{settings.project}/locations/{settings.region}"
        self.path = f"{self.place}/workflows/{self.name}"
        self.schedule_path = f"{self.place}/jobs/{self.name}"

    @property
    def address(self) -> str:
        """Its page on the console."""
        settings = self._settings
        return f"{CONSOLE}/workflows/workflow/{settings.region}/{self.name}/executions?project={settings.project}"

    @property
    def schedule_address(self) -> str:
        """The console's page of schedules."""
        return f"{CONSOLE}/cloudscheduler?project={self._settings.project}"

    @property
    def definition(self) -> dict[str, Any]:
        """The body of a `Workflow`."""
        source = (importlib.resources.files("templates") / "workflow.yaml").read_text(encoding="utf-8")
        content = {"description": f"pairsift, stage by stage, into {self._output}"[:1000], "sourceContents": source}
        account = self._settings.service_account
        return content | ({"serviceAccount": account} if account else {})

    def creation(self) -> Request:
        """Makes the workflow."""
        query = {"workflowId": self.name}
        return self._definition_request("POST", f"{self.place}/workflows", "create", query, self.definition)

    def update(self) -> Request:
        """Gives the workflow this definition."""
        query = {"updateMask": ",".join(field for field in _DEFINITION_FIELDS if field in self.definition)}
        return self._definition_request("PATCH", self.path, "update", query, self.definition)

    def reading(self) -> Request:
        """Gets the workflow."""
        return self._definition_request("GET", self.path, "get")

    def _definition_request(
        self, method: str, path: str, verb: str, query: dict[str, str] | None = None, body: dict[str, Any] | None = None
    ) -> Request:
        return self._request(WORKFLOWS, method, path, f"workflows.workflows.{verb}", query, body)

    def start(self, asked: Launch) -> Request:
        """Starts an execution."""
        body = execution_body(asked)
        return self._request(EXECUTIONS, "POST", f"{self.path}/executions", "workflows.executions.create", None, body)

    def executions(self) -> Request:
        """Lists the executions that have not ended."""
        query = {"view": "FULL", "filter": 'state="ACTIVE"'}
        return self._request(EXECUTIONS, "GET", f"{self.path}/executions", "workflows.executions.list", query)

    def execution(self, name: str) -> Request:
        """Gets one execution."""
        return self._request(EXECUTIONS, "GET", name, "workflows.executions.get")

    def schedule(self, asked: Launch, cron: str, time_zone: str) -> dict[str, Any]:
        """The body of Cloud Scheduler's `Job`. Raises UsageError where nobody is named whom it can act as."""
        if not asked.settings.service_account:
            raise UsageError("settings: service_account is missing; a schedule starts its runs as one: name it")
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
        """Makes the schedule."""
        return self._schedule_request("POST", f"{self.place}/jobs", "create", None, body)

    def schedule_update(self, body: dict[str, Any]) -> Request:
        """Changes the schedule."""
        query = {"updateMask": ",".join(_SCHEDULE_FIELDS)}
        return self._schedule_request("PATCH", self.schedule_path, "update", query, body)

    def schedule_deletion(self) -> Request:
        """Deletes the schedule."""
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
            missing=f"look whether there is a project {self._settings.project}, and whether its region has {service}",
            query=query or {},
            body=body,
            service_account=self._settings.service_account,
        )


def argument(asked: Launch) -> dict[str, Any]:
    """What templates/workflow.yaml is given."""
    return {
        "project": asked.settings.project,
        "region": asked.settings.region,
        "launches": [asked.body(stage) for stage in STAGES],
    }


def execution_body(asked: Launch) -> dict[str, Any]:
    """The body of an `Execution`."""
    given = argument(asked)
    # Of what the jobs are given, without who gives it: the schedule's own execution is adopted by `launch`.
    labels = [body["launchParameter"]["environment"]["additionalUserLabels"][REQUEST] for body in given["launches"]]
    return {"argument": json.dumps(given), "labels": {REQUEST: fingerprint(labels), BY: asked.by}}


def settle(api: Api, workflow: Workflow) -> str:
    """Make the workflow what it has to be; what that took: `created`, `updated` or `unchanged`."""
    try:
        there = api.send(workflow.reading())
    except ApiError as error:
        if error.status != 404:
            raise
        done, request = "created", workflow.creation()
    else:
        wanted = workflow.definition
        is_same = there.get("sourceContents") == wanted["sourceContents"]
        # The service writes projects/PROJECT/serviceAccounts/ before it.
        is_same &= "serviceAccount" not in wanted or there.get("serviceAccount", "").endswith(wanted["serviceAccount"])
        if is_same:
            return "unchanged"
        done, request = "updated", workflow.update()
    try:
        operation = api.send(request)
    except ApiError as error:
        if error.status == 409 and done == "created":  # made by somebody else meanwhile
            return settle(api, workflow)
        raise
    _wait(api, request, operation)
    return done


def execute(api: Api, workflow: Workflow, asked: Launch) -> tuple[dict[str, Any], bool]:
    """Start an execution, and whether it was started now; else one with the same parameters was active.

    Raises UsageError where one with other parameters is, ApiError.
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
            f"wait for it, or give `{cancel}` ({workflow.address})",
        )
        return active, False
    return api.send(request), True


def put_schedule(api: Api, workflow: Workflow, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Create or update the schedule; the service's `Job`, and `created` or `updated`."""
    try:
        return api.send(workflow.schedule_update(body)), "updated"
    except ApiError as error:
        if error.status != 404:
            raise
    try:
        return api.send(workflow.schedule_creation(body)), "created"
    except ApiError as error:
        if error.status != 409:  # made by somebody else meanwhile, or by us, and the answer was lost
            raise
        return api.send(workflow.schedule_update(body)), "updated"


def delete_schedule(api: Api, workflow: Workflow) -> bool:
    """Delete the schedule; whether there was one."""
    try:
        api.send(workflow.schedule_deletion())
    except ApiError as error:
        if error.status != 404:
            raise
        return False
    return True


def _wait(api: Api, request: Request, operation: dict[str, Any]) -> None:
    """Wait for a long-running operation. Raises Failure where it fails."""
    while not operation.get("done"):
        time.sleep(_POLL_SECONDS)
        reading = Request(
            request.service, "GET", f"v1/{operation['name']}", request.project, "workflows.operations.get"
        )
        operation = api.send(reading)
    if "error" in operation:
        why = operation["error"].get("message", operation["error"])
        raise Failure(f"{request.service} refused the definition: {why}; nothing was started")
