"""The Beam runners that pairsift supports. Their requirements and limits are checked before a run starts."""

from __future__ import annotations

import enum
import json
import logging
import os
import shutil
import socket
from collections.abc import Mapping
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import (
    GoogleCloudOptions,
    JobServerOptions,
    PipelineOptions,
    PortableOptions,
    SparkRunnerOptions,
    StandardOptions,
    WorkerOptions,
)
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc

from pipeline.runners.beam_internals import (
    FnApiRunner,
    JobServiceHandle,
    PortableRunner,
    memoise_inspection,
    without_time_limit,
)
from pipeline.runners.hosts import is_this_host
from pipeline.runners.job_service import JobService
from transforms.core.errors import UsageError

EMBED = "embed"
"""The value of --job_endpoint for a job service in this process."""

_SERVICE_SECONDS = 20.0


class Kind(enum.Enum):
    """The runners that pairsift supports."""

    LOCAL = "FnApiRunner"
    PORTABLE = "PortableRunner"
    FLINK = "FlinkRunner"
    SPARK = "SparkRunner"
    DATAFLOW = "DataflowRunner"


_KIND_OF = {kind.value.lower(): kind for kind in Kind} | {"directrunner": Kind.LOCAL}

_REFUSED = {
    "daskrunner": "it writes empty files and reports success, and supports neither stateful steps nor metrics",
    "prismrunner": "it downloads a program when it starts, and is not tested with pairsift",
    "interactiverunner": "it is for notebooks",
}


def check(
    beam_options: list[str], paths: Mapping[str, str], models: Mapping[str, str | None], needs_gpu: bool
) -> None:
    """Raise UsageError if the runner that `beam_options` name is not supported or cannot run the job.

    `paths` maps options to the folders that every worker reads or writes, `models` maps settings to the model files and
    folders of the recipe. `needs_gpu` says that a model runs on a GPU. Connects to the job service, and to a worker
    pool on this machine, to check that they are running.
    """
    PipelineOptions(beam_options).get_all_options()  # exits with status 2 where Beam refuses a value
    options, kind = PipelineOptions(beam_options), kind_of(beam_options)
    if kind is Kind.LOCAL:
        return
    if kind is Kind.DATAFLOW:
        _check_dataflow(options, paths, needs_gpu and not any("accelerator" in option for option in beam_options))
        return
    _check_service(options, kind)
    _check_environment(options, kind, paths, models)
    if not has_metrics(beam_options):
        logging.warning("%s: reports no metrics of a job in a jar; run.json will have no counts", kind.value)


def is_here(beam_options: list[str]) -> bool:
    """Whether the workers run on this machine, and so have its hardware and files."""
    kind = kind_of(beam_options)
    if kind is Kind.DATAFLOW:
        return False
    if kind is Kind.LOCAL:
        return True
    options = PipelineOptions(beam_options)
    environment = _environment(options, kind)
    return environment == "LOOPBACK" or (environment == "EXTERNAL" and _has_pool_here(options, kind))


def may_outlive_client(beam_options: list[str]) -> bool:
    """Whether the job may go on after this process was killed: it runs in a cluster or another job service."""
    kind = kind_of(beam_options)
    embedded = PipelineOptions(beam_options).view_as(PortableOptions).job_endpoint == EMBED
    return not (kind is Kind.LOCAL or (kind is Kind.PORTABLE and embedded))


def has_metrics(beam_options: list[str]) -> bool:
    """Whether the runner reports the metrics of its workers."""
    options = PipelineOptions(beam_options)
    return not (kind_of(beam_options) is Kind.SPARK and options.view_as(SparkRunnerOptions).spark_submit_uber_jar)


def pipeline_of(beam_options: list[str]) -> beam.Pipeline:
    """An empty pipeline on the runner that `beam_options` name, by default the local runner."""
    memoise_inspection()
    # Not Beam's DirectRunner, which first tries to download another runner.
    ours = {Kind.LOCAL: FnApiRunner, Kind.PORTABLE: _PortableRunner}.get(kind_of(beam_options))
    return beam.Pipeline(runner=ours() if ours else None, options=PipelineOptions(beam_options))


class _PortableRunner(PortableRunner):
    """Beam's PortableRunner; `--job_endpoint=embed` starts pairsift's job service in this process."""

    def create_job_service(self, options: PipelineOptions) -> JobServiceHandle:
        if options.view_as(PortableOptions).job_endpoint == EMBED:
            return self.create_job_service_handle(JobService(), options)
        return super().create_job_service(options)

    def create_job_service_handle(self, job_service: Any, options: PipelineOptions) -> JobServiceHandle:
        return _Handle(job_service, options)


class _Handle(JobServiceHandle):
    def run(self, preparation_id: str) -> Any:
        without_time_limit(self)
        return super().run(preparation_id)


def kind_of(beam_options: list[str]) -> Kind:
    """The runner that the options name. Raises UsageError if it is not supported."""
    named = PipelineOptions(beam_options).view_as(StandardOptions).runner
    if named is None:
        return Kind.LOCAL
    name = named.rpartition(".")[2].lower()  # Beam accepts a path of a class, its name, and the name without "Runner"
    name = name if name.endswith("runner") else f"{name}runner"
    if name in _KIND_OF:
        return _KIND_OF[name]
    why = _REFUSED.get(name, "it is not tested with pairsift")
    raise UsageError(
        f"--runner: {named}: {why}; allowed: {', '.join(kind.value for kind in Kind)} (docs/runners.md; "
        "without --runner the job runs on this machine)"
    )


def _check_dataflow(options: PipelineOptions, paths: Mapping[str, str], lacks_accelerator: bool) -> None:
    google = options.view_as(GoogleCloudOptions)
    missing = [
        f"--{name} ({what})"
        for name, what, value in (
            ("project", "which is billed", google.project),
            ("temp_location", "a gs:// folder for staged files", google.temp_location),
            (
                "sdk_container_image",
                "an image that contains pairsift; Beam's own does not",
                options.view_as(WorkerOptions).sdk_container_image,
            ),
        )
        if not value
    ]
    faults = [f"say {', '.join(missing)}"] if missing else []
    faults += [f"{option}: {path}: workers read gs:// only" for option, path in paths.items() if "://" not in path]
    if lacks_accelerator:
        faults.append(
            "the recipe says cross_modality.device: cuda, but the options name no accelerator; add "
            "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver, or say cpu"
        )
    if faults:
        raise UsageError(f"DataflowRunner: {'; '.join(faults)} (docs/runners.md)")


def _check_service(options: PipelineOptions, kind: Kind) -> None:
    portable = options.view_as(PortableOptions)
    if kind is not Kind.PORTABLE and not portable.job_endpoint:
        java = options.view_as(JobServerOptions).job_server_java_launcher
        if not shutil.which(java):
            raise UsageError(
                f"{kind.value}: starts Beam's job server, but there is no {java} on the PATH; install Java, or name a "
                "running job server with --job_endpoint=HOST:PORT"
            )
        return
    if not portable.job_endpoint:
        raise UsageError(
            f"PortableRunner: needs a job service: --job_endpoint={EMBED} for one in this process, or "
            "--job_endpoint=HOST:PORT"
        )
    if portable.job_endpoint != EMBED and not _describes_options(portable.job_endpoint):
        raise UsageError(
            f"--job_endpoint: {portable.job_endpoint}: is Beam's own local job service (or another one that describes "
            "no options), which runs one worker and waits forever if that dies; start "
            f"`python -m pipeline.runners.job_service` there, or say --job_endpoint={EMBED}"
        )


def _describes_options(endpoint: str) -> bool:
    """Whether the job service describes options, as those of pairsift, Flink and Spark do. Raises UsageError if no job
    service answers."""
    with grpc.insecure_channel(endpoint) as channel:
        try:
            stub = beam_job_api_pb2_grpc.JobServiceStub(channel)
            request = beam_job_api_pb2.DescribePipelineOptionsRequest()
            return bool(stub.DescribePipelineOptions(request, timeout=_SERVICE_SECONDS).options)
        except grpc.RpcError as error:
            raise UsageError(
                f"--job_endpoint: {endpoint}: no job service answers there; start one: "
                f"python -m pipeline.runners.job_service --port {endpoint.rpartition(':')[2]} "
                f"(or say --job_endpoint={EMBED})"
            ) from error


def _environment(options: PipelineOptions, kind: Kind) -> str:
    """The type of the workers' environment, in upper case: Beam's name for how they are started."""
    named = options.view_as(PortableOptions).environment_type
    if named:
        return named.upper()
    # A runner that starts a cluster on this machine starts its workers here too; otherwise Beam's default applies.
    starts_cluster = {Kind.FLINK: ("flink_master", ("[local]", "[auto]")), Kind.SPARK: ("spark_master_url", ("local",))}
    option, here = starts_cluster.get(kind, ("", ()))
    master = str(options.get_all_options().get(option, ""))
    return "LOOPBACK" if here and master.startswith(here) else "DOCKER"


def _check_environment(
    options: PipelineOptions, kind: Kind, paths: Mapping[str, str], models: Mapping[str, str | None]
) -> None:
    environment, config = _environment(options, kind), options.view_as(PortableOptions).environment_config
    local = {option: path for option, path in (*paths.items(), *models.items()) if path and _is_local_path(path)}
    if environment == "DOCKER":
        if not (config or options.view_as(PortableOptions).lookup_environment_option("docker_container_image")):
            raise UsageError(
                f"{kind.value}: workers are containers of Beam's own image, which has no pairsift; name an image with "
                "--environment_config=IMAGE, or say --environment_type=EXTERNAL (a worker pool), or LOOPBACK"
            )
        for option in paths.keys() & local.keys():
            raise UsageError(
                f"{option}: {local[option]}: is on this machine's disk, which a container cannot read; give a "
                "gs:// folder, or say --environment_type=EXTERNAL"
            )
    if environment == "EXTERNAL":
        _check_pool(options, kind)
    if environment == "LOOPBACK":
        return
    for option, path in local.items():
        if not os.path.isabs(path):
            raise UsageError(f"{option}: {path}: workers have another working folder; give the absolute path")
    if local and not (environment == "EXTERNAL" and _has_pool_here(options, kind)):
        paths_in_words = ", ".join(sorted(local.values()))
        logging.warning("%s: every worker must see the same files at: %s", kind.value, paths_in_words)


def _is_local_path(path: str) -> bool:
    return "://" not in path and os.path.exists(path)


def _pool(options: PipelineOptions) -> str:
    """The host:port of the worker pool; empty if none is named."""
    portable = options.view_as(PortableOptions)
    config = portable.environment_config or portable.lookup_environment_option("external_service_address") or ""
    try:
        given = json.loads(config)
    except ValueError:
        return config
    return str(given.get("url", "")) if isinstance(given, dict) else config


def _has_pool_here(options: PipelineOptions, kind: Kind) -> bool:
    """Whether the worker pool is on this machine. For a cluster, `localhost` is each of its own machines."""
    endpoint = options.view_as(PortableOptions).job_endpoint or ""
    return kind is Kind.PORTABLE and (endpoint == EMBED or is_this_host(endpoint)) and is_this_host(_pool(options))


def _check_pool(options: PipelineOptions, kind: Kind) -> None:
    pool = _pool(options)
    host, _, port = pool.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(
            f"--environment_config: got {pool!r}; EXTERNAL needs the HOST:PORT of a worker pool; start one: python -m "
            "apache_beam.runners.worker.worker_pool_main --service_port=50000"
        )
    if not _has_pool_here(options, kind):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SERVICE_SECONDS).close()
    except OSError as error:
        raise UsageError(
            f"--environment_config: {pool}: no worker pool answers there; start one, with the `python` of "
            "pairsift first on its PATH: python -m apache_beam.runners.worker.worker_pool_main "
            f"--service_port={port}"
        ) from error
