"""What Dataflow knows of jobs by their names."""

from __future__ import annotations

import datetime
from typing import Any

from pipeline.google_cloud.rest import Api, Request
from pipeline.output_folder.lock import DataflowJob

OVER = ("JOB_STATE_DONE", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_UPDATED", "JOB_STATE_DRAINED")
"""A job in one of these states does nothing more."""

_SLACK = datetime.timedelta(minutes=1)  # two services, two clocks


def named(api: Api, job: DataflowJob, only: str = "ALL") -> list[dict[str, Any]]:
    """The jobs of that name as the API lists them, without their labels, the newest first: at most one of them is not
    over. `only` is the API's filter. Raises ApiError."""
    request = Request(
        "dataflow",
        "GET",
        f"v1b3/projects/{job.project}/locations/{job.region}/jobs",
        job.project,
        "dataflow.jobs.list",
        query={"filter": only, "name": job.name},
    )
    found = [one for one in api.pages(request, "jobs") if one.get("name") == job.name]
    return sorted(found, key=_created, reverse=True)


def is_over(job: DataflowJob, since: datetime.datetime) -> bool | None:
    """Whether the job of that name that got a lock at `since` is over; None where there is none (yet).

    Names come again, week by week: a job that was over before does not count. One that is not over does, whenever it
    was made: the service makes it minutes before its launcher runs. Raises ApiError.
    """
    found = named(Api(), job)
    if any(one.get("currentState") not in OVER for one in found):
        return False
    return True if any(_ended(one) >= since - _SLACK for one in found) else None


def _ended(job: dict[str, Any]) -> datetime.datetime:
    """Since when a job is in its state, the last one."""
    return datetime.datetime.fromisoformat(job.get("currentStateTime") or job["createTime"])


def _created(job: dict[str, Any]) -> datetime.datetime:
    return datetime.datetime.fromisoformat(job["createTime"])
