"""`pairsift launch` and `pairsift schedule`: what is asked for, which requests that takes, and what is told of them."""

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
from pipeline.dataflow.launch import Launch, check_places, check_template, launch_job, settled_recipe
from pipeline.dataflow.settings import load_dataflow_settings
from pipeline.dataflow.workflow import Workflow
from pipeline.google_cloud.rest import Api, Request
from transforms.core.errors import UsageError

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_WEEKLY = re.compile(r"(?P<day>[a-z]{3})[a-z]* +(?P<hour>[01]?[0-9]|2[0-3]):(?P<minute>[0-5][0-9])", re.IGNORECASE)
_CRON = re.compile(r"[0-9A-Za-z*/,-]+( +[0-9A-Za-z*/,-]+){4}")
SCHEDULED = "schedule"
"""By whom a scheduled run is started."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What both commands are given."""

    recipe: str
    pool: str
    output: str
    settings: str
    keep_versions: int

    def settled(self, by: str, can_read: bool) -> tuple[Launch, list[Request]]:
        """What is to be started, and the requests that must come first. Raises SettingsError, UsageError."""
        settings = load_dataflow_settings(self.settings)
        check_places(self.pool, self.output)
        recipe, upload = settled_recipe(self.recipe, settings, can_read)
        launch = Launch(settings, recipe, self.pool.rstrip("/"), self.output.rstrip("/"), self.keep_versions, by)
        return launch, [upload] if upload else []


def launch_template(
    asked: Asked, template: str, follow: bool, dry_run: bool, poll_seconds: float, screen: Screen
) -> None:
    """Start one template's job, or adopt it where it runs."""
    to_launch, first = asked.settled(_me(), can_read=not dry_run)
    check_template(template, to_launch.settings)
    if dry_run:
        _show([*first, to_launch.request(template)], screen)
        return
    api = Api()
    _send(api, first)
    job, is_new = launch_job(api, to_launch, template)
    verb = "launched" if is_new else "adopted"
    told = {"event": verb, "job": job.name, "id": job.id, "address": job.address}
    screen.result(f"{verb} {job.name}{'' if is_new else ', which runs already with the same parameters'}", told)
    screen.result(f"  {job.address}")
    if follow:
        cancel = f"gcloud dataflow jobs cancel {job.id} --project={job.settings.project} --region={job.settings.region}"
        with screen.letting_go(job.name, job.address, cancel):
            follow_job(api, job, screen, poll_seconds)


def launch_workflow(asked: Asked, follow: bool, dry_run: bool, poll_seconds: float, screen: Screen) -> None:
    """Start the workflow of the three stages, or adopt its execution where one is active."""
    to_launch, first = asked.settled(_me(), can_read=not dry_run)
    workflow = Workflow(to_launch.settings, to_launch.output)
    if dry_run:
        _show([*first, workflow.creation(), workflow.start(to_launch)], screen)
        return
    api = Api()
    _send(api, first)
    flow.settle(api, workflow)
    execution, is_new = flow.execute(api, workflow, to_launch)
    verb = "launched" if is_new else "adopted"
    told = {"event": verb, "workflow": workflow.name, "execution": execution["name"], "address": workflow.address}
    screen.result(f"{verb} {workflow.name}{'' if is_new else ', which runs already with the same parameters'}", told)
    screen.result(f"  {workflow.address}")
    if follow:
        cancel = f"gcloud workflows executions cancel {execution['name']}"
        with screen.letting_go(workflow.name, workflow.address, cancel):
            follow_execution(api, to_launch, workflow, execution["name"], screen, poll_seconds)


def put_schedule(asked: Asked, cron: str, time_zone: str, dry_run: bool, screen: Screen) -> None:
    """Create or update the schedule of an output folder, and the workflow that it starts."""
    to_launch, first = asked.settled(SCHEDULED, can_read=not dry_run)
    workflow = Workflow(to_launch.settings, to_launch.output)
    body = workflow.schedule(to_launch, cron, _known_time_zone(time_zone))
    if dry_run:
        _show([*first, workflow.creation(), workflow.schedule_creation(body)], screen)
        return
    api = Api()
    _send(api, first)
    flow.settle(api, workflow)
    job, done = flow.put_schedule(api, workflow, body)
    told: dict[str, Any] = {"event": done, "schedule": workflow.name, "cron": cron, "time_zone": time_zone}
    told |= {"next": job.get("scheduleTime"), "state": job.get("state"), "address": workflow.schedule_address}
    upcoming = f", the next at {job['scheduleTime']}" if "scheduleTime" in job else ""
    screen.result(f"{done} {workflow.name}: runs at {cron} ({time_zone}){upcoming}", told)
    screen.result(f"  {workflow.schedule_address}")
    if job.get("state") == "PAUSED":
        resume = f"gcloud scheduler jobs resume {workflow.name} --location={to_launch.settings.region}"
        screen.result(f"  it is paused; `{resume} --project={to_launch.settings.project}` resumes it")


def delete_schedule(settings_path: str, output: str, dry_run: bool, screen: Screen) -> None:
    """Delete the schedule of an output folder."""
    workflow = Workflow(load_dataflow_settings(settings_path), output.rstrip("/"))
    if dry_run:
        _show([workflow.schedule_deletion()], screen)
        return
    was_there = flow.delete_schedule(Api(), workflow)
    text = f"deleted the schedule {workflow.name}" if was_there else f"there is no schedule {workflow.name}"
    screen.result(f"{text}; what runs goes on", {"event": "deleted", "schedule": workflow.name, "was_there": was_there})


def cron_of(weekly: str) -> str:
    """A week's moment, such as `Mon 03:00`, as cron has it. Raises UsageError."""
    found = _WEEKLY.fullmatch(weekly.strip())
    if not found or found["day"].lower() not in _DAYS:
        raise UsageError(f'--weekly: got {weekly}; allowed: a day and a time, for example "Mon 03:00"')
    return f"{int(found['minute'])} {int(found['hour'])} * * {_DAYS.index(found['day'].lower())}"


def checked_cron(cron: str) -> str:
    """`cron` with its five fields. Raises UsageError."""
    if not _CRON.fullmatch(cron.strip()):
        raise UsageError(f'--cron: got {cron}; allowed: minute, hour, day, month, weekday, for example "0 3 * * 1"')
    return cron.strip()


def _known_time_zone(name: str) -> str:
    known = zoneinfo.available_timezones()  # none where the system has no list; the service then judges alone
    if known and name not in known:
        raise UsageError(f"--time-zone: got {name}; allowed: a name of the tz database, for example Europe/Berlin")
    return name


def _send(api: Api, requests: list[Request]) -> None:
    for request in requests:
        api.send(request)


def _show(requests: list[Request], screen: Screen) -> None:
    """What would be sent, each request as it is."""
    for request in requests:
        body = request.body
        shown: Any = body
        if isinstance(body, bytes):
            shown = body.decode()
            text = f"({len(body):,} bytes: the recipe)\n"
        else:
            text = f"{json.dumps(body, indent=2, ensure_ascii=False)}\n" if body is not None else ""
        told = {"event": "request", "method": request.method, "url": request.url, "body": shown}
        screen.result(f"{request.method} {request.url}\n{text}", told)
    screen.note("nothing was sent")


def _me() -> str:
    """Who launches, as the value of a label."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that nobody named
        user = str(os.getuid())
    return re.sub(r"[^a-z0-9_-]", "-", f"{user}_on_{socket.gethostname()}".lower())[:63]
