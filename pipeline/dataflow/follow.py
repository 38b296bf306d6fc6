"""Reports the progress of a job or a workflow until it ends: its state, its counters and the funnel so far."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from rich.console import Console
from rich.status import Status
from rich.text import Text

from pipeline.dataflow.launch import Launch, LaunchedJob, active_job, errors_of, job_of, metrics_of
from pipeline.dataflow.names import job_name
from pipeline.dataflow.workflow import Workflow
from pipeline.google_cloud.rest import Api, ApiError
from pipeline.report.printable import printable
from pipeline.report.progress import described
from transforms.core import metrics as work
from transforms.core.catalogue import STAGES, rules_of_stage
from transforms.core.errors import Failure

_NO_METRICS_YET = ("JOB_STATE_QUEUED", "JOB_STATE_PENDING")
_DISTRIBUTION_SUFFIXES = ("_MIN", "_MAX", "_MEAN", "_COUNT")  # scalars that the service reports for a distribution
_SHOWN_CHARACTERS = 400

Answer = TypeVar("Answer")


class Screen:
    """The output of a command: a live line on a terminal, a line per change elsewhere, or JSON lines."""

    def __init__(self, console: Console, as_json: bool) -> None:
        self._console, self._as_json = console, as_json
        self._status: Status | None = None
        self._last: dict[str, Any] | None = None

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show the live line on a terminal while the body runs."""
        if self._as_json or not self._console.is_terminal:
            yield
            return
        with self._console.status("") as self._status:
            yield
        self._status = None

    def update(self, text: str, event: dict[str, Any]) -> None:
        """Show the current state. `event` is the state without times, so that it is equal if nothing has changed."""
        if self._status:
            self._status.update(Text(printable(text)))
        elif event != self._last:
            self.report(text, event)
        self._last = event

    def report(self, text: str, event: dict[str, Any]) -> None:
        """Print a permanent line to stderr, or `event` as JSON."""
        if self._as_json:
            print(json.dumps(event), flush=True)
        else:
            self.note(text)

    def note(self, text: str) -> None:
        """Print a line to stderr that has no JSON form."""
        if not self._as_json:
            self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def result(self, text: str, event: dict[str, Any] | None = None) -> None:
        """Print a result of the command to stdout, or `event` as JSON; without an `event`, JSON output omits it."""
        if not self._as_json:
            print(text, flush=True)
        elif event:
            print(json.dumps(event), flush=True)

    @contextlib.contextmanager
    def detaching(self, what: str, address: str, cancel: str) -> Iterator[None]:
        """If the user interrupts the body, report that `what` continues."""
        try:
            yield
        except KeyboardInterrupt:
            text = f"stopped following {what}, which continues; repeat the command to follow it, or cancel: `{cancel}`"
            self.report(f"{text} ({address})", {"event": "let_go", "message": text, "address": address})
            raise


def follow_job(api: Api, job: LaunchedJob, screen: Screen, poll_seconds: float) -> None:
    """Report the progress of a job until it ends. Raises Failure if it does not succeed."""
    counts: dict[str, int] = {}
    with screen.live():
        while True:
            job, counts = _patiently(lambda job=job: _look(api, job), (job, counts), screen)  # type: ignore[misc]
            if job.is_settled:
                break
            screen.update(*_progress(job, counts))
            time.sleep(poll_seconds)
    screen.report(*_progress(job, counts, "ended"))
    if job.state != "JOB_STATE_DONE":
        raise Failure(f"{job.name} {job.state_in_words}{_why(errors_of(api, job))}; see {job.address}")


def follow_execution(
    api: Api, launched: Launch, workflow: Workflow, name: str, screen: Screen, poll_seconds: float
) -> None:
    """Report the progress of an execution of the workflow, and of the jobs that it starts, until it ends.

    Raises Failure if it does not succeed.
    """
    job: LaunchedJob | None = None
    counts: dict[str, int] = {}
    unknown: dict[str, Any] = {"state": "ACTIVE"}
    with screen.live():
        while True:
            execution = _patiently(lambda: api.send(workflow.execution(name)), unknown, screen)
            if job is None:
                job = _patiently(lambda: _active(api, launched), None, screen)
            if job:
                job, counts = _patiently(lambda job=job: _look(api, job), (job, counts), screen)  # type: ignore[misc]
                if job.is_settled:
                    screen.report(*_progress(job, counts, "ended"))
                    job, counts = None, {}
                else:
                    screen.update(*_progress(job, counts))
            else:
                state = execution["state"].lower()
                event = {"event": "progress", "workflow": workflow.name, "state": state}
                screen.update(f"{workflow.name}: {state}", event)
            if execution["state"] not in ("ACTIVE", "QUEUED"):
                break
            time.sleep(poll_seconds)
    state = execution["state"].lower()
    screen.report(f"{workflow.name}: {state}", {"event": "ended", "workflow": workflow.name, "state": state})
    if execution["state"] != "SUCCEEDED":
        why = execution.get("error", {}).get("payload", "")
        raise Failure(f"{workflow.name} {state}{_why([why] if why else [])}; see {workflow.address}")


def counters(metrics: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the committed values of pairsift's counters, summed over the steps."""
    found: Counter[str] = Counter()
    for metric in metrics:
        name, context = metric["name"]["name"], metric["name"].get("context", {})
        is_ours = metric["name"].get("origin") == "user" and context.get("namespace") == work.NAMESPACE
        is_count = "scalar" in metric and not name.endswith(_DISTRIBUTION_SUFFIXES)
        if is_ours and is_count and context.get("tentative") != "true":
            found[name] += int(metric["scalar"])
    return dict(found)


def _active(api: Api, launched: Launch) -> LaunchedJob | None:
    """Return the running job of a stage, if any."""
    jobs = (active_job(api, launched.settings, job_name(launched.output, stage)) for stage in STAGES)
    return next((job for job in jobs if job), None)


def _look(api: Api, job: LaunchedJob) -> tuple[LaunchedJob, dict[str, int]]:
    job = job_of(api, job.settings, job.id)
    return job, {} if job.state in _NO_METRICS_YET else counters(metrics_of(api, job))


def _progress(job: LaunchedJob, counts: dict[str, int], event: str = "progress") -> tuple[str, dict[str, Any]]:
    since = datetime.datetime.fromisoformat(job.content["createTime"])
    minutes = (datetime.datetime.now(datetime.UTC) - since).total_seconds() / 60
    text = f"{job.name}: {job.state_in_words}, {minutes:,.0f} min"
    if counts.keys() & set(work.NAMES):
        text += f"; {described(dict.fromkeys(work.NAMES, 0) | counts)}"
    text += _funnel_so_far(counts)
    return text, {"event": event, "job": job.name, "id": job.id, "state": job.state_in_words, "counters": counts}


def _funnel_so_far(counts: Mapping[str, int]) -> str:
    """Describe the outcomes of the samples: the dead letters and, in stage 3, the funnel of the decided samples."""
    letters = sum(n for name, n in counts.items() if name.startswith(work.dead_letters("")))
    found = f"; {letters:,} dead letters" if letters else ""
    if work.FUNNEL_IN not in counts:
        return found
    steps = [("dead letters", sum(n for name, n in counts.items() if name.startswith(work.funnel_dead_letters(""))))]
    rules = [rule.name for stage in STAGES for rule in rules_of_stage(stage)]
    steps += [(rule, counts.get(work.funnel_dropped(rule), 0)) for rule in rules]
    dropped = ", ".join(f"{name} {n:,}" for name, n in steps if n)
    samples, copies = (counts.get(name, 0) for name in (work.FUNNEL_SAMPLES, work.FUNNEL_COPIES))
    return (
        f"{found}; funnel so far: {counts[work.FUNNEL_IN]:,} in{f', gone: {dropped}' if dropped else ''}; "
        f"{counts.get(work.FUNNEL_SURVIVORS, 0):,} survivors, {samples:,} of them in the subset, {copies:,} copies"
    )


def _patiently(call: Callable[[], Answer], otherwise: Answer, screen: Screen) -> Answer:
    """Return the result of `call`, or `otherwise` if the service is temporarily unavailable.

    The job does not depend on this process, so the caller asks again later.
    """
    try:
        return call()
    except ApiError as error:
        if error.status in (0, 429) or error.status >= 500:
            screen.update(f"{error}; retrying", {"event": "unanswered", "message": str(error)})
            return otherwise
        raise


def _why(messages: list[str]) -> str:
    """Return the last error message, shortened, as the end of a clause."""
    return f": {' '.join(messages[-1].split())[:_SHOWN_CHARACTERS]}" if messages else ""
