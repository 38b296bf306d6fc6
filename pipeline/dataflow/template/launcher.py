"""What runs in a flex template's launcher: it builds the graph of one template, has it submitted, and ends.

Dataflow's launcher program starts `templates/main.py` with the template's parameters, the job's name and a
`template_location`. Beam's runner then writes the job as JSON to that place and submits nothing; when this process has
ended with status 0, the service starts the job that it has kept queued under that name. So nothing can be awaited here,
and whatever comes after the work is the last step of a graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)
from apache_beam.runners import DataflowRunner

from pipeline import graphs
from pipeline.dataflow.names import job_name
from pipeline.dataflow.settings import ALL_STAGES, ALL_WORKERS, RIGHT_FITTING, TEMPLATES, GpuWorker, vcpus_of
from pipeline.dataflow.template.limits import exceeded_before, exceeded_by
from pipeline.dataflow.template.options import PairsiftOptions
from pipeline.google_cloud.jobs import DataflowJob
from pipeline.output_folder import versions
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import read_listing, write_listing
from pipeline.output_folder.lock import Held, HeldForJob, hold_for_job, release_for_job
from pipeline.runners.beam_internals import dataflow_bytes
from pipeline.runs.claim import check_path, clear_leftovers
from pipeline.runs.job import settled_job
from pipeline.sinks.publication import Publication
from pipeline.sources.webdataset import list_shards
from transforms.core.errors import UsageError
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, Recipe, load_recipe
from transforms.core.records import Shard
from transforms.core.settings import SettingsError
from transforms.distribution_alignment.cids import load_tasks
from transforms.storage import files

_VCPUS_A_SHARD = 4
"""Shards that a GPU worker reads at once are its vCPUs by this. Each is decoded by up to eight threads of its own, so
that few fill the machine; there are two at least, so that one is decoded while the other one is scored."""

_SERVICE_ACCELERATOR = "worker_accelerator="
_ONE_PROCESS, _PROCESS_A_VCPU = "no_use_multiple_sdk_containers", "use_multiple_sdk_containers"


class Parameters(NamedTuple):
    """The parameters of a template, checked."""

    template: str
    recipe: Recipe
    pool: str
    output: str
    keep_versions: int
    gpu: GpuWorker | None
    gpus: str

    @property
    def runs_models(self) -> bool:
        """Whether stage 2 is in the job."""
        return self.template in (CROSS_MODALITY, ALL_STAGES)


def build_and_submit(arguments: Sequence[str]) -> str:
    """Build the job that the template's parameters in `arguments` describe, and have Beam hand it over; its name.

    Raises UsageError, with every fault at once, where the parameters cannot be used, or exceed what Dataflow takes.
    """
    options = PipelineOptions(list(arguments))
    return submit(options, checked(options))


def checked(options: PipelineOptions) -> Parameters:
    """The parameters in `options`. Raises UsageError with every fault at once."""
    given = options.view_as(PairsiftOptions)
    name = options.view_as(GoogleCloudOptions).job_name
    faults: list[str] = []
    for option in ("recipe", "input", "output"):
        path = getattr(given, option)
        if not path:
            faults.append(f"--{option}: missing; it is required")
        elif not path.startswith("gs://"):
            faults.append(f"--{option}: got {path}; workers reach gs:// only: give a path gs://BUCKET/…")
    template, faults_of_name = _template(given.stage, name, given.output or "")
    faults += faults_of_name
    recipe = None
    if given.recipe:
        try:
            recipe = load_recipe(given.recipe)
        except SettingsError as error:
            faults += [f"{given.recipe}: {fault}" for fault in error.faults]
    keep_versions = int(given.keep_versions) if given.keep_versions.isdecimal() else 0
    if keep_versions < 1:
        faults.append(f"--keep_versions: got {given.keep_versions}; allowed: a whole number of at least 1")
    gpu, faults_of_gpu = _gpu(given, template, recipe)
    faults += faults_of_gpu
    _refuse(faults)
    assert template and recipe
    return Parameters(template, recipe, given.input, given.output, keep_versions, gpu, given.gpus)


def submit(options: PipelineOptions, parameters: Parameters) -> str:
    """Hold the output folder for the job, build it and have Beam hand it over; the job's name. Raises UsageError."""
    check_path("--input", parameters.pool)
    check_path("--output", parameters.output)
    layout = Layout(parameters.output.rstrip("/"))
    cloud = options.view_as(GoogleCloudOptions)
    holder = DataflowJob(cloud.project, cloud.region, cloud.job_name)
    with _held_for(holder, layout) as held:
        job = _job(parameters, layout, held)
        configure(options, parameters)
        runner = DataflowRunner()
        pipeline = beam.Pipeline(runner, options)
        graphs.build({**graphs.GRAPHS, ALL_STAGES: graphs.all_stages}[parameters.template], pipeline, job)
        pipeline.run()
        # The service takes the job only when this process has ended well.
        _refuse(exceeded_by(*dataflow_bytes(runner)))
    return cloud.job_name


def configure(options: PipelineOptions, parameters: Parameters) -> None:
    """Set what follows from the machines: processes and threads of a worker, and its GPU.

    Stage 2 has one process a worker, because the models take all of the machine: on a GPU, threads of that process
    share one copy of each, on CPUs one shard at a time takes every core. The other stages have a process for each vCPU,
    which is Dataflow's own way. In one job with all stages, all of them have what stage 2 needs.
    """
    options.view_as(StandardOptions).runner = DataflowRunner.__name__
    # The image holds this package; nothing of the launcher's own main module is of use to a worker.
    setup = options.view_as(SetupOptions)
    setup.save_main_session, setup.sdk_location = False, "container"
    debug, cloud = options.view_as(DebugOptions), options.view_as(GoogleCloudOptions)
    others = cloud.dataflow_service_options or ()
    services = [option for option in others if not option.startswith(_SERVICE_ACCELERATOR)]
    cloud.dataflow_service_options = services
    if not parameters.runs_models:
        return
    debug.experiments = [option for option in debug.experiments or () if option != _PROCESS_A_VCPU]
    debug.add_experiment(_ONE_PROCESS)
    gpu = parameters.gpu
    debug.number_of_worker_harness_threads = max(2, vcpus_of(gpu.machine_type) // _VCPUS_A_SHARD) if gpu else 1
    if gpu and parameters.gpus == ALL_WORKERS:
        options.view_as(WorkerOptions).machine_type = gpu.machine_type
        services.append(_SERVICE_ACCELERATOR + gpu.service_option)


def _job(parameters: Parameters, layout: Layout, held: HeldForJob) -> graphs.Job:
    """What the graph is built from; the listing of the pool is written where the first stage is in the job."""
    lists = parameters.template in (SINGLE_MODALITY, ALL_STAGES)
    shards = list_shards(parameters.pool) if lists else _listed(layout)
    precision = parameters.gpu.precision if parameters.gpu else None
    job, content = settled_job(parameters.recipe, parameters.pool, layout, shards, fetch=False, precision=precision)
    cids = parameters.recipe.distribution_alignment.cids
    _refuse(exceeded_before(job, len(load_tasks(cids.tasks)) if cids else 0))
    files.write_json(layout.newest_manifest, content)
    if lists:
        write_listing(layout, shards)
    if parameters.template in (DISTRIBUTION_ALIGNMENT, ALL_STAGES):
        job = dataclasses.replace(
            job,
            layout=versions.begin(layout.output),
            publication=Publication(content, parameters.keep_versions, held),
        )
    fitted = parameters.gpu if parameters.gpus == RIGHT_FITTING else None
    return dataclasses.replace(
        job, accelerator=fitted.option if fitted else None, checks_before=parameters.template != ALL_STAGES
    )


def _listed(layout: Layout) -> tuple[Shard, ...]:
    try:
        return read_listing(layout)
    except (OSError, ValueError) as error:
        raise UsageError(f"{layout.output}: holds no listing of a pool; run stage {SINGLE_MODALITY} first") from error


@contextlib.contextmanager
def _held_for(holder: DataflowJob, layout: Layout) -> Iterator[HeldForJob]:
    """Hold the output folder for the job, clear what a killed run left there, and let go of it where the body fails.

    The job that ends a run lets go of it itself (`pipeline.sinks.publication`); from the others the next one takes it
    over, because they are over. Raises UsageError where another run holds it.
    """
    try:
        held = hold_for_job(layout.output, holder)
    except Held as error:
        raise UsageError(str(error)) from error
    try:
        clear_leftovers(layout)
        yield held
    except BaseException:
        release_for_job(layout.output, held)
        raise


def _refuse(faults: Iterable[str]) -> None:
    """Raise UsageError where there are any."""
    if told := "; ".join(faults):
        raise UsageError(told)


def _template(stage: str | None, name: str | None, output: str) -> tuple[str | None, list[str]]:
    """Which template this is, by its own word or by the job's name, which says so too."""
    if stage is not None and stage not in TEMPLATES:
        return None, [f"--stage: got {stage}; allowed: {', '.join(TEMPLATES)}; build the template's spec again"]
    names = {job_name(output, template): template for template in TEMPLATES}
    named = names.get(name or "")
    if named is None or stage not in (None, named):
        allowed = job_name(output, stage) if stage else ", ".join(names)
        return None, [f"--job_name: got {name}; allowed: {allowed}: Dataflow refuses a second running job of one name"]
    return named, []


def _gpu(given: PairsiftOptions, template: str | None, recipe: Recipe | None) -> tuple[GpuWorker | None, list[str]]:
    """The GPU worker that the parameters name, if any."""
    faults, gpu = [], None
    if given.gpus not in (ALL_WORKERS, RIGHT_FITTING):
        faults.append(f"--gpus: got {given.gpus}; allowed: {ALL_WORKERS}, {RIGHT_FITTING}")
    if given.accelerator:
        try:
            gpu = GpuWorker.parse(given.accelerator)
        except ValueError as error:
            faults.append(f"--accelerator: {error}")
    device = recipe.cross_modality.device if recipe else None
    if device == "cuda" and not given.accelerator:
        faults.append("--accelerator: missing, but the recipe says `cross_modality.device: cuda`; name one, or say cpu")
    if device == "cpu" and given.accelerator:
        faults.append(f"--accelerator: got {given.accelerator}, but the recipe says `cross_modality.device: cpu`")
    if gpu and template == ALL_STAGES and given.gpus == ALL_WORKERS:
        faults.append(f"--gpus: got {ALL_WORKERS}, with which all three stages would hold GPUs; say {RIGHT_FITTING}")
    return gpu, faults
