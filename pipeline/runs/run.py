"""A run: the three graphs in sequence, over one pool, into one output folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline import graphs
from pipeline.output_folder import lock, versions
from pipeline.output_folder.layout import TABLE_OF, Layout
from pipeline.output_folder.manifest import identities, manifest
from pipeline.report.progress import Progress
from pipeline.runners import supported
from pipeline.runners.workers import run_to_end
from pipeline.sinks.publication import Publication, vanished
from pipeline.sources.listing import write_listing
from pipeline.sources.webdataset import list_shards
from transforms.core.errors import UsageError as UsageError  # where those who run things look for it
from transforms.core.metrics import Counts, counts_of
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES, Recipe, model_files
from transforms.core.records import Shard
from transforms.models.precision import resolve
from transforms.models.weights import pinned
from transforms.single_modality import pos_pattern
from transforms.storage import files


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
    keep_versions: int = versions.KEPT,
) -> Outcome:
    """Run `stages` of `recipe` over the tars under `pool` into `output`.

    Results that are already in the output folder and still valid are reused (`pipeline.output_folder.pending`), whether
    this recipe or another one computed them. Raises UsageError (or NoShards) before anything is written where the pool has no
    tars, a model's files are missing, the folder belongs to another pool or is being written by another run, the
    recipe asks for a GPU that this machine's workers have not, or Beam's runner cannot do it.
    """
    paths = {"--input": pool, "--output": output}
    for option, path in paths.items():
        check_path(option, path)
    needs_gpu = recipe.cross_modality.device == "cuda" and CROSS_MODALITY in stages
    supported.check(beam_options, paths, model_files(recipe), needs_gpu)
    pool = files.absolute(pool)  # the same pool, from whatever folder the command is given
    shards = list_shards(pool)
    layout = Layout(output.rstrip("/") or output)
    is_here = supported.is_here(beam_options)
    if needs_gpu and is_here and not torch.cuda.is_available():
        raise UsageError("recipe: cross_modality.device is cuda, but this machine has no GPU; use a GPU or say cpu")
    job, content = settled_job(recipe, pool, layout, shards, fetch=is_here)
    _check_earlier_stages(stages, job)

    with only_writer(layout):
        # Another run may have ended there since, and tars may have come.
        _check_pool(layout, pool)
        job = dataclasses.replace(job, shards=tuple(list_shards(pool)))
        _check_earlier_stages(stages, job)
        files.write_json(layout.newest_manifest, content)
        write_listing(layout, job.shards)
        work = WorkDone({}, {})
        funnel, shards_vanished = None, 0
        for stage in stages:
            if stage == DISTRIBUTION_ALIGNMENT:
                shards_vanished = len(vanished(layout))
                funnel = decide(job, Publication(content, keep_versions), beam_options, progress, work)
            else:
                run_stage(stage, job, beam_options, progress, work)
        files.delete_folder(layout.in_progress_folder)
        files.write_json(layout.run, {**work.content, "shards": len(job.shards), "shards_vanished": shards_vanished})
    return Outcome(funnel, shown(layout))


def settled_job(
    recipe: Recipe, pool: str, layout: Layout, shards: Sequence[Shard], fetch: bool, precision: str | None = None
) -> tuple[graphs.Job, dict[str, Any]]:
    """What the graphs are built from, with all settled that could come out differently on another machine, and the
    content of the manifest. `precision` is what `auto` comes to; None: what this machine does best.

    With `fetch`, weights that this machine lacks are fetched. Raises UsageError where a model's files are missing, or
    the output folder belongs to another pool.
    """
    cross = recipe.cross_modality
    settled_precision = precision if precision and cross.precision == "auto" else resolve(cross.precision, cross.device)
    try:
        cross = pinned(cross.model_copy(update={"precision": settled_precision}), fetch)
        settled = recipe.model_copy(update={"cross_modality": cross})
        found = identities(settled)
    except (OSError, ValueError, LookupError) as error:
        raise UsageError(f"recipe: {error}") from error
    content = manifest(recipe, pool, found, settled_precision)
    _check_pool(layout, pool)
    return graphs.Job(with_tagger(settled, found), tuple(shards), layout, found), content


@dataclasses.dataclass(frozen=True)
class WorkDone:
    """What a run has done: seconds and counts of each stage."""

    seconds: dict[str, float]
    counts: dict[str, Counts]

    @property
    def content(self) -> dict[str, Any]:
        """As run.json has it."""
        return {"seconds": self.seconds, "counts": self.counts}


def run_stage(stage: str, job: graphs.Job, beam_options: list[str], progress: Progress, work: WorkDone) -> None:
    """Run one stage, show it, and note in `work` what it took."""
    started = time.monotonic()
    try:
        with progress.stage(stage, job.layout, job.shards):
            work.counts[stage] = _run_stage(stage, job, beam_options)
    finally:
        files.delete_folder(job.layout.progress_folder)
    progress.counted(stage, work.counts[stage])
    work.seconds[stage] = round(time.monotonic() - started, 3)


def decide(
    job: graphs.Job, publication: Publication, beam_options: list[str], progress: Progress, work: WorkDone
) -> dict[str, Any]:
    """Run stage 3 into a version of its own, which readers then see, and give its funnel."""
    publishing = dataclasses.replace(job, layout=versions.begin(job.layout.output), publication=publication)
    run_stage(DISTRIBUTION_ALIGNMENT, publishing, beam_options, progress, work)
    return json.loads(files.read_bytes(publishing.layout.funnel))


def _run_stage(stage: str, job: graphs.Job, beam_options: list[str]) -> Counts:
    return run_graph(graphs.GRAPHS[stage], job, beam_options)


def run_graph(graph: graphs.Graph, job: graphs.Job, beam_options: list[str]) -> Counts:
    """Run one graph to its end; what was counted in it, if the runner tells."""
    pipeline = supported.pipeline_of(beam_options)
    graphs.build(graph, pipeline, job)
    result = run_to_end(pipeline, graph.__name__)
    return counts_of(result.metrics()) if supported.has_metrics(beam_options) else {}


@contextlib.contextmanager
def only_writer(layout: Layout) -> Iterator[None]:
    """Hold the output folder, and clear what one that was killed left there. Raises UsageError where another run
    holds it."""
    try:
        with lock.only_writer(layout.output):
            clear_leftovers(layout)
            yield
    except lock.Held as error:
        raise UsageError(str(error)) from error


def clear_leftovers(layout: Layout) -> None:
    """Clear what a run that was killed left in an output folder; who does that holds it."""
    files.clear_aside(layout.output)
    for folder in (layout.progress_folder, layout.alignment_work, layout.select_work):
        files.delete_folder(folder)


def shown(layout: Layout) -> Layout:
    """Where readers find the results."""
    return versions.newest(layout.output) if files.in_cloud_storage(layout.output) else layout


def check_path(option: str, path: str) -> None:
    """Raise UsageError where `path` names no place on this machine or in Cloud Storage."""
    if not path:
        raise UsageError(f"{option}: is empty; name a folder")
    scheme, separator, rest = path.partition("://")
    if separator and scheme != "gs":
        raise UsageError(f"{option}: {path}: nothing here opens {scheme}://; name a local folder or gs://…")
    if separator and not rest.partition("/")[0]:
        raise UsageError(f"{option}: {path}: names no bucket; allowed: gs://BUCKET/FOLDER")


def _check_earlier_stages(stages: list[str], job: graphs.Job) -> None:
    """Raise UsageError where a stage that is not run now, and that a later one reads, left no table of some shard that
    holds for this recipe."""
    last = max(STAGES.index(stage) for stage in stages)
    features, over_pool, scores = job.single_modality_work, job.pool_wide_work, job.cross_modality_work
    is_complete: dict[str, Callable[[Shard], bool]] = {
        SINGLE_MODALITY: lambda shard: features.is_complete(shard) and over_pool.is_complete(shard),
        # Which scores are wanted hangs on stage 1, which may be about to run.
        CROSS_MODALITY: scores.is_begun if SINGLE_MODALITY in stages else scores.is_complete,
    }
    for stage in TABLE_OF:
        if stage in stages or STAGES.index(stage) > last:
            continue
        there = job.layout.shards_with(TABLE_OF[stage])
        with_table = [shard for shard in job.shards if shard.name in there]
        finished = dict(zip(with_table, files.each(job.layout.output, is_complete[stage], with_table), strict=True))
        missing = [shard.name for shard in job.shards if not finished.get(shard)]
        if missing:
            raise UsageError(
                f"{job.layout.output}: {len(missing)} of {len(job.shards)} shards have no table of {stage} "
                f"that holds for this recipe (the first is {missing[0]}); run that stage first"
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
    """Write the manifest into a new or empty output folder; raise UsageError where something else's outputs lie.

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
    _check_empty(layout.output)
    files.clear_aside(layout.output)
    files.write_json(layout.manifest, content)


def _check_pool(layout: Layout, pool: str) -> None:
    """Raise UsageError where the output folder holds something else than runs over `pool`."""
    if not files.exists(layout.newest_manifest):
        _check_empty(layout.output)
        return
    before = _mapping(files.read_bytes(layout.newest_manifest)).get("pool")
    if str(before).rstrip("/") != pool.rstrip("/"):
        raise UsageError(
            f"{layout.output}: holds another pool's run (of {before}, and --input is {pool}); name another --output"
        )


def _check_empty(output: str) -> None:
    if not files.in_cloud_storage(output) and Path(output).is_file():
        raise UsageError(f"{output}: is a file; name a folder")
    if files.holds_files(output, besides=lock.NAMES):
        raise UsageError(f"{output}: is not empty and holds no run of pairsift; name another --output")


def _mapping(text: bytes) -> dict[str, Any]:
    """A JSON object; what is none holds nothing."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def with_tagger(recipe: Recipe, found: dict[str, Any]) -> Recipe:
    """The recipe with `auto` settled for all workers, whose own data folders may differ."""
    settings, tagger = recipe.single_modality.pos_pattern, found[SINGLE_MODALITY].get("pos_pattern")
    if settings is None or tagger is None:
        return recipe
    source = tagger["source"]
    assert source in pos_pattern.SOURCES
    settled = settings.model_copy(update={"tagger": source})
    single = recipe.single_modality.model_copy(update={"pos_pattern": settled})
    return recipe.model_copy(update={"single_modality": single})
