"""Stage 3 wired as the product wires it, over candidates in memory, and candidates to feed it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.recipe import DistributionAlignment
from transforms.distribution_alignment.cids import ClusterImportance, ReadTasks
from transforms.distribution_alignment.clusters import AssignClusters, TrainCentroids
from transforms.distribution_alignment.copies import PLACEMENTS, TALLIES, AssignCopies, ClusterTable
from transforms.distribution_alignment.records import Candidate, Placement
from transforms.distribution_alignment.semantic_dedup import SemanticDedup


def make_candidates(embeddings: np.ndarray, seed: int = 0) -> list[Candidate]:
    """A candidate for each embedding (n, d); every fifth shows digits, every seventh was never
    asked."""
    rng = np.random.default_rng(seed)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    stored = (embeddings / np.where(lengths > 0, lengths, 1)).astype("<f2")
    cosines = np.round(rng.uniform(0.19, 0.4, len(stored)), 2)  # rounded, so that some tie
    return [
        Candidate(
            uid=f"{index:032x}",
            shard=f"{index % 3:05d}.tar",
            flipped_clip_cosine=float(cosines[index]),
            digit_probability=-1.0 if index % 7 == 0 else 0.9 if index % 5 == 0 else 0.1,
            embedding=row.tobytes(),
        )
        for index, row in enumerate(stored)
    ]


def place(
    candidates: Sequence[Candidate],
    settings: DistributionAlignment,
    folder: str,
    pool_count: int = 0,
    seed: int = 0,
    **options: Any,
) -> tuple[list[Placement], list[dict[str, Any]]]:
    """The placements, sorted by uid, and the table of clusters."""
    os.makedirs(folder, exist_ok=True)
    with beam.Pipeline("FnApiRunner", PipelineOptions(**options)) as p:
        pool = p | "PoolCount" >> beam.Create([pool_count])
        tasks = p | "Tasks" >> ReadTasks(settings.cids) if settings.cids else None
        rows = p | "Candidates" >> beam.Create(candidates, reshuffle=False).with_output_types(Candidate)
        path = rows | "Train" >> TrainCentroids(settings.clusters, seed, f"{folder}/centroids.npy")
        ranked = rows | "Assign" >> AssignClusters(path) | "SemanticDedup" >> SemanticDedup(settings.semantic_dedup)
        allocation = ranked | "Importance" >> ClusterImportance(settings, path, pool, tasks)
        placed = ranked | "Copies" >> AssignCopies(settings, seed, allocation)
        table = placed[TALLIES] | "Table" >> ClusterTable(allocation)
        for name, values in (("placements", placed[PLACEMENTS]), ("table", table)):
            (values | f"All_{name}" >> beam.combiners.ToList() | f"Keep_{name}" >> beam.Map(_keep, f"{folder}/{name}"))
    (placements, [rows_of_table]) = (_kept(f"{folder}/{name}") for name in ("placements", "table"))
    return sorted(placements), rows_of_table


def _keep(values: list[Any], path: str) -> None:
    with open(path, "wb") as file:
        pickle.dump(values, file)


def _kept(path: str) -> list[Any]:
    with open(path, "rb") as file:
        kept: list[Any] = pickle.load(file)
        return kept
