"""Tests of the launcher: parameter checks that report all faults, its outputs, and limits."""

from __future__ import annotations

import dataclasses
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.dataflow.names import job_name
from pipeline.dataflow.settings import ALL_STAGES, RIGHT_FITTING, TEMPLATES
from pipeline.dataflow.template import launcher, limits
from pipeline.graphs import Job
from pipeline.output_folder.layout import Layout
from tests.helpers import recipe
from tests.pipeline.dataflow.jobs import L4, RECIPES, handed_over
from transforms.core.errors import UsageError
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES, load_recipe
from transforms.core.records import Shard

OUTPUT = "gs://bucket/out"
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve the bundled recipes as if they were in a bucket."""
    monkeypatch.setattr(launcher, "load_recipe", lambda path: load_recipe(str(RECIPES / path.rpartition("/")[2])))


def checked(**changes: str | None) -> launcher.Parameters:
    given: dict[str, str | None] = {}
    given |= {
        "recipe": "gs://bucket/paper.yaml", "input": "gs://bucket/pool", "output": OUTPUT, "keep_versions": "2",
        "accelerator": L4.option, "gpus": "all_workers", "stage": CROSS_MODALITY,
        "job_name": job_name(OUTPUT, changes.get("stage") or CROSS_MODALITY),
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in (given | changes).items() if value is not None]
    return launcher.checked(PipelineOptions(arguments))


def refused(**changes: str | None) -> str:
    with pytest.raises(UsageError) as caught:
        checked(**changes)
    return str(caught.value)


def test_valid_parameters() -> None:
    found = checked()
    assert (found.template, found.pool, found.output, found.keep_versions) == (
        CROSS_MODALITY, "gs://bucket/pool", OUTPUT, 2,
    )  # fmt: skip
    assert found.gpu == L4
    assert found.recipe.name == "paper"


def test_all_faults_are_reported_at_once() -> None:
    message = refused(input="/data", output=None, keep_versions="all", gpus="some", job_name="mine")
    assert [fault.split(":")[0] for fault in message.split("; ") if fault.startswith("--")] == [
        "--input", "--output", "--job_name", "--keep_versions", "--gpus",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": None}, "--recipe: missing"),
        ({"recipe": "recipes/paper.yaml"}, "--recipe: got recipes/paper.yaml; workers can only access gs://"),
        ({"recipe": "gs://bucket/nowhere.yaml"}, "nowhere.yaml: cannot be read as YAML"),
        ({"keep_versions": "0"}, "--keep_versions: got 0; allowed: a whole number of at least 1"),
        ({"accelerator": "nvidia-l4"}, "--accelerator: got nvidia-l4; allowed: type:TYPE;count:1;"),
        ({"accelerator": None}, "--accelerator: missing, but the recipe has `cross_modality.device: cuda`"),
        ({"recipe": "gs://bucket/demo.yaml"}, "but the recipe has `cross_modality.device: cpu`"),
        ({"stage": ALL_STAGES}, "but then all three stages would hold GPUs; give right_fitting"),
        ({"stage": "everything"}, "--stage: got everything; allowed: single_modality, "),
        ({"job_name": "mine"}, f"--job_name: got mine; allowed: {job_name(OUTPUT, CROSS_MODALITY)}"),
        ({"job_name": job_name(OUTPUT, SINGLE_MODALITY)}, f"allowed: {job_name(OUTPUT, CROSS_MODALITY)}"),
        ({"job_name": job_name("gs://bucket/other", CROSS_MODALITY)}, "Dataflow refuses a second running job"),
    ],
)
def test_fault_says_what_is_allowed(changes: dict[str, str | None], message: str) -> None:
    assert message in refused(**changes)


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_is_derived_from_the_job_name(template: str) -> None:
    found = checked(stage=None, job_name=job_name(OUTPUT, template), gpus=RIGHT_FITTING)
    assert found.template == template


WRONG_USE = ["--recipe=nowhere.yaml", "--input=/data", f"--job_name={job_name('', SINGLE_MODALITY)}"]


def assert_is_the_message(written: str) -> None:
    assert "Traceback" not in written
    message = written.splitlines()[-1]
    assert message.startswith("pairsift: --recipe: got nowhere.yaml; workers can only access gs://")
    assert "--output: missing" in message


def test_entry_point_exits_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", *WRONG_USE])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "templates" / "main.py"), run_name="__main__")
    assert isinstance(ended.value.code, str)  # Python writes it to stderr and exits with status 1
    assert_is_the_message(ended.value.code)


@pytest.mark.slow  # it imports everything again
def test_the_entry_point_in_a_process_of_its_own_ends_with_the_message_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "templates/main.py", *WRONG_USE], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert_is_the_message(done.stderr)


@pytest.mark.parametrize("template", [CROSS_MODALITY, DISTRIBUTION_ALIGNMENT])
def test_later_stages_need_the_listing_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    (tmp_path / "out" / "annotations").mkdir(parents=True)
    monkeypatch.setattr("tests.pipeline.dataflow.jobs.write_listing", lambda *_: None)
    with pytest.raises(UsageError, match="out: has no listing of a pool; run stage single_modality first"):
        handed_over(tmp_path, monkeypatch, "demo", template)


def test_too_large_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(UsageError, match=r"the job's graph has 0\.\d MB, but Dataflow allows 0 MB; shorten long lists"):
        handed_over(tmp_path, monkeypatch, "demo", CROSS_MODALITY)


# Limits -----------------------------------------------------------------------------------------------------------


def job(output: str = OUTPUT, shard: str = "00000", **changes: Any) -> Job:
    nothing: dict[str, Any] = {stage: {} for stage in STAGES}
    return Job(recipe(**changes), (Shard("0", "", ""), Shard(shard, "", "")), Layout(output), nothing)


def test_job_within_the_limits() -> None:
    whole = dataclasses.replace(job(shard="x" * 192), layout=Layout(OUTPUT, f"{OUTPUT}/versions/1"))
    assert list(limits.exceeded_before(whole, tasks=40)) == []
    assert list(limits.exceeded_by(limits.MAX_REQUEST_BYTES, limits.MAX_GRAPH_BYTES)) == []


def test_output_folder_with_too_long_object_names() -> None:
    folder = "gs://bucket/" + "/".join(["f" * 99] * 9)
    (fault,) = limits.exceeded_before(job(folder, "x" * 160), tasks=0)
    assert "Cloud Storage allows 1024; give an --output with a shorter path" in fault


def test_too_large_side_input() -> None:
    (fault,) = limits.exceeded_before(job(distribution_alignment__clusters={"count": 2_000_000}), tasks=4)
    assert fault.startswith("distribution_alignment.clusters.count: 2,000,000 clusters and 4 tasks give a side input ")
    assert fault.endswith("reduce the number of clusters")


@pytest.mark.parametrize(("sizes_bytes", "what"), [((20_000_001, 0), "request"), ((0, 10_000_001), "graph")])
def test_too_large_request_or_graph(sizes_bytes: tuple[int, int], what: str) -> None:
    (fault,) = limits.exceeded_by(*sizes_bytes)
    assert fault.startswith(f"the job's {what} has ")
    assert "launch the stages one by one" in fault
