"""Jobs as handed over by the launcher, built without the service: Beam writes the v1b3 JSON to a file.

    python -m tests.pipeline.dataflow.jobs > tests/pipeline/dataflow/step_names.txt

rewrites the file of step names, after an intended change or with another version of Beam.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2

from pipeline.dataflow.names import job_name
from pipeline.dataflow.settings import ALL_STAGES, RIGHT_FITTING, TEMPLATES, GpuWorker
from pipeline.dataflow.template import launcher
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import write_listing
from pipeline.output_folder.lock import HeldForJob
from pipeline.sources.pool import list_shards
from tests.helpers import sample_members, write_pool
from transforms.core.recipe import SINGLE_MODALITY, STAGES, load_recipe
from transforms.storage import files

RECIPES = Path(__file__).parents[3] / "recipes"
L4 = GpuWorker("nvidia-l4", "g2-standard-8")
IMAGE = "us-central1-docker.pkg.dev/my-project/pairsift/pairsift:0.1.0"
# Replaces models of paper.yaml that would have to be downloaded.
KNOWN: dict[str, Any] = {stage: {} for stage in STAGES} | {"single_modality": {"pos_pattern": {"source": "bundled"}}}


class Job(NamedTuple):
    """A job and its graph."""

    content: dict[str, Any]
    graph: beam_runner_api_pb2.Pipeline
    output: str

    @property
    def pool(self) -> dict[str, Any]:
        """The worker pool of the job."""
        (pool,) = self.content["environment"]["workerPools"]
        return pool

    @property
    def experiments(self) -> list[str]:
        return self.content["environment"]["experiments"]

    @property
    def service_options(self) -> list[str]:
        return self.content["environment"].get("serviceOptions", [])

    @property
    def steps(self) -> list[str]:
        """The full names of all steps without substeps."""
        return sorted(step.unique_name for step in self.graph.components.transforms.values() if not step.subtransforms)

    def hint_of(self, step: str) -> str:
        """Return the accelerator that a step requests."""
        (found,) = [one for one in self.graph.components.transforms.values() if one.unique_name == step]
        hints = self.graph.components.environments[found.environment_id].resource_hints
        return hints.get("beam:resources:accelerator:v1", b"").decode()


def handed_over(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    template: str,
    gpus: str = "all_workers",
    gpu: GpuWorker = L4,
    shards: int = 2,
    machine_type: str = "n2-standard-8",
    output: str | None = None,
) -> Job:
    """Build the job of a template over a pool of small tars. The output folder is local by default, without a lock."""
    monkeypatch.setattr("pipeline.runs.job.identities", lambda recipe: KNOWN)
    monkeypatch.setattr("pipeline.runs.job.pinned", lambda settings, fetch: settings)
    if output is None:
        output = str(folder / "out")
        monkeypatch.setattr(launcher, "hold_for_job", lambda output, job: HeldForJob(job, "0" * 32))
        monkeypatch.setattr(launcher, "release_for_job", lambda *_: None)
    write_pool(folder / "pool", {f"{n:05d}.tar": sample_members(f"k{n}") for n in range(shards)})
    if template not in (SINGLE_MODALITY, ALL_STAGES):
        write_listing(Layout(output), list_shards(str(folder / "pool")))
        files.write_json(Layout(output).newest_manifest, {"pool": str(folder / "pool")})
    for name in ("temp", "staging"):
        (folder / name).mkdir()
    loaded = load_recipe(str(RECIPES / f"{recipe}.yaml"))
    cuda = loaded.cross_modality.device == "cuda"
    parameters = launcher.Parameters(
        template, loaded, str(folder / "pool"), output, 3, gpu if cuda else None,
        RIGHT_FITTING if template == ALL_STAGES else gpus,
    )  # fmt: skip
    options = PipelineOptions(
        [
            "--project=my-project", "--region=us-central1", f"--job_name={job_name(output, template)}",
            f"--temp_location={folder}/temp", f"--staging_location={folder}/staging",
            f"--template_location={folder}/job.json", f"--sdk_container_image={IMAGE}",
            f"--machine_type={machine_type}", "--max_num_workers=50", "--disk_size_gb=100",
            "--no_auth", "--dataflow_endpoint=http://localhost:9",
            "--experiments=disable_logging_submission_environment",  # skips a slow list of packages
        ]
    )  # fmt: skip
    launcher.submit(options, parameters)
    graph = beam_runner_api_pb2.Pipeline.FromString((folder / "staging" / "pipeline.pb").read_bytes())
    return Job(json.loads((folder / "job.json").read_text()), graph, output)


class Jobs:
    """Jobs that are built once each."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, itertools.count()
        self.get = functools.cache(self._get)

    def _get(self, recipe: str, template: str, gpus: str = "all_workers", gpu: GpuWorker = L4) -> Job:
        with pytest.MonkeyPatch.context() as monkeypatch:
            return handed_over(self._folder / str(next(self._count)), monkeypatch, recipe, template, gpus, gpu)

    def step_names(self) -> str:
        """Return the steps of every template for paper.yaml, one per line. Beam names its lambdas by line number."""
        lines = [
            f"{template}: {step}" for template in TEMPLATES for step in self.get("paper", template, RIGHT_FITTING).steps
        ]
        return "".join(re.sub(r"core\.py:\d+", "core.py", line) + "\n" for line in lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(Jobs(Path(folder)).step_names())
