"""Semantic deduplication: of samples whose embeddings nearly coincide, the best stays.

Paper: semantic duplicates within a cluster go (SemDeDup, arXiv 2303.09540). Ours: the rank, the
exact definition and the tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
import numpy as np

from pipeline.recipe import SemanticDedup as Settings
from transforms.distribution_alignment.records import Member, RankedMember
from transforms.distribution_alignment.vectors import NEAR, exact_products, stored_units

_TILE_ROWS = 1024


def semantic_duplicates(units: np.ndarray, epsilon: float, tile_rows: int = _TILE_ROWS) -> np.ndarray:
    """For each row, the best-ranked better row with cosine > 1 - `epsilon`, -1 where there is none.

    units: float32 (n, d) of length 1, best rank first; an array or a memory map. Returns int64
    (n,). The better row may itself be a duplicate. Products come in tiles of `tile_rows` square, so
    memory is bounded; those within 1e-4 of the threshold are judged again in float64 in a fixed
    order, so the result does not depend on the tiles.
    """
    threshold = 1.0 - epsilon
    keepers = np.full(len(units), -1, np.int64)
    for column_start in range(0, len(units), tile_rows):
        pending = np.arange(column_start, min(column_start + tile_rows, len(units)))
        columns = units[pending]
        for row_start in range(0, column_start + 1, tile_rows):  # best rows first: the first hit is the keeper
            rows = units[row_start : row_start + tile_rows]
            products = rows @ columns.T
            if row_start == column_start:  # only a better row can keep
                products[np.arange(len(rows))[:, None] + row_start >= pending] = -np.inf
            if products.max() < threshold - NEAR:
                continue
            first = _first_above(products, rows, columns, threshold)
            found = first >= 0
            keepers[pending[found]] = row_start + first[found]
            pending = pending[~found]
            if len(pending) == 0:
                break
            columns = units[pending]
    return keepers


def _first_above(products: np.ndarray, rows: np.ndarray, columns: np.ndarray, threshold: float) -> np.ndarray:
    """For each column of `products`, the first row above `threshold`, -1 where there is none."""
    sure = products > threshold + NEAR
    first = np.where(sure.any(axis=0), sure.argmax(axis=0), len(rows))
    doubtful = (products >= threshold - NEAR) & ~sure & (np.arange(len(rows))[:, None] < first)
    open_columns = np.flatnonzero(doubtful.any(axis=0))
    while len(open_columns):  # one doubtful pair of each column at a time: bounded memory, and most end at once
        candidates = doubtful[:, open_columns].argmax(axis=0)
        above = exact_products(rows[candidates], columns[open_columns]) > threshold
        first[open_columns[above]] = candidates[above]
        doubtful[candidates, open_columns] = False
        open_columns = open_columns[~above]
        open_columns = open_columns[doubtful[:, open_columns].any(axis=0)]
    return np.where(first < len(rows), first, -1)


def ranked(members: Iterable[Member]) -> list[Member]:
    """Members best first: higher flipped-CLIP cosine, then smaller uid. Raises ValueError at a
    cosine that is NaN."""
    members = list(members)
    for member in members:
        if member.flipped_clip_cosine != member.flipped_clip_cosine:
            raise ValueError(f"sample {member.uid} of {member.shard}: flipped_clip_cosine is not a number")
    return sorted(members, key=_rank_key)


def _rank_key(member: Member) -> tuple[float, str]:
    return -member.flipped_clip_cosine, member.uid


class SemanticDedup(beam.PTransform):
    """Members → ranked members, each with its rank and the size of its cluster.

    A duplicate is not counted, unless `after_duplication`. Without settings nothing is a duplicate.
    """

    def __init__(self, settings: Settings | None) -> None:
        super().__init__()
        self.settings = settings

    def expand(self, members: beam.PCollection[Member]) -> beam.PCollection[RankedMember]:
        return (
            members
            | "KeyByCluster" >> beam.Map(_keyed)
            | "GroupByCluster" >> beam.GroupByKey()
            | "RankAndDedup" >> beam.FlatMap(_rank_cluster, self.settings)
        )


def _keyed(member: Member) -> tuple[int, Member]:
    return member.cluster, member


def _rank_cluster(group: tuple[int, Iterable[Member]], settings: Settings | None) -> Iterator[RankedMember]:
    cluster, members = group
    ordered = ranked(members)
    keepers = _keepers(ordered, settings)
    counts_all = settings is None or settings.after_duplication
    counted = [counts_all or not keeper for keeper in keepers]
    size = sum(counted)
    rank = size
    for member, keeper, counts in zip(ordered, keepers, counted, strict=True):
        rank -= counts
        yield RankedMember(
            member.uid,
            member.shard,
            member.digit_probability,
            cluster,
            keeper,
            rank if counts else -1,
            size,
        )


def _keepers(ordered: Sequence[Member], settings: Settings | None) -> list[str]:
    if settings is None:
        return [""] * len(ordered)
    units = stored_units([member.embedding for member in ordered])
    keepers = semantic_duplicates(units, settings.epsilon).tolist()
    return [ordered[keeper].uid if keeper >= 0 else "" for keeper in keepers]
