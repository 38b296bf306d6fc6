"""Jobs by name: the real client against a server that answers like Dataflow."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from google.auth.credentials import AnonymousCredentials

from pipeline.google_cloud.jobs import DataflowJob, is_over, named
from pipeline.google_cloud.rest import Api, ApiError

JOB = DataflowJob("my-project", "europe-west4", "pairsift-0123456789ab-single-modality")
SINCE = datetime.datetime(2026, 7, 6, 12, 0, tzinfo=datetime.UTC)


class Dataflow(HTTPServer):
    """Two jobs per page; with a name, only the jobs of that name."""

    jobs: list[dict[str, Any]]
    status = 200


class _Handler(BaseHTTPRequestHandler):
    server: Dataflow

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        assert url.path == f"/v1b3/projects/{JOB.project}/locations/{JOB.region}/jobs"
        first = int(query.get("pageToken", 0))
        found = [job for job in self.server.jobs if query.get("name") in (None, job["name"])]
        content: dict[str, Any] = {"jobs": found[first : first + 2]}
        if found[first + 2 :]:
            content["nextPageToken"] = str(first + 2)
        if self.server.status != 200:
            content = {"error": {"code": self.server.status, "message": "no dataflow.jobs.list", "status": "DENIED"}}
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def dataflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataflow]:
    with Dataflow(("127.0.0.1", 0), _Handler) as server:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_DATAFLOW", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr("google.auth.default", lambda scopes: (AnonymousCredentials(), None))
        server.jobs = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def job(state: str, minutes: float, name: str = JOB.name, changed: float | None = None) -> dict[str, Any]:
    """A job created some minutes after the lock, in its state since `changed` (by default since its creation)."""
    times = (minutes, minutes if changed is None else changed)
    made, since = ((SINCE + datetime.timedelta(minutes=each)).isoformat().replace("+00:00", "Z") for each in times)
    return {"name": name, "currentState": f"JOB_STATE_{state}", "createTime": made, "currentStateTime": since}


@pytest.mark.parametrize(
    ("jobs", "over"),
    [
        ([], None),
        ([job("RUNNING", 2)], False),
        ([job("QUEUED", 2)], False),
        ([job("CANCELLING", 2)], False),
        ([job("DONE", 2)], True),
        ([job("FAILED", 2)], True),
        ([job("CANCELLED", 2)], True),
        ([job("DONE", -0.5)], True),  # two clocks
        ([job("DONE", -4, changed=6)], True),  # a job is created minutes before its launcher takes the lock
        ([job("CANCELLED", -4, changed=1)], True),
        ([job("QUEUED", -4)], False),
        ([job("DONE", -600, changed=-500), job("DONE", -4, changed=6)], True),
        ([job("DONE", -600)], None),  # last week's job; this week's is about to start
        ([job("RUNNING", -600)], False),  # adopted by a second launch
        ([job("DONE", -900), job("FAILED", -600), job("RUNNING", 1)], False),
        ([job("DONE", -900), job("FAILED", -600), job("DONE", 1)], True),
        ([job("RUNNING", 2, "another")], None),
    ],
)
def test_whether_a_job_is_over(dataflow: Dataflow, jobs: list[dict[str, Any]], over: bool | None) -> None:
    dataflow.jobs = jobs
    assert is_over(JOB, SINCE) is over


def test_newest_job_is_first_for_any_paging(dataflow: Dataflow) -> None:
    dataflow.jobs = [job("DONE", minutes) for minutes in (3, 1, 5, 2, 4)]
    created = [datetime.datetime.fromisoformat(one["createTime"]) - SINCE for one in named(Api(), JOB)]
    assert created == [datetime.timedelta(minutes=minutes) for minutes in (5, 4, 3, 2, 1)]


def test_missing_permission_is_reported(dataflow: Dataflow) -> None:
    dataflow.status = 403
    with pytest.raises(ApiError, match=r"dataflow\.jobs\.list"):
        is_over(JOB, SINCE)
