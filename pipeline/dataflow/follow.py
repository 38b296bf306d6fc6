"""What a job does, told until it ends: its state, its counters and the funnel so far."""

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
_OF_A_DISTRIBUTION = ("_MIN", "_MAX", "_MEAN", "_COUNT")  # the service tells one as these scalars too
_SHOWN_CHARACTERS = 400

Answer = TypeVar("Answer")


class Screen:
    """Where it is told: one line that changes on a terminal, a line for each change elsewhere, JSON for machines."""

    def __init__(self, console: Console, as_json: bool) -> None:
        self._console, self._as_json = console, as_json
        self._status: Status | None = None
        self._last: dict[str, Any] | None = None

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Keep the changing line on the terminal while the body runs."""
        if self._as_json or not self._console.is_terminal:
            yield
            return
        with self._console.status("") as self._status:
            yield
        self._status = None

    def now(self, text: str, event: dict[str, Any]) -> None:
        """Show how it stands; `event` is the same without what changes by itself."""
        if self._status:
            self._status.update(Text(printable(text)))
        elif event != self._last:
            self.tell(text, event)
        self._last = event

    def tell(self, text: str, event: dict[str, Any]) -> None:
        """Show what stays, beside the results."""
        if self._as_json:
            print(json.dumps(event), flush=True)
        else:
            self.note(text)

    def note(self, text: str) -> None:
        """Show people what machines need not know."""
        if not self._as_json:
            self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def result(self, text: str, event: dict[str, Any] | None = None) -> None:
        """Print what the command is for; what has no `event` of its own is for people."""
        if not self._as_json:
            print(text, flush=True)
        elif event:
            print(json.dumps(event), flush=True)

    @contextlib.contextmanager
    def letting_go(self, what: str, address: str, cancel: str) -> Iterator[None]:
        """Say, where the user interrupts the body, that `what` goes on."""
        try:
            yield
        except KeyboardInterrupt:
            text = f"no longer followed; {what} goes on: the same command follows it again, `{cancel}` ends it"
            self.tell(f"{text} ({address})", {"event": "let_go", "message": text, "address": address})
            raise


def follow_job(api: Api, job: LaunchedJob, screen: Screen, poll_seconds: float) -> None:
    """Tell of a job until it ends. Raises Failure where it does not end well."""
    counts: dict[str, int] = {}
    with screen.live():
        while True:
            job, counts = _patiently(lambda job=job: _look(api, job), (job, counts), screen)  # type: ignore[misc]
            if job.is_settled:
                break
            screen.now(*_as_told(job, counts))
            time.sleep(poll_seconds)
    screen.tell(*_as_told(job, counts, "ended"))
    if job.state != "JOB_STATE_DONE":
        raise Failure(f"{job.name} {job.state_in_words}{_why(errors_of(api, job))}; see {job.address}")


def follow_execution(
    api: Api, launched: Launch, workflow: Workflow, name: str, screen: Screen, poll_seconds: float
) -> None:
    """Tell of an execution of the workflow and of the jobs that it starts, until it ends. Raises Failure where it does
    not end well."""
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
                    screen.tell(*_as_told(job, counts, "ended"))
                    job, counts = None, {}
                else:
                    screen.now(*_as_told(job, counts))
            else:
                state = execution["state"].lower()
                told = {"event": "progress", "workflow": workflow.name, "state": state}
                screen.now(f"{workflow.name}: {state}", told)
            if execution["state"] not in ("ACTIVE", "QUEUED"):
                break
            time.sleep(poll_seconds)
    state = execution["state"].lower()
    screen.tell(f"{workflow.name}: {state}", {"event": "ended", "workflow": workflow.name, "state": state})
    if execution["state"] != "SUCCEEDED":
        why = execution.get("error", {}).get("payload", "")
        raise Failure(f"{workflow.name} {state}{_why([why] if why else [])}; see {workflow.address}")


def counters(metrics: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """pairsift's own counters, added up over the steps, as far as their work is committed."""
    found: Counter[str] = Counter()
    for metric in metrics:
        name, context = metric["name"]["name"], metric["name"].get("context", {})
        is_ours = metric["name"].get("origin") == "user" and context.get("namespace") == work.NAMESPACE
        is_count = "scalar" in metric and not name.endswith(_OF_A_DISTRIBUTION)
        if is_ours and is_count and context.get("tentative") != "true":
            found[name] += int(metric["scalar"])
    return dict(found)


def _active(api: Api, launched: Launch) -> LaunchedJob | None:
    """The job of the stage that runs."""
    jobs = (active_job(api, launched.settings, job_name(launched.output, stage)) for stage in STAGES)
    return next((job for job in jobs if job), None)


def _look(api: Api, job: LaunchedJob) -> tuple[LaunchedJob, dict[str, int]]:
    job = job_of(api, job.settings, job.id)
    return job, {} if job.state in _NO_METRICS_YET else counters(metrics_of(api, job))


def _as_told(job: LaunchedJob, counts: dict[str, int], event: str = "progress") -> tuple[str, dict[str, Any]]:
    since = datetime.datetime.fromisoformat(job.content["createTime"])
    minutes = (datetime.datetime.now(datetime.UTC) - since).total_seconds() / 60
    text = f"{job.name}: {job.state_in_words}, {minutes:,.0f} min"
    if counts.keys() & set(work.NAMES):
        text += f"; {described(dict.fromkeys(work.NAMES, 0) | counts)}"
    text += _funnel_so_far(counts)
    return text, {"event": event, "job": job.name, "id": job.id, "state": job.state_in_words, "counters": counts}


def _funnel_so_far(counts: Mapping[str, int]) -> str:
    """What became of the samples: of those that were looked at, or, from stage 3 on, of all that are decided."""
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
    """The answer of `call`; `otherwise` where a service does not answer just now: the job goes on without us."""
    try:
        return call()
    except ApiError as error:
        if error.status in (0, 429) or error.status >= 500:
            screen.now(f"{error}; asking again", {"event": "unanswered", "message": str(error)})
            return otherwise
        raise


def _why(messages: list[str]) -> str:
    """The last of what the service says, as the end of a sentence's part."""
    return f": {' '.join(messages[-1].split())[:_SHOWN_CHARACTERS]}" if messages else ""
