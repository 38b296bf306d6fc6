"""Launches flex templates through Dataflow's API.

If a job with the same parameters is already running, it is adopted. If one with other parameters is running on the same
output folder, the launch is refused.
"""

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
from pipeline.sources.pool_names import options_of
from transforms.core.errors import UsageError
from transforms.core.recipe import FILES, Recipe, load_recipe, model_files
from transforms.storage import files

DATAFLOW = "dataflow"
REQUEST, BY = "pairsift_request", "pairsift_by"
"""Labels of jobs and executions: a hash of all parameters, and who launched it."""

_NOT_YET_SUBMITTED = "JOB_STATE_QUEUED"  # the launcher is building the graph


@dataclasses.dataclass(frozen=True)
class Launch:
    """The parameters of a job. `recipe` is a path on `gs://`; `by` names who launches it."""

    settings: DataflowSettings
    recipe: str
    pool: str
    output: str
    keep_versions: int
    by: str

    def body(self, template: str) -> dict[str, Any]:
        """Return the body of a `LaunchFlexTemplateRequest`."""
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
        """Return the request that starts the job of a template."""
        spec = template_spec(self.settings, template)
        return Request(
            DATAFLOW,
            "POST",
            f"{_jobs_parent(self.settings)}/flexTemplates:launch",
            self.settings.project,
            "dataflow.jobs.create",
            missing=f"check that {spec} exists (`python -m pipeline.dataflow.template.specs SETTINGS` writes it)",
            body=self.body(template),
            service_account=self.settings.service_account,
        )


@dataclasses.dataclass(frozen=True)
class LaunchedJob:
    """A Dataflow job as described by the API."""

    settings: DataflowSettings
    content: dict[str, Any]

    @property
    def id(self) -> str:
        """The job id assigned by Dataflow."""
        return self.content["id"]

    @property
    def name(self) -> str:
        """The job name assigned by pairsift (`pipeline.dataflow.names`)."""
        return self.content["name"]

    @property
    def state(self) -> str:
        """The state as named by the API."""
        return self.content.get("currentState", "JOB_STATE_UNKNOWN")

    @property
    def state_in_words(self) -> str:
        """The state as words for a message."""
        return self.state.removeprefix("JOB_STATE_").lower().replace("_", " ")

    @property
    def is_settled(self) -> bool:
        """Whether the job has ended, successfully or not."""
        return self.state in OVER

    @property
    def address(self) -> str:
        """The URL of the job's page in the Google Cloud console."""
        return f"{CONSOLE}/dataflow/jobs/{self.settings.region}/{self.id}?project={self.settings.project}"


def settled_recipe(path: str, settings: DataflowSettings, can_read: bool = True) -> tuple[str, Request | None]:
    """Return the path of the recipe on `gs://` and, for a local recipe, the request that uploads it.

    Raises SettingsError with all faults of the recipe, and UsageError if it does not fit the settings. With `can_read`
    false (without credentials), a recipe on `gs://` is not checked.
    """
    if path.startswith("gs://"):
        if can_read:
            _check(load_recipe(path), settings)
        return path, None
    _check(load_recipe(path), settings)
    content = files.read_bytes(path)
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", path.rpartition("/")[2].removesuffix(".yaml"))
    # Named after the content, so that editing the recipe does not change a scheduled run.
    stored = f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}.yaml"
    found = files.join(settings.templates.rstrip("/"), "recipes", stored)
    bucket, _, name = found.removeprefix("gs://").partition("/")
    request = Request(
        STORAGE,
        "POST",
        f"upload/storage/v1/b/{bucket}/o",
        settings.project,
        "storage.objects.create",
        missing=f"create the bucket: `gcloud storage buckets create gs://{bucket} --location={settings.region}`",
        query={"uploadType": "media", "name": name},
        body=content,
    )
    return found, request


def _check(recipe: Recipe, settings: DataflowSettings) -> None:
    """Raise UsageError if the recipe names local files, or if its device does not fit the settings."""
    for setting, path in model_files(recipe).items():
        # Other values are names on a model hub, or tags.
        is_file = setting.endswith(FILES) or path.startswith(".") or os.path.exists(path)
        if is_file and not path.startswith(("gs://", "/", "bundled:")):
            raise UsageError(
                f"{setting}: {path} is a file on this machine; give a gs:// path, or its absolute path in the image"
            )
    device = recipe.cross_modality.device
    if device == "cuda" and not settings.accelerator:
        raise UsageError("recipe: cross_modality.device is cuda, but the settings have no accelerator; add one")
    if device == "cpu" and settings.accelerator:
        raise UsageError(
            f"settings: accelerator is {settings.accelerator.type}, but the recipe's cross_modality.device is cpu; "
            "remove the accelerator, or set the device to cuda"
        )


def check_gcs_paths(pool: str, output: str) -> None:
    """Raise UsageError if a path is not a folder on `gs://`, which is all that workers can access."""
    for option, path in (*options_of(pool).items(), ("--output", output)):
        if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9]/.+", path.rstrip("/")):
            raise UsageError(f"{option}: got {path}; workers can only access gs://; give a path gs://BUCKET/FOLDER")


def check_template(template: str, settings: DataflowSettings) -> None:
    """Raise UsageError if there is no such template, or if the settings do not fit it."""
    if template not in TEMPLATES:
        raise UsageError(f"--stage: got {template}; allowed: {', '.join(TEMPLATES)}")
    if template == ALL_STAGES and settings.accelerator and settings.gpus == ALL_WORKERS:
        raise UsageError(
            f"settings: with gpus {ALL_WORKERS}, {ALL_STAGES} would hold GPUs during all three stages; set gpus to "
            f"{RIGHT_FITTING}, or launch without --stage"
        )


def template_spec(settings: DataflowSettings, template: str) -> str:
    """Return the path of the spec of a template."""
    return files.join(settings.templates.rstrip("/"), f"{template}.json")


def fingerprint(content: Any) -> str:
    """Return a hash of JSON content that is short enough for the value of a label."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def launch_job(api: Api, asked: Launch, template: str) -> tuple[LaunchedJob, bool]:
    """Start the job of a template, or adopt a running job with the same parameters.

    Returns the job, and whether it is new. Raises UsageError if a job with other parameters is running on the output
    folder, and ApiError.
    """
    request = asked.request(template)
    running = active_job(api, asked.settings, job_name(asked.output, template))
    if running:
        return _adopted(running, request), False
    try:
        content = api.send(request)["job"]
    except ApiError as error:
        # Another launch came first; or ours succeeded, but the answer was lost and the request retried.
        running = active_job(api, asked.settings, job_name(asked.output, template)) if error.status == 409 else None
        if not running:
            raise
        return _adopted(running, request), False
    return LaunchedJob(asked.settings, content), True


def active_job(api: Api, settings: DataflowSettings, name: str) -> LaunchedJob | None:
    """Return the unfinished job with this name, if any. Dataflow allows only one."""
    for found in named(api, DataflowJob(settings.project, settings.region, name), "ACTIVE"):
        if not LaunchedJob(settings, found).is_settled:
            return job_of(api, settings, found["id"])
    return None


def job_of(api: Api, settings: DataflowSettings, job_id: str) -> LaunchedJob:
    """Return the job with its state and labels."""
    view = {"view": "JOB_VIEW_DESCRIPTION"}
    return LaunchedJob(settings, api.send(_reading(settings, f"jobs/{job_id}", "dataflow.jobs.get", view)))


def metrics_of(api: Api, job: LaunchedJob) -> list[dict[str, Any]]:
    """Return all metrics of a job (`MetricUpdate`)."""
    request = _reading(job.settings, f"jobs/{job.id}/metrics", "dataflow.metrics.get")
    return api.send(request).get("metrics", [])


def errors_of(api: Api, job: LaunchedJob) -> list[str]:
    """Return the error messages of a job, earliest first."""
    query = {"minimumImportance": "JOB_MESSAGE_ERROR"}
    request = _reading(job.settings, f"jobs/{job.id}/messages", "dataflow.messages.list", query)
    return [message["messageText"] for message in api.pages(request, "jobMessages") if message.get("messageText")]


def check_same(labels: dict[str, str], wanted: str, what: str, when: str, advice: str) -> None:
    """Raise UsageError if the `labels` of a running job or execution do not have the request hash `wanted`."""
    if labels.get(REQUEST) != wanted:
        who = labels.get(BY, "an unknown user")
        raise UsageError(f"{what} is running with other parameters, started by {who} at {when}; {advice}")


def _adopted(job: LaunchedJob, request: Request) -> LaunchedJob:
    labels = job.content.get("labels", {})
    if REQUEST not in labels and job.state == _NOT_YET_SUBMITTED:
        raise UsageError(
            f"{job.name} is starting and its parameters are not known yet; repeat the same command in a few minutes "
            f"({job.address})"
        )
    assert isinstance(request.body, dict)
    wanted = request.body["launchParameter"]["environment"]["additionalUserLabels"][REQUEST]
    cancel = f"gcloud dataflow jobs cancel {job.id} --project={job.settings.project} --region={job.settings.region}"
    advice = f"wait for it, or cancel it with `{cancel}` ({job.address})"
    check_same(labels, wanted, job.name, job.content.get("createTime", "an unknown time"), advice)
    return job


def _jobs_parent(settings: DataflowSettings) -> str:
    return f"v1b3/projects/{settings.project}/locations/{settings.region}"


def _reading(settings: DataflowSettings, path: str, permission: str, query: dict[str, str] | None = None) -> Request:
    full_path = f"{_jobs_parent(settings)}/{path}"
    return Request(DATAFLOW, "GET", full_path, settings.project, permission, query=query or {})
