"""Deciding again from stored annotations with other thresholds, weights or targets: no images, no models."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

from pipeline import graphs
from pipeline.output_folder import tables, versions
from pipeline.output_folder.layout import POOL_WIDE, Layout
from pipeline.output_folder.listing import read_listing
from pipeline.output_folder.manifest import identities_from, manifest
from pipeline.report.progress import Progress
from pipeline.runners import supported
from pipeline.runs.claim import check_path, only_writer, shown
from pipeline.runs.job import with_tagger
from pipeline.runs.run import Outcome
from pipeline.runs.stage import WorkDone, decide, run_graph, token_of
from pipeline.sinks.publication import Publication
from transforms.core.errors import UsageError
from transforms.core.recipe import Recipe
from transforms.core.records import Shard
from transforms.models.precision import resolve
from transforms.storage import files


def select(
    recipe: Recipe,
    recipe_path: str,
    output: str,
    beam_options: list[str],
    progress: Progress,
    keep_versions: int = versions.KEPT,
) -> Outcome:
    """Run stage 3 with `recipe` over the annotations under `output`. The results are byte-identical to a run of that
    recipe. `recipe_path` is used in messages only.

    Raises UsageError, with nothing changed, if there are no annotations, if features or scores that the recipe needs
    were never computed (the message says how many, and the command that computes them), or if another run is writing
    the folder.
    """
    check_path("--output", output)
    supported.check(beam_options, {"--output": output}, {}, needs_gpu=False)
    layout = Layout(output.rstrip("/") or output, token=token_of(beam_options))
    earlier, shards = _newest_run(layout)
    try:
        found = identities_from(earlier, recipe)
        settled = with_tagger(_with_precision(recipe, earlier), found)
    except (OSError, ValueError, LookupError) as error:
        raise UsageError(f"recipe: {error}") from error
    pool = earlier["pool"]
    command = shlex.join(["pairsift", "run", recipe_path, "--input", pool, "--output", output])
    job = graphs.Job(settled, shards, layout, found)
    features = job.feature_cache
    unfinished = files.each(output, features.is_complete, shards).count(False)
    if unfinished:
        raise UsageError(
            f"{output}: {unfinished} of {len(shards)} shards have no features for this recipe; compute them: {command}"
        )
    with only_writer(layout):
        if _newest_run(layout) != (earlier, shards):
            raise UsageError(f"{output}: another run has just ended there; run the same command again")
        try:
            aside = _pool_wide_aside(job, beam_options)
            missing = _missing(aside, beam_options)
            if missing:
                raise UsageError(
                    f"{output}: {missing} samples have no score that this recipe needs; compute them: {command}"
                )
            unscored = files.each(output, aside.score_cache.has_scores, shards).count(False)
            if unscored:  # shards of which no sample is kept
                raise UsageError(
                    f"{output}: {unscored} of {len(shards)} shards have no scores yet; compute them: {command}"
                )
            if aside is not job:
                _move(aside.layout, layout, shards)
        finally:
            files.delete_folder(layout.select_folder)
        content = manifest(recipe, pool, found, settled.cross_modality.precision)
        work = WorkDone({}, {})
        funnel = decide(job, Publication(content, keep_versions), beam_options, progress, work)
        files.write_json(layout.run, {**work.content, "shards": len(shards)})
    return Outcome(funnel, shown(layout))


def _newest_run(layout: Layout) -> tuple[dict[str, Any], tuple[Shard, ...]]:
    """The manifest of the newest run, and the shards that it listed."""
    try:
        earlier = json.loads(files.read_bytes(layout.newest_manifest))
        shards = read_listing(layout)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{layout.output}: holds no annotations to select from; `pairsift run` computes them"
        ) from error
    return earlier, shards


def _with_precision(recipe: Recipe, earlier: dict[str, Any]) -> Recipe:
    """The recipe with `precision: auto` resolved as in the newest run, which may have had other hardware."""
    cross, before = recipe.cross_modality, earlier["recipe"]["cross_modality"]
    same = (cross.device, cross.precision) == (before["device"], before["precision"])
    precision = earlier["precision"] if same else resolve(cross.precision, cross.device)
    return recipe.model_copy(update={"cross_modality": cross.model_copy(update={"precision": precision})})


def _pool_wide_aside(job: graphs.Job, beam_options: list[str]) -> graphs.Job:
    """The job with valid pool-wide tables for its recipe; missing ones are computed into `select_work`."""
    cache = job.pool_wide_cache
    if all(files.each(job.layout.output, cache.is_complete, job.shards)):
        return job
    aside = dataclasses.replace(job, layout=dataclasses.replace(job.layout, pool_wide_folder=job.layout.select_work))
    run_graph(graphs.pool_wide, aside, beam_options)
    return aside


def _missing(job: graphs.Job, beam_options: list[str]) -> int:
    """The number of samples that lack a score which the recipe needs."""
    run_graph(graphs.count_missing, job, beam_options)
    return int(files.read_bytes(job.layout.missing))


def _move(source: Layout, target: Layout, shards: tuple[Shard, ...]) -> None:
    """Replace the pool-wide tables and dead letters of `target` with those of `source`."""

    def move(shard: Shard) -> None:
        letters = tables.read_dead_letters(source.dead_letters(POOL_WIDE, shard.name))
        tables.write_dead_letters(target.dead_letters(POOL_WIDE, shard.name), letters)
        files.rename(source.pool_wide(shard.name), target.pool_wide(shard.name))

    files.each(target.output, move, shards)
