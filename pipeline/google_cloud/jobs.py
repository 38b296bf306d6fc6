"""Looking up Dataflow jobs by name."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the client takes a second to import; a lock that no job holds does not need it
    from pipeline.google_cloud.rest import Api

OVER = ("JOB_STATE_DONE", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_UPDATED", "JOB_STATE_DRAINED")
"""Terminal states of a job."""

_CLOCK_SKEW = datetime.timedelta(minutes=1)  # between the clocks of Dataflow and Cloud Storage


class DataflowJob(NamedTuple):
    """The name of a job. Dataflow runs at most one job of a name at a time."""

    project: str
    region: str
    name: str


def named(api: Api, job: DataflowJob, only: str = "ALL") -> list[dict[str, Any]]:
    """The jobs of that name as the API lists them (without labels), newest first. At most one of them is not over.

    `only` is the API's filter. Raises ApiError.
    """
    from pipeline.google_cloud.rest import Request

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
    """Whether the job of that name that got a lock at `since` is over; None if there is no such job (yet).

    Scheduled runs reuse a job name. A job that ended before `since` is therefore ignored. A job that is still running
    counts whenever it was created, because the service creates it minutes before its launcher takes the lock. Raises
    ApiError.
    """
    from pipeline.google_cloud.rest import Api

    found = named(Api(), job)
    if any(one.get("currentState") not in OVER for one in found):
        return False
    return True if any(_ended(one) >= since - _CLOCK_SKEW for one in found) else None


def _ended(job: dict[str, Any]) -> datetime.datetime:
    """The time at which a finished job entered its current state."""
    return datetime.datetime.fromisoformat(job.get("currentStateTime") or job["createTime"])


def _created(job: dict[str, Any]) -> datetime.datetime:
    return datetime.datetime.fromisoformat(job["createTime"])
