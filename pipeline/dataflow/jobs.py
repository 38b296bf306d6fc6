"""What Dataflow knows of jobs by their names."""

from __future__ import annotations

import datetime

from google.cloud.dataflow_v1beta3 import Job, JobState, JobsV1Beta3Client, ListJobsRequest

from pipeline.lock import DataflowJob

OVER = (
    JobState.JOB_STATE_DONE,
    JobState.JOB_STATE_FAILED,
    JobState.JOB_STATE_CANCELLED,
    JobState.JOB_STATE_UPDATED,
    JobState.JOB_STATE_DRAINED,
)
"""A job in one of these states does nothing more."""

_SLACK = datetime.timedelta(minutes=1)  # two services, two clocks


def named(job: DataflowJob, client: JobsV1Beta3Client | None = None) -> list[Job]:
    """The jobs of that name, the newest first: at most one of them is not over. Raises GoogleAPIError."""
    client = client or JobsV1Beta3Client(transport="rest")
    request = ListJobsRequest(
        project_id=job.project, location=job.region, name=job.name, filter=ListJobsRequest.Filter.ALL
    )
    found = [one for one in client.list_jobs(request) if one.name == job.name]
    return sorted(found, key=lambda one: one.create_time, reverse=True)


def is_over(job: DataflowJob, since: datetime.datetime, client: JobsV1Beta3Client | None = None) -> bool | None:
    """Whether the job of that name that was begun after `since` is over; None where there is none (yet).

    Names come again, week by week: a job that was over before does not count. One that still works does, whenever it
    was begun. Raises GoogleAPIError.
    """
    found = named(job, client)
    if any(one.current_state not in OVER for one in found):
        return False
    return True if found and found[0].create_time >= since - _SLACK else None
