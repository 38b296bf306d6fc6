"""A run: the three graphs in sequence, over one pool, into one output folder."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Protocol

import apache_beam as beam
import torch
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from pipeline import build, files
from pipeline.layout import TABLE_OF, Layout
from pipeline.manifest import identities, manifest
from pipeline.progress import Progress
from pipeline.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, STAGES, Recipe
from pipeline.records import Shard
from pipeline.sinks.decisions import SMALLER_BATCHES
from pipeline.sources.webdataset import list_shards
from pipeline.workers import run_to_end
from transforms.models.precision import resolve
from transforms.models.weights import pinned
from transforms.single_modality import pos_pattern

LOCAL_RUNNERS = ("DirectRunner", "FnApiRunner")


class UsageError(ValueError):
    """Something the user asked for that cannot be done; nothing was written."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to: its funnel (None where the last stage did not run) and where its files lie."""

    funnel: dict[str, Any] | None
    layout: Layout


def run(
    recipe: Recipe,
    pool: str,
    output: str,
    stages: list[str],
    beam_options: list[str],
    progress: Progress,
) -> Outcome:
    """Run `stages` of `recipe` over the tars under `pool` into `output`.

    An output folder that a run of the same recipe over the same pool left is gone on with. Raises UsageError (or
    NoShards) before anything is written where the pool has no tars, a model's files are missing, the folder belongs to
    another run, or the recipe asks for a GPU that a local run has not.
    """
    PipelineOptions(beam_options).get_all_options()  # exits with status 2 where Beam refuses a value
    for option, path in (("--input", pool), ("--output", output)):
        check_path(option, path)
    shards = list_shards(pool)
    layout = Layout(output.rstrip("/") or output)
    needs_gpu = recipe.cross_modality.device == "cuda" and CROSS_MODALITY in stages and _is_local(beam_options)
    if needs_gpu and not torch.cuda.is_available():
        raise UsageError("recipe: cross_modality.device is cuda, but this machine has no GPU; use a GPU or say cpu")
    try:
        settled = _with_pinned_models(recipe, fetch=_is_local(beam_options))
        found = identities(settled)
    except (OSError, ValueError, LookupError) as error:
        raise UsageError(f"recipe: {error}") from error
    content = manifest(recipe, pool, found)
    _check_earlier_stages(stages, layout, shards)
    claim(layout, content)
    for left_by_a_killed_run in (layout.progress_folder, layout.alignment_work):
        files.delete_if_there(left_by_a_killed_run)

    settled = _with_precision(_with_tagger(settled, found))
    job = build.Job(settled, tuple(shards), layout, found)
    times = {}
    try:
        for stage in stages:
            started = time.monotonic()
            with progress.stage(stage, layout, shards):
                _run_stage(stage, job, beam_options)
            times[stage] = round(time.monotonic() - started, 3)
    finally:
        files.delete_if_there(layout.progress_folder)
    files.delete_if_there(layout.in_hand_folder)
    files.write_json(layout.run, {"seconds": times, "shards": len(shards)})
    decided = DISTRIBUTION_ALIGNMENT in stages  # else a funnel that lies there is an earlier run's
    funnel = json.loads(files.read_bytes(layout.funnel)) if decided else None
    if funnel and funnel.get(SMALLER_BATCHES):  # scores of another shape differ in their last bits
        files.write_json(layout.manifest, {**content, SMALLER_BATCHES: funnel[SMALLER_BATCHES]})
    return Outcome(funnel, layout)


def _run_stage(stage: str, job: build.Job, beam_options: list[str]) -> None:
    pipeline = pipeline_of(beam_options)
    build.GRAPHS[stage](pipeline, job)
    run_to_end(pipeline, stage)


def pipeline_of(beam_options: list[str]) -> beam.Pipeline:
    """An empty pipeline on the runner that Beam's options name; on the local one where they name none."""
    # Named outright, because Beam's DirectRunner first tries to download another runner.
    runner = FnApiRunner() if _is_local(beam_options) else None
    return beam.Pipeline(runner=runner, options=PipelineOptions(beam_options))


def _is_local(beam_options: list[str]) -> bool:
    named = PipelineOptions(beam_options).view_as(StandardOptions).runner
    return named is None or named in LOCAL_RUNNERS


def check_path(option: str, path: str) -> None:
    """Raise UsageError where `path` names no place that Beam can open."""
    if not path:
        raise UsageError(f"{option}: is empty; name a folder")
    try:
        FileSystems.get_filesystem(path)
    except ValueError as error:
        scheme = path.partition("://")[0]
        raise UsageError(f"{option}: {path}: nothing here opens {scheme}://; name a local folder or gs://…") from error


def _check_earlier_stages(stages: list[str], layout: Layout, shards: list[Shard]) -> None:
    """Raise UsageError where a stage that is not run now, and that a later one reads, left no table of some shard."""
    last = max(STAGES.index(stage) for stage in stages)
    for stage, path_of in TABLE_OF.items():
        if stage in stages or STAGES.index(stage) > last:
            continue
        there = files.names_in(path_of(layout, "x").rpartition("/")[0])
        missing = [shard.name for shard in shards if f"{shard.name}.parquet" not in there]
        if missing:
            raise UsageError(
                f"{layout.output}: {len(missing)} of {len(shards)} shards have no table of {stage} "
                f"(the first is {missing[0]}); run that stage first"
            )


class Claimable(Protocol):
    """A folder of outputs, and the file in it that says of what."""

    @property
    def output(self) -> str:
        """The folder."""

    @property
    def manifest(self) -> str:
        """The path of the file."""


def claim(layout: Claimable, content: dict[str, Any]) -> None:
    """Write the manifest into a new or empty output folder; raise UsageError where another run's outputs lie.

    What a killed run of the same was writing when it died is cleared."""
    if files.exists(layout.manifest):
        there = _mapping(files.read_bytes(layout.manifest))
        differing = sorted(key for key in content if there.get(key) != content[key])
        if differing:
            raise UsageError(
                f"{layout.output}: holds another run (it differs in {', '.join(differing)}); name another --output"
            )
        files.clear_aside(layout.output)
        return
    if "://" not in layout.output and Path(layout.output).is_file():
        raise UsageError(f"{layout.output}: is a file; name a folder")
    if files.holds_files(layout.output):
        raise UsageError(f"{layout.output}: is not empty and holds no run of pairsift; name another --output")
    files.clear_aside(layout.output)
    files.write_json(layout.manifest, content)


def _mapping(text: bytes) -> dict[str, Any]:
    """A JSON object; what is none holds nothing."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _with_tagger(recipe: Recipe, found: dict[str, Any]) -> Recipe:
    """The recipe with `auto` settled for all workers, whose own data folders may differ."""
    settings = recipe.single_modality.pos_pattern
    if settings is None:
        return recipe
    source = found["single_modality"]["pos_tagger"]["source"]
    assert source in pos_pattern.SOURCES
    settled = settings.model_copy(update={"tagger": source})
    single = recipe.single_modality.model_copy(update={"pos_pattern": settled})
    return recipe.model_copy(update={"single_modality": single})


def _with_pinned_models(recipe: Recipe, fetch: bool) -> Recipe:
    """The recipe with each hub model's branch settled as a commit, so that no two workers load different ones."""
    return recipe.model_copy(update={"cross_modality": pinned(recipe.cross_modality, fetch)})


def _with_precision(recipe: Recipe) -> Recipe:
    """The recipe with `auto` settled for all workers, so that one table is never made in two precisions."""
    cross = recipe.cross_modality
    settled = cross.model_copy(update={"precision": resolve(cross.precision, cross.device)})
    return recipe.model_copy(update={"cross_modality": settled})
