"""A run: the three stages in sequence, over one pool, into one output folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pipeline import graphs
from pipeline.output_folder import versions
from pipeline.output_folder.layout import TABLE_OF, Layout
from pipeline.output_folder.listing import write_listing
from pipeline.report.progress import Progress
from pipeline.runners import supported
from pipeline.runners.cores import cores_per_worker
from pipeline.runs.claim import check_path, check_pool, only_writer, shown
from pipeline.runs.job import settled_job
from pipeline.runs.stage import WorkDone, decide, run_stage, token_of
from pipeline.sinks.publication import Publication, vanished
from pipeline.sources import pool_names
from pipeline.sources.first_look import look_first
from pipeline.sources.pool import list_shards
from transforms.core.errors import UsageError
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES, Recipe, model_files
from transforms.core.records import Shard
from transforms.storage import files


def _has_gpu() -> bool:
    import torch  # takes seconds, and most runs need no GPU here

    return torch.cuda.is_available()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run: its funnel (None if stage 3 did not run) and the layout of its files."""

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

    Results in the output folder that are still valid are reused (`pipeline.output_folder.pending`), whichever recipe
    computed them. Raises UsageError (or NoShards) before anything is written if the pool has no tars, a model's files
    are missing, the folder belongs to another pool or is being written by another run, the recipe asks for a GPU that
    the workers lack, or the Beam runner cannot run the graphs; and DeadPool if nearly all of the first samples are dead
    letters for one reason.
    """
    paths = {**pool_names.options_of(pool), "--output": output}
    for option, path in paths.items():
        check_path(option, path)
    needs_gpu = recipe.cross_modality.device == "cuda" and CROSS_MODALITY in stages
    supported.check(beam_options, paths, model_files(recipe), needs_gpu)
    pool = pool_names.absolute(pool)  # a relative path must name the same pool from every working folder
    shards = list_shards(pool)
    layout = Layout(output.rstrip("/") or output, token=token_of(beam_options))
    if SINGLE_MODALITY in stages:
        look_first(shards, recipe.pool, layout)
    is_here = supported.is_here(beam_options)
    if needs_gpu and is_here and not _has_gpu():
        raise UsageError("recipe: cross_modality.device is cuda, but this machine has no GPU; use a GPU or say cpu")
    job, content = settled_job(recipe, pool, layout, shards, fetch=is_here)
    _check_earlier_stages(stages, job)

    with only_writer(layout):
        # Repeat the checks: another run may have ended and tars may have arrived before this run got the lock.
        check_pool(layout, pool)
        job = dataclasses.replace(job, shards=tuple(list_shards(pool)), cores=cores_per_worker(beam_options))
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
        files.write_json(layout.run, {**work.content, "shards": len(job.shards), "shards_vanished": shards_vanished})
    return Outcome(funnel, shown(layout))


def _check_earlier_stages(stages: list[str], job: graphs.Job) -> None:
    """Raise UsageError if `stages` read tables of an earlier stage that is not run now, and some shard has no valid
    table of that stage."""
    last = max(STAGES.index(stage) for stage in stages)
    features, over_pool, scores = job.feature_cache, job.pool_wide_cache, job.score_cache
    is_complete: dict[str, Callable[[Shard], bool]] = {
        SINGLE_MODALITY: lambda shard: features.is_complete(shard) and over_pool.is_complete(shard),
        # Which scores are needed depends on stage 1, which may be about to run.
        CROSS_MODALITY: scores.has_scores if SINGLE_MODALITY in stages else scores.is_complete,
    }
    for stage in TABLE_OF:
        if stage in stages or STAGES.index(stage) > last:
            continue
        existing = job.layout.shards_with(TABLE_OF[stage])
        with_table = [shard for shard in job.shards if shard.name in existing]
        finished = dict(zip(with_table, files.each(job.layout.output, is_complete[stage], with_table), strict=True))
        missing = [shard.name for shard in job.shards if not finished.get(shard)]
        if missing:
            raise UsageError(
                f"{job.layout.output}: {len(missing)} of {len(job.shards)} shards have no valid {stage} table for this "
                f"recipe (the first is {missing[0]}); run that stage first"
            )
