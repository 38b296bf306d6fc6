"""Tests of the jobs handed over to Dataflow: machines, GPUs, processes, images and steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from google.cloud import dataflow_v1beta3

from pipeline.dataflow.names import job_name
from pipeline.dataflow.settings import ALL_STAGES, ALL_WORKERS, RIGHT_FITTING, TEMPLATES, GpuWorker
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import read_listing
from tests.pipeline.dataflow.jobs import IMAGE, L4, Job, Jobs, handed_over
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY

STEP_NAMES = Path(__file__).with_name("step_names.txt")
T4 = GpuWorker("nvidia-tesla-t4", "n1-standard-16")
MODELS = [
    "Read kept/Read and decode/ParDo(_ReadShard)",
    "Flipped CLIP/Score/BeamML_RunInference",
    "Join wanted/Join",
    "Image-text matching/Score/BeamML_RunInference",
    "Digit/Score/BeamML_RunInference",
    "Write scores",
]
ONE_PROCESS, MANY_PROCESSES = "no_use_multiple_sdk_containers", "use_multiple_sdk_containers"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


def models_in(template: str) -> set[str]:
    """Return the steps that must be fused, from reading to writing."""
    prefix = "Cross modality/" if template == ALL_STAGES else ""
    return {f"{prefix}Score shards/{step}" for step in MODELS}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("recipe", ["paper", "demo"])
def test_every_template_builds_for_every_recipe(jobs: Jobs, recipe: str, template: str) -> None:
    job = jobs.get(recipe, template, RIGHT_FITTING)
    parsed = dataflow_v1beta3.Job.from_json(json.dumps(job.content))
    assert parsed.name == job_name(str(job.output), template)
    assert parsed.type_ == dataflow_v1beta3.JobType.JOB_TYPE_BATCH
    assert parsed.environment.worker_pools[0].autoscaling_settings.max_num_workers == 50
    assert parsed.environment.worker_pools[0].disk_size_gb == 100
    images = {image.container_image for image in parsed.environment.worker_pools[0].sdk_harness_container_images}
    assert images == {IMAGE}


def test_steps_keep_their_names(jobs: Jobs) -> None:
    """tests/pipeline/dataflow/jobs.py explains how to rewrite the file of step names."""
    assert jobs.step_names().splitlines() == STEP_NAMES.read_text().splitlines()


def test_service_option_gives_all_workers_the_gpu(jobs: Jobs) -> None:
    job = jobs.get("paper", CROSS_MODALITY, ALL_WORKERS)
    assert job.service_options == ["worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"]
    assert job.pool["machineType"] == "g2-standard-8"
    assert {job.hint_of(step) for step in job.steps} == {""}


@pytest.mark.parametrize("template", [CROSS_MODALITY, ALL_STAGES])
def test_right_fitting_gives_the_gpu_only_to_the_models(jobs: Jobs, template: str) -> None:
    job = jobs.get("paper", template, RIGHT_FITTING)
    assert job.service_options == []
    assert job.pool["machineType"] == "n2-standard-8"  # for other steps; the hint names the machine of the models
    assert {step for step in job.steps if job.hint_of(step)} == models_in(template)
    assert {job.hint_of(step) for step in models_in(template)} == {L4.option}


@pytest.mark.parametrize(
    ("template", "gpus"),
    [(CROSS_MODALITY, ALL_WORKERS), (CROSS_MODALITY, RIGHT_FITTING), (ALL_STAGES, RIGHT_FITTING)],
)
def test_steps_from_reading_to_writing_are_fused(jobs: Jobs, template: str, gpus: str) -> None:
    """Applies Beam's fusion to the graph; images would be written out between unfused steps."""
    job = jobs.get("paper", template, gpus)
    _, stages = FnApiRunner().create_stages(job.graph)
    (fused,) = [stage for stage in stages if models_in(template) & {one.unique_name for one in stage.transforms}]
    assert models_in(template) <= {one.unique_name for one in fused.transforms}
    assert len({one.environment_id for one in fused.transforms if one.environment_id}) == 1


@pytest.mark.parametrize("template", [SINGLE_MODALITY, DISTRIBUTION_ALIGNMENT])
def test_stages_without_models_have_no_gpu_and_one_process_per_vcpu(jobs: Jobs, template: str) -> None:
    job = jobs.get("paper", template, RIGHT_FITTING)
    assert job.service_options == []
    assert {job.hint_of(step) for step in job.steps} == {""}
    assert MANY_PROCESSES in job.experiments
    assert ONE_PROCESS not in job.experiments
    assert "numThreadsPerWorker" not in job.pool


def processes_and_threads(job: Job) -> tuple[bool, int]:
    assert (ONE_PROCESS in job.experiments) != (MANY_PROCESSES in job.experiments)
    return ONE_PROCESS in job.experiments, job.pool["numThreadsPerWorker"]


def test_gpu_worker_has_one_process_with_threads_according_to_its_vcpus(jobs: Jobs) -> None:
    assert processes_and_threads(jobs.get("paper", CROSS_MODALITY, ALL_WORKERS)) == (True, 2)
    assert processes_and_threads(jobs.get("paper", CROSS_MODALITY, ALL_WORKERS, T4)) == (True, 4)
    assert processes_and_threads(jobs.get("paper", ALL_STAGES, RIGHT_FITTING)) == (True, 2)


def test_cpu_worker_with_models_processes_one_shard_at_a_time(jobs: Jobs) -> None:
    assert processes_and_threads(jobs.get("demo", CROSS_MODALITY, RIGHT_FITTING)) == (True, 1)


@pytest.mark.parametrize(("gpu", "precision"), [(L4, "bf16"), (T4, "fp16")])
def test_gpu_parameter_determines_the_precision(jobs: Jobs, gpu: GpuWorker, precision: str) -> None:
    """The launcher has no GPU. The recipe in the manifest is unchanged."""
    output = jobs.get("paper", CROSS_MODALITY, ALL_WORKERS, gpu).output
    manifest = json.loads(Path(Layout(str(output)).newest_manifest).read_text())
    assert manifest["precision"] == precision
    assert manifest["recipe"]["cross_modality"]["precision"] == "auto"


def test_only_the_first_stage_lists_the_pool(jobs: Jobs) -> None:
    listed = read_listing(Layout(str(jobs.get("paper", SINGLE_MODALITY, RIGHT_FITTING).output)))
    assert [shard.name for shard in listed] == ["00000", "00001"]


def test_shards_added_during_a_run_are_left_to_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = handed_over(tmp_path, monkeypatch, "demo", CROSS_MODALITY, shards=2)
    (tmp_path / "pool" / "00002.tar").write_bytes((tmp_path / "pool" / "00000.tar").read_bytes())
    assert len(read_listing(Layout(str(job.output)))) == 2


def test_graph_size_does_not_depend_on_the_pool(
    jobs: Jobs, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("many")
    many = handed_over(folder, monkeypatch, "paper", SINGLE_MODALITY, shards=200)
    few = jobs.get("paper", SINGLE_MODALITY, RIGHT_FITTING)
    assert b"00001.tar" not in many.graph.SerializeToString()
    assert abs(many.graph.ByteSize() - few.graph.ByteSize()) < 2000  # the graph contains the names of folders
