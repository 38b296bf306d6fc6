"""Flex templates, started through Dataflow's API. A launch that runs already is adopted, another one over the same
output folder is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from typing import Any

from pipeline.dataflow.names import job_name
from pipeline.dataflow.settings import ALL_STAGES, ALL_WORKERS, RIGHT_FITTING, TEMPLATES, DataflowSettings
from pipeline.google_cloud.jobs import OVER, DataflowJob, named
from pipeline.google_cloud.rest import CONSOLE, STORAGE, Api, ApiError, Request
from transforms.core.errors import UsageError
from transforms.core.recipe import FILES, Recipe, load_recipe, model_files
from transforms.storage import files

DATAFLOW = "dataflow"
REQUEST, BY = "pairsift_request", "pairsift_by"
"""Labels of what is started: a hash of all that was asked for, and who asked."""

_NOT_YET_SUBMITTED = "JOB_STATE_QUEUED"  # the launcher is building the graph


@dataclasses.dataclass(frozen=True)
class Launch:
    """All that a job is started with. `recipe` is its path on `gs://`; `by` says who starts it."""

    settings: DataflowSettings
    recipe: str
    pool: str
    output: str
    keep_versions: int
    by: str

    def body(self, template: str) -> dict[str, Any]:
        """The body of a `LaunchFlexTemplateRequest`."""
        settings, workers = self.settings, self.settings.workers(template)
        parameters = {
            "recipe": self.recipe,
            "input": self.pool,
            "output": self.output,
            "keep_versions": str(self.keep_versions),
            **settings.gpu_parameters,
        }
        environment: dict[str, Any] = {
            "tempLocation": settings.temp_location,
            "stagingLocation": files.join(settings.temp_location, "staging"),
            "sdkContainerImage": settings.image,
            "machineType": workers.machine_type,
            "maxWorkers": workers.max_workers,
            "diskSizeGb": workers.disk_gb,
            "ipConfiguration": "WORKER_IP_PUBLIC" if settings.use_public_ips else "WORKER_IP_PRIVATE",
        }
        if workers.spot:
            environment["flexrsGoal"] = "FLEXRS_COST_OPTIMIZED"
        for name, value in (
            ("serviceAccountEmail", settings.service_account),
            ("network", settings.network),
            ("subnetwork", settings.subnetwork),
        ):
            if value:
                environment[name] = value
        launch = {
            "jobName": job_name(self.output, template),
            "containerSpecGcsPath": template_spec(settings, template),
            "parameters": parameters,
            "environment": environment,
        }
        labels = {**settings.labels, REQUEST: fingerprint([launch, settings.labels]), BY: self.by}
        environment["additionalUserLabels"] = labels
        return {"launchParameter": launch}

    def request(self, template: str) -> Request:
        """Starts the job of one template."""
        spec = template_spec(self.settings, template)
        return Request(
            DATAFLOW,
            "POST",
            f"{_jobs_parent(self.settings)}/flexTemplates:launch",
            self.settings.project,
            "dataflow.jobs.create",
            missing=f"look whether {spec} is there (`python -m pipeline.dataflow.template.specs SETTINGS` writes it)",
            body=self.body(template),
            service_account=self.settings.service_account,
        )


@dataclasses.dataclass(frozen=True)
class LaunchedJob:
    """A Dataflow job, as the API tells of it."""

    settings: DataflowSettings
    content: dict[str, Any]

    @property
    def id(self) -> str:
        """The service's own name of it."""
        return self.content["id"]

    @property
    def name(self) -> str:
        """Ours (`pipeline.dataflow.names`)."""
        return self.content["name"]

    @property
    def state(self) -> str:
        """As the API has it."""
        return self.content.get("currentState", "JOB_STATE_UNKNOWN")

    @property
    def state_in_words(self) -> str:
        """For people."""
        return self.state.removeprefix("JOB_STATE_").lower().replace("_", " ")

    @property
    def is_settled(self) -> bool:
        """Whether it has ended, well or not."""
        return self.state in OVER

    @property
    def address(self) -> str:
        """Its page on the console."""
        return f"{CONSOLE}/dataflow/jobs/{self.settings.region}/{self.id}?project={self.settings.project}"


def settled_recipe(path: str, settings: DataflowSettings, can_read: bool = True) -> tuple[str, Request | None]:
    """Where on `gs://` the recipe at `path` lies for the job, and the request that puts a local one there.

    Raises SettingsError with every fault of the recipe, UsageError where it does not fit the settings. Where it cannot
    be read (`can_read`: there are no credentials to be used), a recipe on `gs://` is taken as it is.
    """
    if path.startswith("gs://"):
        if can_read:
            _check(load_recipe(path), settings)
        return path, None
    _check(load_recipe(path), settings)
    content = files.read_bytes(path)
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", path.rpartition("/")[2].removesuffix(".yaml"))
    stored = f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}.yaml"  # so that a scheduled run keeps its own
    found = files.join(settings.templates.rstrip("/"), "recipes", stored)
    bucket, _, name = found.removeprefix("gs://").partition("/")
    request = Request(
        STORAGE,
        "POST",
        f"upload/storage/v1/b/{bucket}/o",
        settings.project,
        "storage.objects.create",
        missing=f"make the bucket: `gcloud storage buckets create gs://{bucket} --location={settings.region}`",
        query={"uploadType": "media", "name": name},
        body=content,
    )
    return found, request


def _check(recipe: Recipe, settings: DataflowSettings) -> None:
    """Raise UsageError where the recipe names files of this machine, or another device than the settings."""
    for place, path in model_files(recipe).items():
        # All else is a hub's name, or a tag.
        is_file = place.endswith(FILES) or path.startswith(".") or os.path.exists(path)
        if is_file and not path.startswith(("gs://", "/", "bundled:")):
            raise UsageError(
                f"{place}: {path} lies on this machine; give a gs:// path, or the whole path that it has in the image"
            )
    device = recipe.cross_modality.device
    if device == "cuda" and not settings.accelerator:
        raise UsageError("recipe: cross_modality.device is cuda, but the settings name no accelerator; name one")
    if device == "cpu" and settings.accelerator:
        raise UsageError(
            f"settings: accelerator is {settings.accelerator.type}, but the recipe's cross_modality.device is cpu: it "
            "would stand idle; take it out, or say cuda"
        )


def check_places(pool: str, output: str) -> None:
    """Raise UsageError where a place is not one that workers reach."""
    for option, path in (("--input", pool), ("--output", output)):
        if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9]/.+", path.rstrip("/")):
            raise UsageError(f"{option}: got {path}; workers reach gs:// only: name a folder gs://BUCKET/FOLDER")


def check_template(template: str, settings: DataflowSettings) -> None:
    """Raise UsageError where there is no such template, or the settings do not fit it."""
    if template not in TEMPLATES:
        raise UsageError(f"--stage: got {template}; allowed: {', '.join(TEMPLATES)}")
    if template == ALL_STAGES and settings.accelerator and settings.gpus == ALL_WORKERS:
        raise UsageError(
            f"settings: gpus is {ALL_WORKERS}, with which {ALL_STAGES} would hold GPUs through all three stages; say "
            f"{RIGHT_FITTING}, or launch without --stage"
        )


def template_spec(settings: DataflowSettings, template: str) -> str:
    """Where the built spec of a template lies."""
    return files.join(settings.templates.rstrip("/"), f"{template}.json")


def fingerprint(asked: Any) -> str:
    """The same for the same JSON; short enough for a label's value."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def launch_job(api: Api, asked: Launch, template: str) -> tuple[LaunchedJob, bool]:
    """Start a template's job, and whether it was started now; else one with the same parameters was running.

    Raises UsageError where a job with other parameters runs on the output folder, ApiError.
    """
    request = asked.request(template)
    running = active_job(api, asked.settings, job_name(asked.output, template))
    if running:
        return _adopted(running, request), False
    try:
        content = api.send(request)["job"]
    except ApiError as error:
        # Somebody else was quicker; or we were, and the answer to our first try was lost.
        running = active_job(api, asked.settings, job_name(asked.output, template)) if error.status == 409 else None
        if not running:
            raise
        return _adopted(running, request), False
    return LaunchedJob(asked.settings, content), True


def active_job(api: Api, settings: DataflowSettings, name: str) -> LaunchedJob | None:
    """The job of this name that has not ended; Dataflow lets there be but one."""
    for found in named(api, DataflowJob(settings.project, settings.region, name), "ACTIVE"):
        if not LaunchedJob(settings, found).is_settled:
            return job_of(api, settings, found["id"])
    return None


def job_of(api: Api, settings: DataflowSettings, job_id: str) -> LaunchedJob:
    """The job with its state and labels."""
    view = {"view": "JOB_VIEW_DESCRIPTION"}
    return LaunchedJob(settings, api.send(_reading(settings, f"jobs/{job_id}", "dataflow.jobs.get", view)))


def metrics_of(api: Api, job: LaunchedJob) -> list[dict[str, Any]]:
    """All metrics of a job (`MetricUpdate`)."""
    request = _reading(job.settings, f"jobs/{job.id}/metrics", "dataflow.metrics.get")
    return api.send(request).get("metrics", [])


def errors_of(api: Api, job: LaunchedJob) -> list[str]:
    """What the service says went wrong in a job, the earliest first."""
    query = {"minimumImportance": "JOB_MESSAGE_ERROR"}
    request = _reading(job.settings, f"jobs/{job.id}/messages", "dataflow.messages.list", query)
    return [message["messageText"] for message in api.pages(request, "jobMessages") if message.get("messageText")]


def check_same(labels: dict[str, str], wanted: str, what: str, when: str, advice: str) -> None:
    """Raise UsageError where what runs was not started with what is asked for now."""
    if labels.get(REQUEST) != wanted:
        who = labels.get(BY, "somebody else")
        raise UsageError(f"{what} runs with other parameters, started by {who} at {when}; {advice}")


def _adopted(job: LaunchedJob, request: Request) -> LaunchedJob:
    labels = job.content.get("labels", {})
    if REQUEST not in labels and job.state == _NOT_YET_SUBMITTED:
        raise UsageError(
            f"{job.name} is only starting and does not tell yet with what; give the same command again in some "
            f"minutes ({job.address})"
        )
    assert isinstance(request.body, dict)
    wanted = request.body["launchParameter"]["environment"]["additionalUserLabels"][REQUEST]
    cancel = f"gcloud dataflow jobs cancel {job.id} --project={job.settings.project} --region={job.settings.region}"
    advice = f"wait for it, or give `{cancel}` ({job.address})"
    check_same(labels, wanted, job.name, job.content.get("createTime", "an unknown time"), advice)
    return job


def _jobs_parent(settings: DataflowSettings) -> str:
    return f"v1b3/projects/{settings.project}/locations/{settings.region}"


def _reading(settings: DataflowSettings, path: str, permission: str, query: dict[str, str] | None = None) -> Request:
    place = f"{_jobs_parent(settings)}/{path}"
    return Request(DATAFLOW, "GET", place, settings.project, permission, query=query or {})
