"""`pairsift launch` and `pairsift schedule`: turn arguments into API requests and report the results."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import re
import socket
import zoneinfo
from typing import Any

from pipeline.dataflow import workflow as flow
from pipeline.dataflow.follow import Screen, follow_execution, follow_job
from pipeline.dataflow.launch import Launch, check_gcs_paths, check_template, launch_job, settled_recipe
from pipeline.dataflow.settings import load_dataflow_settings
from pipeline.dataflow.workflow import Workflow
from pipeline.google_cloud.rest import Api, Request
from pipeline.sources import pool_names
from transforms.core.errors import UsageError

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_WEEKLY = re.compile(r"(?P<day>[a-z]{3})[a-z]* +(?P<hour>[01]?[0-9]|2[0-3]):(?P<minute>[0-5][0-9])", re.IGNORECASE)
_CRON = re.compile(r"[0-9A-Za-z*/,-]+( +[0-9A-Za-z*/,-]+){4}")
SCHEDULED = "schedule"
"""The value of the label that names who launched a run, for scheduled runs."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """The arguments that both commands share."""

    recipe: str
    pool: str
    output: str
    settings: str
    keep_versions: int

    def settled(self, by: str, can_read: bool) -> tuple[Launch, list[Request]]:
        """Return the checked launch, and the requests to send before it. Raises SettingsError, UsageError."""
        settings = load_dataflow_settings(self.settings)
        check_gcs_paths(self.pool, self.output)
        recipe, upload = settled_recipe(self.recipe, settings, can_read)
        pool, output = pool_names.absolute(self.pool), self.output.rstrip("/")
        launch = Launch(settings, recipe, pool, output, self.keep_versions, by)
        return launch, [upload] if upload else []


def launch_template(
    asked: Asked, template: str, follow: bool, dry_run: bool, poll_seconds: float, screen: Screen
) -> None:
    """Start the job of one template, or adopt it if it is already running."""
    to_launch, first = asked.settled(_me(), can_read=not dry_run)
    check_template(template, to_launch.settings)
    if dry_run:
        _show([*first, to_launch.request(template)], screen)
        return
    api = Api()
    _send(api, first)
    job, is_new = launch_job(api, to_launch, template)
    verb = "launched" if is_new else "adopted"
    event = {"event": verb, "job": job.name, "id": job.id, "address": job.address}
    screen.result(f"{verb} {job.name}{'' if is_new else ', which is already running with the same parameters'}", event)
    screen.result(f"  {job.address}")
    if follow:
        cancel = f"gcloud dataflow jobs cancel {job.id} --project={job.settings.project} --region={job.settings.region}"
        with screen.detaching(job.name, job.address, cancel):
            follow_job(api, job, screen, poll_seconds)


def launch_workflow(asked: Asked, follow: bool, dry_run: bool, poll_seconds: float, screen: Screen) -> None:
    """Start the workflow of the three stages, or adopt its active execution."""
    to_launch, first = asked.settled(_me(), can_read=not dry_run)
    workflow = Workflow(to_launch.settings, to_launch.output)
    if dry_run:
        _show([*first, workflow.creation(), workflow.start(to_launch)], screen)
        return
    api = Api()
    _send(api, first)
    flow.ensure(api, workflow)
    execution, is_new = flow.execute(api, workflow, to_launch)
    verb = "launched" if is_new else "adopted"
    event = {"event": verb, "workflow": workflow.name, "execution": execution["name"], "address": workflow.address}
    note = "" if is_new else ", which is already running with the same parameters"
    screen.result(f"{verb} {workflow.name}{note}", event)
    screen.result(f"  {workflow.address}")
    if follow:
        cancel = f"gcloud workflows executions cancel {execution['name']}"
        with screen.detaching(workflow.name, workflow.address, cancel):
            follow_execution(api, to_launch, workflow, execution["name"], screen, poll_seconds)


def put_schedule(asked: Asked, cron: str, time_zone: str, dry_run: bool, screen: Screen) -> None:
    """Create or update the schedule of an output folder and the workflow that it starts."""
    to_launch, first = asked.settled(SCHEDULED, can_read=not dry_run)
    workflow = Workflow(to_launch.settings, to_launch.output)
    body = workflow.schedule(to_launch, cron, _known_time_zone(time_zone))
    if dry_run:
        _show([*first, workflow.creation(), workflow.schedule_creation(body)], screen)
        return
    api = Api()
    _send(api, first)
    flow.ensure(api, workflow)
    job, done = flow.put_schedule(api, workflow, body)
    event: dict[str, Any] = {"event": done, "schedule": workflow.name, "cron": cron, "time_zone": time_zone}
    event |= {"next": job.get("scheduleTime"), "state": job.get("state"), "address": workflow.schedule_address}
    upcoming = f", next at {job['scheduleTime']}" if "scheduleTime" in job else ""
    screen.result(f"{done} {workflow.name}: runs at {cron} ({time_zone}){upcoming}", event)
    screen.result(f"  {workflow.schedule_address}")
    if job.get("state") == "PAUSED":
        resume = f"gcloud scheduler jobs resume {workflow.name} --location={to_launch.settings.region}"
        screen.result(f"  the schedule is paused; resume it with `{resume} --project={to_launch.settings.project}`")


def delete_schedule(settings_path: str, output: str, dry_run: bool, screen: Screen) -> None:
    """Delete the schedule of an output folder."""
    workflow = Workflow(load_dataflow_settings(settings_path), output.rstrip("/"))
    if dry_run:
        _show([workflow.schedule_deletion()], screen)
        return
    was_there = flow.delete_schedule(Api(), workflow)
    text = f"deleted the schedule {workflow.name}" if was_there else f"there is no schedule {workflow.name}"
    event = {"event": "deleted", "schedule": workflow.name, "was_there": was_there}
    screen.result(f"{text}; active runs continue", event)


def cron_of(weekly: str) -> str:
    """Convert a weekly time, such as `Mon 03:00`, to a cron expression. Raises UsageError."""
    found = _WEEKLY.fullmatch(weekly.strip())
    if not found or found["day"].lower() not in _DAYS:
        raise UsageError(f'--weekly: got {weekly}; allowed: a day and a time, for example "Mon 03:00"')
    return f"{int(found['minute'])} {int(found['hour'])} * * {_DAYS.index(found['day'].lower())}"


def checked_cron(cron: str) -> str:
    """Return `cron` without outer spaces. Raises UsageError if it does not have five fields."""
    if not _CRON.fullmatch(cron.strip()):
        raise UsageError(f'--cron: got {cron}; allowed: minute, hour, day, month, weekday, for example "0 3 * * 1"')
    return cron.strip()


def _known_time_zone(name: str) -> str:
    known = zoneinfo.available_timezones()  # empty if the system has no list; the service then checks the name
    if known and name not in known:
        raise UsageError(f"--time-zone: got {name}; allowed: a name of the tz database, for example Europe/Berlin")
    return name


def _send(api: Api, requests: list[Request]) -> None:
    for request in requests:
        api.send(request)


def _show(requests: list[Request], screen: Screen) -> None:
    """Print the requests that would be sent."""
    for request in requests:
        body = request.body
        shown: Any = body
        if isinstance(body, bytes):
            shown = body.decode()
            text = f"({len(body):,} bytes: the recipe)\n"
        else:
            text = f"{json.dumps(body, indent=2, ensure_ascii=False)}\n" if body is not None else ""
        event = {"event": "request", "method": request.method, "url": request.url, "body": shown}
        screen.result(f"{request.method} {request.url}\n{text}", event)
    screen.note("nothing was sent")


def _me() -> str:
    """Return the current user and host as the value of a label."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, the user id may have no name
        user = str(os.getuid())
    return re.sub(r"[^a-z0-9_-]", "-", f"{user}_on_{socket.gethostname()}".lower())[:63]
