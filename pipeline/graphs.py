"""The three graphs, on one page. They are connected only by the tables that they write to the output folder.

    pool (tars) --single_modality--> features and pool-wide annotations
                --cross_modality--> scores and embeddings of what stage 1 kept
                --distribution_alignment--> decisions, subset, funnel
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import AsSingleton

from pipeline.output_folder import tables
from pipeline.output_folder.accounting import ReconcilePool
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.pending import FeatureCache, PoolWideCache, ScoreCache
from pipeline.sinks.clusters import WriteClusters
from pipeline.sinks.decisions import WriteDecisions, WriteFunnel, add_counts
from pipeline.sinks.pool_wide import WritePoolWide
from pipeline.sinks.publication import Publication, holds, publish
from pipeline.sinks.shard_tables import WriteShardTable
from pipeline.sinks.subset import WriteSubset
from pipeline.sources.annotations import (
    ReadCandidates,
    ReadMembers,
    ReadPoolRows,
    ReadThresholds,
    count_samples,
)
from pipeline.sources.listing import ListShards
from pipeline.sources.shards import ReadShards
from transforms.annotate import Annotate
from transforms.columns import Columns, bucket_count
from transforms.core import catalogue
from transforms.core.catalogue import Score
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES, Recipe
from transforms.core.records import Shard
from transforms.cross_modality.join_wanted import JoinWanted
from transforms.distribution_alignment.cids import ClusterImportance, ReadTasks
from transforms.distribution_alignment.clusters import AssignClusters, TrainCentroids
from transforms.distribution_alignment.copies import PLACEMENTS, TALLIES, AssignCopies, ClusterTable
from transforms.distribution_alignment.duplicate_search import SemanticDedup
from transforms.distribution_alignment.records import Placements
from transforms.distribution_alignment.tiles import FindRanges, ToTiles
from transforms.distribution_alignment.work_folder import WorkFolder
from transforms.single_modality.duplicate_groups import Changes, DecideGroups
from transforms.single_modality.images import ImageFeatures
from transforms.single_modality.pool_wide import CaptionFrequency, NearDuplicate, UniqueUids
from transforms.storage import files

READ_BATCH = 64  # samples; stage 1 holds that many small pictures at a time
DRAFT_SIDE_PX = 320  # enough for hashes and for faces that fill much of the picture


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of the graphs.

    - `shards`: the shards of the pool's listing. A graph contains none of them.
    - `identities`: the models and weights behind each stage.
    - `publication`: if given, stage 3 publishes its results as its last step.
    - `accelerator`: the resource hint of the step that runs the models.
    - `cores`: how many cores each worker process has. Outputs do not depend on it.
    - `checks_before`: whether stages 2 and 3 check at run time that the earlier stages are complete, for runs where
      this is not known when the graph is built.
    """

    recipe: Recipe
    shards: tuple[Shard, ...]
    layout: Layout
    identities: dict[str, Any]
    publication: Publication | None = None
    accelerator: str | None = None
    cores: int = 1
    checks_before: bool = False

    @property
    def feature_cache(self) -> FeatureCache:
        """The cache of stage 1's features."""
        return FeatureCache(self.recipe, self.layout, self.identities)

    @property
    def pool_wide_cache(self) -> PoolWideCache:
        """The cache of the pool-wide columns."""
        return PoolWideCache(self.recipe, self.layout, self.identities, self.shards)

    @property
    def score_cache(self) -> ScoreCache:
        """The cache of stage 2's scores."""
        return ScoreCache(self.recipe, self.layout, self.identities)


class Incomplete(ValueError):
    """An earlier stage has not processed a shard for this recipe."""


def single_modality(start: beam.PCollection, job: Job) -> beam.PCollection:
    """Stage 1: reads, decodes, annotates and writes each shard in one fused stage; then passes over all slim rows."""
    features = job.feature_cache

    read = (
        start
        | "Shards" >> ListShards(job.layout)
        | "Read shards" >> ReadShards(features, job.recipe.pool, READ_BATCH, DRAFT_SIDE_PX)
    )
    batches = read[ReadShards.BATCHES] | "Image features" >> ImageFeatures()
    for score in catalogue.per_sample_scores():
        batches = _annotated(batches, score, job.recipe)
    written = batches | "Write features" >> beam.ParDo(
        WriteShardTable(job.layout, features, Layout.single_modality, tables.single_modality_schema())
    )
    shards = (read[ReadShards.FINISHED], written) | "All shards" >> beam.Flatten() | "Tables are there" >> _barrier()
    reconciled = shards | "Reconcile with the tars" >> ReconcilePool(job.layout, job.recipe.pool.max_dead_share)
    return (reconciled, _pool_wide(shards, job)) | "Stage 1" >> beam.Flatten()


def pool_wide(start: beam.PCollection, job: Job) -> beam.PCollection:
    """Only the second half of stage 1, over existing features."""
    return _pool_wide(start | "Shards" >> ListShards(job.layout), job)


def _pool_wide(shards: beam.PCollection, job: Job) -> beam.PCollection:
    rules = job.recipe.single_modality
    buckets = bucket_count(len(job.shards))
    features = shards | "Read features" >> ReadPoolRows(job.layout, job.recipe)
    pool_samples = features | "Samples of shard" >> beam.Map(len) | "Count samples" >> beam.CombineGlobally(sum)
    named = features | "Unique uids" >> UniqueUids(buckets)
    rows = named[UniqueUids.UNIQUE]
    if rules.caption_frequency:
        rows |= "Caption frequency" >> CaptionFrequency(rules.caption_frequency, pool_samples, buckets)
    if rules.near_duplicate:
        rows |= "Near duplicate" >> NearDuplicate(rules.near_duplicate, buckets)
    return {
        WritePoolWide.SHARDS: shards,
        WritePoolWide.ROWS: rows,
        WritePoolWide.DEAD_LETTERS: named[UniqueUids.REPEATED],
    } | "Write pool-wide" >> WritePoolWide(job.layout, pool_samples, job.pool_wide_cache.cache_key)


def cross_modality(start: beam.PCollection, job: Job) -> beam.PCollection:
    """Stage 2: only the models run on GPUs."""
    shards = start | "Shards" >> ListShards(job.layout)
    if job.checks_before:
        shards |= "Features are there" >> beam.Map(_with_features, job.feature_cache, job.pool_wide_cache)
    scored = ScoreShards(job)
    if job.accelerator:
        scored = scored.with_resource_hints(accelerator=job.accelerator)
    return shards | "Score shards" >> scored


def _annotated(batches: beam.PCollection, score: Score[Any], recipe: Recipe) -> beam.PCollection:
    settings = recipe.settings_of(score)
    return batches | score.label >> Annotate(score, settings) if settings is not None and score.annotator else batches


class ScoreShards(beam.PTransform):
    """PCollection[Shard] -> the shards whose scores this run has written.

    One fused stage reads the samples that stage 1 kept, decodes them once, runs every model and writes. Pixels never
    cross a shuffle, so a GPU hint must be set on this whole composite.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def expand(self, shards: beam.PCollection[Shard]) -> beam.PCollection[Shard]:
        # Torch takes seconds to import, and only this stage needs it.
        from transforms.models.prepare import load_prepare
        from transforms.models.score import ScoreByModel

        job = self._job
        models, scores = job.recipe.cross_modality, job.score_cache
        calls = job.cores if models.device == "cpu" else 1

        read = shards | "Read kept" >> ReadShards(
            scores,
            job.recipe.pool,
            calls * models.flipped_clip.batch_size,
            load_prepare=functools.partial(load_prepare, models),
            in_turns=models.device == "cpu",  # the models use all cores
        )
        first, *later = (score for score in catalogue.model_scores() if job.recipe.is_on(score))
        batches = read[ReadShards.BATCHES] | first.label >> ScoreByModel(first, models, calls)
        if later:
            batches |= "Join wanted" >> JoinWanted(models)
        for score in later:
            batches |= score.label >> ScoreByModel(score, models, calls)
        for score in catalogue.scores_of(CROSS_MODALITY):
            batches = _annotated(batches, score, job.recipe)
        return batches | "Write scores" >> beam.ParDo(
            WriteShardTable(job.layout, scores, Layout.cross_modality, tables.cross_modality_schema())
        )


def count_missing(start: beam.PCollection, job: Job) -> beam.PCollection:
    """Count the samples that lack a score that stage 3 needs, from tables alone."""
    return (
        start
        | "Shards" >> ListShards(job.layout)
        | "Count unscored" >> beam.Map(_count_wanted, job.score_cache)
        | "Add counts" >> beam.CombineGlobally(sum)
        | "Write count" >> beam.Map(_write_count, job.layout)
    )


def distribution_alignment(start: beam.PCollection, job: Job) -> beam.PCollection:
    """Stage 3: computes from slim rows and fp16 embeddings how often the training subset contains each survivor."""
    settings, seed, layout = job.recipe.distribution_alignment, job.recipe.seed, job.layout
    work = WorkFolder(layout.alignment_work)

    shards = start | "Shards" >> ListShards(layout)
    if job.checks_before:
        earlier = job.feature_cache, job.pool_wide_cache, job.score_cache
        shards |= "Scores are there" >> beam.Map(_with_scores, *earlier)
    thresholds = shards | "Thresholds" >> ReadThresholds(layout, job.recipe)
    changes = (
        shards
        | "Read members" >> ReadMembers(layout, job.recipe, thresholds)
        | "Decide groups" >> DecideGroups(bucket_count(len(job.shards)))
        | "Changes by shard" >> beam.FlatMap(_by_shard)
    )
    names = shards | "Shard names" >> beam.Map(_by_name)
    candidates = {
        ReadCandidates.SHARDS: names,
        ReadCandidates.CHANGES: changes,
    } | "Read candidates" >> ReadCandidates(layout, job.recipe, work, thresholds)
    pool_count = shards | "Pool size" >> beam.Map(count_samples, layout) | "Add sizes" >> beam.CombineGlobally(sum)

    centroids = candidates | "Train centroids" >> TrainCentroids(settings.clusters, seed, work, layout.centroids)
    ranges = candidates | "Assign clusters" >> AssignClusters(work, centroids) | "Find ranges" >> FindRanges(work)
    tiles = candidates | "To tiles" >> ToTiles(work, ranges)
    ranked = tiles | "Semantic dedup" >> SemanticDedup(settings.semantic_dedup, work, ranges)
    tasks = start.pipeline | "Task centroids" >> ReadTasks(settings.cids) if settings.cids else None
    allocation = ranked | "Cluster importance" >> ClusterImportance(settings, centroids, pool_count, tasks)
    copies = ranked | "Copies" >> AssignCopies(settings, seed, allocation)
    placements = copies[PLACEMENTS]

    clusters = (
        copies[TALLIES]
        | "Cluster table" >> ClusterTable(allocation)
        | "Write clusters" >> beam.ParDo(WriteClusters(layout))
    )
    subset = placements | "Subset" >> WriteSubset(layout, work)
    funnel = (
        {
            WriteDecisions.SHARDS: names,
            WriteDecisions.CHANGES: changes,
            WriteDecisions.PLACEMENTS: placements | "By shard" >> beam.FlatMap(_by_shard),
        }
        | "Gather shard" >> beam.CoGroupByKey()
        | "Write decisions" >> beam.ParDo(WriteDecisions(layout, job.recipe), AsSingleton(thresholds))
        | "Add outcome counts" >> beam.CombineGlobally(add_counts)
        | "Write funnel" >> beam.ParDo(WriteFunnel(layout, job.recipe))
    )
    done = (
        (clusters, subset, funnel)
        | "All written" >> beam.Flatten()
        | "When all are" >> beam.combiners.Count.Globally()
        | "Clear work folder" >> beam.Map(_clear, work, layout, job.publication)
    )
    return done | "Publish" >> beam.Map(_publish, layout, job.publication) if job.publication else done


Graph = Callable[[beam.PCollection, Job], beam.PCollection]
"""A function that adds a stage after `start`, a single element. Its output is complete when the stage is done."""

GRAPHS: dict[str, Graph] = {
    SINGLE_MODALITY: single_modality,
    CROSS_MODALITY: cross_modality,
    DISTRIBUTION_ALIGNMENT: distribution_alignment,
}


def all_stages(start: beam.PCollection, job: Job) -> beam.PCollection:
    """The three graphs as one.

    Each starts when the previous one has finished the complete pool, and reads tables only then. It therefore computes
    and resumes exactly as three jobs do.
    """
    for stage in STAGES:
        done = start | stage.replace("_", " ").capitalize() >> _Stage(stage, job)
        start = done | f"After {stage}" >> beam.combiners.Count.Globally()
    return start


class _Stage(beam.PTransform):
    """The graph of a stage as one step."""

    def __init__(self, stage: str, job: Job) -> None:
        super().__init__()
        self._graph, self._job = GRAPHS[stage], job

    def expand(self, start: beam.PCollection) -> beam.PCollection:
        return self._graph(start, self._job)


def build(graph: Graph, pipeline: beam.Pipeline, job: Job) -> None:
    """Add a graph to an empty pipeline."""
    _ = graph(pipeline | "Start" >> beam.Impulse(), job)


def _barrier() -> beam.PTransform:
    """Return a step that breaks fusion, so that later steps start on a shard only after its table is written."""
    return beam.Reshuffle()


def _with_features(shard: Shard, features: FeatureCache, pool_wide: PoolWideCache) -> Shard:
    shard = Shard(*shard)
    if not (features.is_complete(shard) and pool_wide.is_complete(shard)):
        raise Incomplete(f"shard {shard.name}: no features for this recipe; run stage {SINGLE_MODALITY} first")
    return shard


def _with_scores(
    shard: Shard, features: FeatureCache, pool_wide: PoolWideCache, scores: ScoreCache
) -> Shard:
    shard = _with_features(shard, features, pool_wide)
    if not scores.has_scores(shard):
        raise Incomplete(f"shard {shard.name}: no table of scores yet; run stage {CROSS_MODALITY} first")
    missing = scores.count_wanted(shard)
    if missing:
        raise Incomplete(
            f"shard {shard.name}: {missing} samples lack a score that this recipe needs; "
            f"run stage {CROSS_MODALITY} first"
        )
    return shard


def _publish(cleared: None, layout: Layout, publication: Publication) -> None:
    publish(layout, publication)


def _count_wanted(shard: Shard, scores: ScoreCache) -> int:
    return scores.count_wanted(Shard(*shard))


def _write_count(count: int, layout: Layout) -> None:
    files.write_bytes(layout.missing, str(count).encode())


def _by_name(shard: Shard) -> tuple[str, None]:
    return Shard(*shard).name, None


def _by_shard(rows: Placements | Changes) -> Iterator[tuple[str, Columns]]:
    return ((shard.decode(), part) for shard, part in rows.groups(rows.shards))


def _clear(written: int, work: WorkFolder, layout: Layout, publication: Publication | None) -> None:
    if holds(layout, publication):
        files.delete_folder(work.folder)
