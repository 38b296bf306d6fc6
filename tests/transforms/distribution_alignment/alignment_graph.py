"""Stage 3 wired as in the product, over generated candidates."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Iterable
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from transforms.core.recipe import DistributionAlignmentSettings
from transforms.distribution_alignment.cids import ClusterImportance, ReadTasks
from transforms.distribution_alignment.clusters import AssignClusters, TrainCentroids
from transforms.distribution_alignment.copies import PLACEMENTS, TALLIES, AssignCopies, ClusterTable
from transforms.distribution_alignment.duplicate_search import SemanticDedup
from transforms.distribution_alignment.records import Candidates, CandidateShard, Placement, Placements
from transforms.distribution_alignment.tiles import FindRanges, ToTiles
from transforms.distribution_alignment.work_folder import WorkFolder, write_candidates


def make_candidates(embeddings: np.ndarray, seed: int = 0) -> Candidates:
    """A candidate for each embedding (n, d), in three shards.

    Every fifth shows digits, and every seventh has no digit score.
    """
    rng = np.random.default_rng(seed)
    count = len(embeddings)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    numbers = np.arange(count)
    return Candidates(
        uids=np.array([f"{number:032x}".encode() for number in numbers], "S32"),
        shards=np.array([f"{number % 3:05d}".encode() for number in numbers], "S5"),
        cosines=np.round(rng.uniform(0.19, 0.4, count), 2).astype(np.float32),  # rounded, so that there are ties
        digits=np.where(numbers % 7 == 0, -1.0, np.where(numbers % 5 == 0, 0.9, 0.1)).astype(np.float32),
        embeddings=(embeddings / np.where(lengths > 0, lengths, 1)).astype("<f2"),
    )


def lay_out(candidates: Candidates, work: WorkFolder) -> list[CandidateShard]:
    """Write the candidates to the work folder, as the product does from the tables of stages 1 and 2."""
    shards = []
    for shard, rows in candidates.groups(candidates.shards):
        write_candidates(work.candidates(shard.decode()), rows)
        shards.append(CandidateShard(shard.decode(), len(rows)))
    return shards


def place(
    candidates: Candidates,
    settings: DistributionAlignmentSettings,
    folder: str,
    pool_count: int = 0,
    seed: int = 0,
    **options: Any,
) -> tuple[list[Placement], list[dict[str, Any]]]:
    """The placements, sorted by uid, and the table of clusters."""
    os.makedirs(folder, exist_ok=True)
    work = WorkFolder(f"{folder}/work")
    shards = lay_out(candidates, work)
    with beam.Pipeline("FnApiRunner", PipelineOptions(**options)) as p:
        pool = p | "PoolCount" >> beam.Create([pool_count])
        tasks = p | "Tasks" >> ReadTasks(settings.cids) if settings.cids else None
        rows = p | "Candidates" >> beam.Create(shards).with_output_types(CandidateShard)
        path = rows | "Train" >> TrainCentroids(settings.clusters, seed, work, f"{folder}/centroids.npy")
        ranges = rows | "Assign" >> AssignClusters(work, path) | "Ranges" >> FindRanges(work)
        tiles = rows | "Tiles" >> ToTiles(work, ranges)
        ranked = tiles | "SemanticDedup" >> SemanticDedup(settings.semantic_dedup, work, ranges)
        allocation = ranked | "Importance" >> ClusterImportance(settings, path, pool, tasks)
        placed = ranked | "Copies" >> AssignCopies(settings, seed, allocation)
        table = placed[TALLIES] | "Table" >> ClusterTable(allocation)
        for name, values in (("placements", placed[PLACEMENTS]), ("table", table)):
            (values | f"All_{name}" >> beam.combiners.ToList() | f"Keep_{name}" >> beam.Map(_keep, f"{folder}/{name}"))
    (placements, [rows_of_table]) = (_kept(f"{folder}/{name}") for name in ("placements", "table"))
    return sorted(itertools.chain.from_iterable(part.one_by_one() for part in placements)), rows_of_table


def placements_of(rows: Iterable[Placement]) -> Placements:
    """The columns of a list of placements."""
    columns = list(zip(*rows, strict=True)) or [()] * len(Placement._fields)
    types: tuple[Any, ...] = ("S32", "S", np.int32, "S32", np.float64, np.int64)
    return Placements(*(np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)))


def _keep(values: list[Any], path: str) -> None:
    with open(path, "wb") as file:
        pickle.dump(values, file)


def _kept(path: str) -> list[Any]:
    with open(path, "rb") as file:
        kept: list[Any] = pickle.load(file)
        return kept
