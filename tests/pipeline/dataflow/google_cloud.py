"""A local HTTP server that implements the parts of Google's APIs that pairsift uses.

Every request and every answer of the server is checked against the official discovery documents.
"""

from __future__ import annotations

import collections
import contextlib
import http.server
import itertools
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.pipeline.dataflow.discovery import VERSIONS, Method, service

TOKEN = "a-token"
SETTLED = ("JOB_STATE_DONE", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_DRAINED", "JOB_STATE_UPDATED")


class Sent(NamedTuple):
    """A received request."""

    service: str
    method: str  # the id in the discovery document
    named: dict[str, str]
    query: dict[str, str]
    body: Any
    at: float  # monotonic time in seconds


class Answer(NamedTuple):
    """An answer that replaces the usual one."""

    status: int
    message: str = "no"
    reason: str = ""
    metadata: dict[str, str] = {}  # noqa: RUF012 - never changed
    headers: dict[str, str] = {}  # noqa: RUF012
    does_it: bool = False  # the request is executed, and only the answer is lost


class GoogleCloud:
    """Dataflow, Cloud Scheduler, Workflows and uploads to Cloud Storage, for one project and region."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.faults: list[str] = []
        self.answers: dict[str, collections.deque[Answer]] = collections.defaultdict(collections.deque)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.states: dict[str, list[str]] = {}
        """The states of each job by name, one per request of the job; the last one is repeated."""
        self.metrics: dict[str, list[list[dict[str, Any]]]] = {}
        """The metrics of each job by name, one list per request; the last one is repeated."""
        self.messages: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.workflows: dict[str, dict[str, Any]] = {}
        self.executions: dict[str, dict[str, Any]] = {}
        self.execution_states: list[str] = ["ACTIVE"]
        self.execution_error: dict[str, Any] = {}
        self.schedules: dict[str, dict[str, Any]] = {}
        self.first_page_is_empty = False
        self.url = ""
        self._ids = itertools.count(1)
        self._lock = threading.Lock()

    def fail(self, method: str, *answers: Answer) -> None:
        """Set the answers to the next calls of a method."""
        self.answers[method].extend(answers)

    def ids(self) -> list[str]:
        """Return the called methods, by the last two parts of their names."""
        return [".".join(sent.method.rsplit(".", 2)[1:]) for sent in self.sent]

    def bodies(self, method: str) -> list[Any]:
        """Return the bodies of the requests to a method."""
        return [sent.body for sent in self.sent if sent.method.endswith(method)]

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve on a local port while the body runs."""
        cloud = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, body, headers = cloud.answer(self.command, self.path, content, self.headers)
                payload = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Type": "application/json"}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_POST = do_PATCH = do_DELETE = answer

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, verb: str, path: str, content: bytes, headers: Any) -> tuple[int, Any, dict[str, str]]:
        """Return status, body and headers."""
        url = urllib.parse.urlsplit(path)
        name, _, rest = url.path.lstrip("/").partition("/")
        if name == "token":
            return 200, {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}, {}
        if name not in VERSIONS:
            self.faults.append(f"{verb} {path}: of no service")
            return 404, error(404, "not found"), {}
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            self.faults.append(f"{verb} {path}: without the token")
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        try:
            method = service(name).method(verb, urllib.parse.unquote(rest))
        except LookupError as missing:
            self.faults.append(str(missing))
            return 404, error(404, str(missing)), {}
        is_upload = "uploadType" in query
        body = content if is_upload else json.loads(content) if content else None
        with self._lock:
            self.sent.append(Sent(name, method.id, method.named, query, body, time.monotonic()))
            found = service(name).faults_of_query(method, query)
            found += [] if is_upload else service(name).faults(method, body)
            self.faults += [f"{method.id}: {fault}" for fault in found]
            queued = self.answers[method.id.partition(".")[2]] or self.answers[".".join(method.id.rsplit(".", 2)[1:])]
            if queued:
                wanted = queued.popleft()
                if wanted.does_it:
                    self._do(name, method, query, body)
                return wanted.status, error(*wanted[:4]), wanted.headers
            status, result = self._do(name, method, query, body)
        if status == 200:
            found = service(name).faults(method, result, of="response")
            self.faults += [f"the answer to {method.id}: {fault}" for fault in found]
        return status, result, {}

    def _do(self, name: str, method: Method, query: dict[str, str], body: Any) -> tuple[int, Any]:
        action = getattr(self, f"_{name}_{'_'.join(method.id.rsplit('.', 2)[1:])}")
        return action(method.named, query, body)

    # Cloud Storage

    def _storage_objects_insert(self, named: dict[str, str], query: dict[str, str], body: bytes) -> tuple[int, Any]:
        self.objects[f"gs://{named['bucket']}/{query['name']}"] = body
        return 200, {"name": query["name"], "bucket": named["bucket"], "size": str(len(body))}

    # Dataflow

    def _dataflow_flexTemplates_launch(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        launch = body["launchParameter"]
        if any(job["name"] == launch["jobName"] and self._is_active(job) for job in self.jobs.values()):
            return 409, error(409, f"There is already an active job named {launch['jobName']}.")
        return 200, {"job": self.add_job(launch["jobName"], launch["environment"]["additionalUserLabels"])}

    def add_job(self, name: str, labels: dict[str, str], state: str = "JOB_STATE_QUEUED") -> dict[str, Any]:
        """Add a job started by another client."""
        job: dict[str, Any] = {
            "id": f"2026-11-23_03_00_00-{next(self._ids)}",
            "name": name,
            "projectId": "my-project",
            "location": "us-central1",
            "type": "JOB_TYPE_BATCH",
            "currentState": state,
            "createTime": "2026-11-23T11:00:00.123456Z",
            "labels": labels,
        }
        self.jobs[job["id"]] = job
        return job

    def _dataflow_jobs_list(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        found = [job for job in self.jobs.values() if self._is_active(job) and job["name"] == query["name"]]
        if self.first_page_is_empty and "pageToken" not in query:
            return 200, {"nextPageToken": "2"}
        # Summaries have no labels, and without jobs the answer has no list.
        summaries = [{key: value for key, value in job.items() if key != "labels"} for job in found]
        return 200, {"jobs": summaries} if summaries else {}

    def _dataflow_jobs_get(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        job = self.jobs[named["jobId"]]
        states = self.states.get(job["name"], [])
        if states:
            job["currentState"] = states.pop(0)
        return 200, job

    def _dataflow_jobs_getMetrics(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        found = self.metrics.get(self.jobs[named["jobId"]]["name"], [[]])
        return 200, {"metrics": found.pop(0) if len(found) > 1 else found[0], "metricTime": "2026-11-23T11:10:00Z"}

    def _dataflow_messages_list(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        return 200, {"jobMessages": self.messages}

    @staticmethod
    def _is_active(job: dict[str, Any]) -> bool:
        return job["currentState"] not in SETTLED

    # Workflows

    def _workflows_workflows_get(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        found = self.workflows.get(named["workflowsId"])
        return (200, found) if found else (404, error(404, "Requested entity was not found."))

    def _workflows_workflows_create(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        name = query["workflowId"]
        if name in self.workflows:
            return 409, error(409, f"Resource 'workflows/{name}' already exists")
        return self._put_workflow(name, body)

    def _workflows_workflows_patch(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        changed = {field: body[field] for field in query["updateMask"].split(",")}
        return self._put_workflow(named["workflowsId"], {**self.workflows[named["workflowsId"]], **changed})

    def _put_workflow(self, name: str, body: dict[str, Any]) -> tuple[int, Any]:
        account = body["serviceAccount"].rpartition("/")[2]
        self.workflows[name] = {**body, "serviceAccount": f"projects/my-project/serviceAccounts/{account}"}
        return 200, {"name": "projects/my-project/locations/us-central1/operations/operation-1", "done": False}

    def _workflows_operations_get(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        return 200, {"name": f"operations/{named['operationsId']}", "done": True, "response": {"@type": "Workflow"}}

    def _workflowexecutions_executions_create(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        place = f"projects/my-project/locations/us-central1/workflows/{named['workflowsId']}"
        name = f"{place}/executions/{next(self._ids)}"
        times = {"startTime": "2026-11-23T11:00:00Z", "createTime": "2026-11-23T11:00:00Z"}
        self.executions[name] = {**body, "name": name, "state": "ACTIVE", **times}
        return 200, self.executions[name]

    def _workflowexecutions_executions_list(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        return 200, {"executions": [found for found in self.executions.values() if found["state"] == "ACTIVE"]}

    def _workflowexecutions_executions_get(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        (found,) = (e for name, e in self.executions.items() if name.endswith(f"/{named['executionsId']}"))
        found["state"] = self.execution_states.pop(0) if len(self.execution_states) > 1 else self.execution_states[0]
        return 200, {**found, **({"error": self.execution_error} if found["state"] == "FAILED" else {})}

    # Cloud Scheduler

    def _cloudscheduler_jobs_create(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        if body["name"] in self.schedules:
            return 409, error(409, f"Job {body['name']} already exists.")
        self.schedules[body["name"]] = body
        return 200, {**body, "state": "ENABLED", "scheduleTime": "2026-11-30T03:00:00Z"}

    def _cloudscheduler_jobs_patch(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        if body["name"] not in self.schedules:
            return 404, error(404, "Job not found.")
        for field in query["updateMask"].split(","):
            self.schedules[body["name"]][field] = body[field]
        state = self.schedules[body["name"]].get("state", "ENABLED")
        return 200, {**self.schedules[body["name"]], "state": state, "scheduleTime": "2026-11-30T03:00:00Z"}

    def _cloudscheduler_jobs_delete(self, named: dict, query: dict, body: Any) -> tuple[int, Any]:
        name = f"projects/{named['projectsId']}/locations/{named['locationsId']}/jobs/{named['jobsId']}"
        return (200, {}) if self.schedules.pop(name, None) else (404, error(404, "Job not found."))


def error(status: int, message: str, reason: str = "", metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """Return an error in the common format of Google's APIs."""
    found: dict[str, Any] = {"code": status, "message": message, "status": http.HTTPStatus(status).name}
    if reason:
        info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "domain": "googleapis.com"}
        found["details"] = [{**info, "metadata": metadata or {}}]
    return {"error": found}


def counter(name: str, value: int, tentative: bool = False, step: str = "s1", namespace: str = "pairsift") -> dict:
    """Return a counter in the format of `projects.locations.jobs.getMetrics`."""
    context = {"namespace": namespace, "step": step} | ({"tentative": "true"} if tentative else {})
    return {"name": {"origin": "user", "name": name, "context": context}, "scalar": value}
