"""The launcher of a flex template: builds the graph of one template, hands it over to Dataflow, and exits.

Dataflow's launcher program starts `templates/main.py` with the template's parameters, the job's name and a
`template_location`. Beam's runner then does not submit the job but writes it as JSON to that location. After this
process has exited with status 0, the service starts the job, which it has queued under that name. The launcher
therefore cannot wait for the job, and all final work of a run is a step of a graph.
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
from pipeline.sources.first_look import look_first
from pipeline.sources.pool import list_shards
from pipeline.sources.pool_names import options_of
from transforms.core.errors import UsageError
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, Recipe, load_recipe
from transforms.core.records import Shard
from transforms.core.settings import SettingsError
from transforms.distribution_alignment.cids import load_tasks
from transforms.storage import files

_VCPUS_PER_SHARD = 4
"""A GPU worker reads one shard per this many vCPUs at once, because up to eight threads decode each shard. It reads at
least two, so that one is decoded while the other is scored."""

_SERVICE_ACCELERATOR = "worker_accelerator="
_ONE_PROCESS, _PROCESS_PER_VCPU = "no_use_multiple_sdk_containers", "use_multiple_sdk_containers"


class Parameters(NamedTuple):
    """The checked parameters of a template."""

    template: str
    recipe: Recipe
    pool: str
    output: str
    keep_versions: int
    gpu: GpuWorker | None
    gpus: str

    @property
    def runs_models(self) -> bool:
        """Whether the job includes stage 2."""
        return self.template in (CROSS_MODALITY, ALL_STAGES)


def build_and_submit(arguments: Sequence[str]) -> str:
    """Build the job for the template's parameters in `arguments`, hand it over to Dataflow, and return its name.

    Raises UsageError with all faults if parameters are invalid or the job exceeds a limit of Dataflow.
    """
    options = PipelineOptions(list(arguments))
    return submit(options, checked(options))


def checked(options: PipelineOptions) -> Parameters:
    """Return the parameters in `options`. Raises UsageError with all faults."""
    given = options.view_as(PairsiftOptions)
    name = options.view_as(GoogleCloudOptions).job_name
    faults: list[str] = []
    for option in ("recipe", "input", "output"):
        path = getattr(given, option)
        if not path:
            faults.append(f"--{option}: missing; it is required")
        elif not path.startswith("gs://"):
            faults.append(f"--{option}: got {path}; workers can only access gs://; give a path gs://BUCKET/…")
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
    """Lock the output folder for the job, build the job, hand it over and return its name. Raises UsageError."""
    for option, path in options_of(parameters.pool).items():
        check_path(option, path)
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
        # Still in time: the service starts the job only if this process exits with status 0.
        _refuse(exceeded_by(*dataflow_bytes(runner)))
    return cloud.job_name


def configure(options: PipelineOptions, parameters: Parameters) -> None:
    """Set the processes and threads of a worker, and its GPU.

    In stage 2, a worker has one process, because the models use the complete machine: on a GPU, the threads of the
    process share one copy of each model; on CPUs, one shard at a time uses all cores. In the other stages, a worker has
    one process per vCPU, Dataflow's default. A job with all stages uses the configuration of stage 2.
    """
    options.view_as(StandardOptions).runner = DataflowRunner.__name__
    # The image contains this package, and workers do not need the launcher's main module.
    setup = options.view_as(SetupOptions)
    setup.save_main_session, setup.sdk_location = False, "container"
    debug, cloud = options.view_as(DebugOptions), options.view_as(GoogleCloudOptions)
    others = cloud.dataflow_service_options or ()
    services = [option for option in others if not option.startswith(_SERVICE_ACCELERATOR)]
    cloud.dataflow_service_options = services
    if not parameters.runs_models:
        return
    debug.experiments = [option for option in debug.experiments or () if option != _PROCESS_PER_VCPU]
    debug.add_experiment(_ONE_PROCESS)
    gpu = parameters.gpu
    debug.number_of_worker_harness_threads = max(2, vcpus_of(gpu.machine_type) // _VCPUS_PER_SHARD) if gpu else 1
    if gpu and parameters.gpus == ALL_WORKERS:
        options.view_as(WorkerOptions).machine_type = gpu.machine_type
        services.append(_SERVICE_ACCELERATOR + gpu.service_option)


def _job(parameters: Parameters, layout: Layout, held: HeldForJob) -> graphs.Job:
    """Return the inputs of the graph. If the job includes stage 1, this lists the pool and writes the listing."""
    lists_pool = parameters.template in (SINGLE_MODALITY, ALL_STAGES)
    shards = list_shards(parameters.pool) if lists_pool else _listed(layout)
    if lists_pool:
        look_first(shards, parameters.recipe.pool, layout)
    precision = parameters.gpu.precision if parameters.gpu else None
    job, content = settled_job(parameters.recipe, parameters.pool, layout, shards, fetch=False, precision=precision)
    cids = parameters.recipe.distribution_alignment.cids
    _refuse(exceeded_before(job, len(load_tasks(cids.tasks)) if cids else 0))
    files.write_json(layout.newest_manifest, content)
    if lists_pool:
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
        raise UsageError(f"{layout.output}: has no listing of a pool; run stage {SINGLE_MODALITY} first") from error


@contextlib.contextmanager
def _held_for(holder: DataflowJob, layout: Layout) -> Iterator[HeldForJob]:
    """Lock the output folder for the job and delete leftovers of a killed run. Releases the lock if the body fails.

    The last job of a run releases its own lock (`pipeline.sinks.publication`). The lock of an earlier job is taken over
    by the next one, because that job has ended. Raises UsageError if another run holds the lock.
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
    """Raise UsageError if there are any faults."""
    if message := "; ".join(faults):
        raise UsageError(message)


def _template(stage: str | None, name: str | None, output: str) -> tuple[str | None, list[str]]:
    """Return the template, from the option `stage` or from the job's name, and faults of the two."""
    if stage is not None and stage not in TEMPLATES:
        return None, [f"--stage: got {stage}; allowed: {', '.join(TEMPLATES)}; write the template's spec again"]
    names = {job_name(output, template): template for template in TEMPLATES}
    named = names.get(name or "")
    if named is None or stage not in (None, named):
        allowed = job_name(output, stage) if stage else ", ".join(names)
        return None, [f"--job_name: got {name}; allowed: {allowed}, so that Dataflow refuses a second running job"]
    return named, []


def _gpu(given: PairsiftOptions, template: str | None, recipe: Recipe | None) -> tuple[GpuWorker | None, list[str]]:
    """Return the GPU worker that the parameters describe, if any, and faults of the parameters."""
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
        faults.append("--accelerator: missing, but the recipe has `cross_modality.device: cuda`; give one, or set cpu")
    if device == "cpu" and given.accelerator:
        faults.append(f"--accelerator: got {given.accelerator}, but the recipe has `cross_modality.device: cpu`")
    if gpu and template == ALL_STAGES and given.gpus == ALL_WORKERS:
        faults.append(f"--gpus: got {ALL_WORKERS}, but then all three stages would hold GPUs; give {RIGHT_FITTING}")
    return gpu, faults
