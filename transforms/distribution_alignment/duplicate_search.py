"""Semantic deduplication: of samples with nearly equal embeddings, the best-ranked is kept.

Paper: semantic duplicates within a cluster are dropped (SemDeDup, arXiv 2303.09540). Our choice: the rank, the exact
definition, the tiles, and the bound that avoids most products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton
from apache_beam.utils.shared import Shared

from transforms.distribution_alignment.records import Candidates, Judged, RankedTile
from transforms.distribution_alignment.semantic_dedup import SemanticDedupSettings
from transforms.distribution_alignment.tiles import TilePart, read_ranges
from transforms.distribution_alignment.vectors import NEAR, exact_products, unit_rows
from transforms.distribution_alignment.work_folder import WorkFolder, read_arrays, read_candidates, write_candidates

_BLOCK_ROWS = 1024
_HEAD_SHARE = 4  # the bound uses a quarter of the dimensions
_FEW_PAIRS = 512  # up to this many pairs of a block, exact products cost less than the full matrix product
_TRIALS = 16  # blocks for which the bound is tried before its success rate counts


def semantic_duplicates(units: np.ndarray, epsilon: float, block_rows: int = _BLOCK_ROWS) -> np.ndarray:
    """For each row, the index of the best-ranked better row with cosine > 1 - `epsilon`, -1 where there is none.

    Takes unit vectors float32 (n, d), best rank first. Returns int64 (n,). The better row may itself be a duplicate.
    """
    return TileDuplicates(units, epsilon, block_rows).against_itself(0)


class TileDuplicates:
    """Finds the duplicates in one tile: first against the better tiles, best first, then against the tile itself.

    Takes unit vectors float32 (n, d), best rank first. Products are computed in blocks of `block_rows` x `block_rows`,
    so memory is bounded. Products within 1e-4 of the threshold are computed again in float64 in a fixed order, so the
    result does not depend on tiles or blocks.

    Most blocks have no duplicate, and a bound proves it at a fraction of the cost. With the dimensions split into a
    head and a tail, x·y ≤ x_head·y_head + |x_tail|·|y_tail| (Cauchy-Schwarz): one product of the heads, with the length
    of the tail as an extra dimension. The head consists of the dimensions with the largest squared sum over this tile;
    any choice gives the same result. A bound that keeps failing is no longer tried, which affects only the cost.
    """

    def __init__(self, units: np.ndarray, epsilon: float, block_rows: int = _BLOCK_ROWS) -> None:
        self._units, self._block_rows = units, block_rows
        self._threshold = 1.0 - epsilon
        self._keepers = np.full(len(units), -1, np.int64)
        self._pending = [
            np.arange(start, min(start + block_rows, len(units))) for start in range(0, len(units), block_rows)
        ]
        energy = np.einsum("ij,ij->j", units, units)
        self._head = np.sort(np.argsort(-energy, kind="stable")[: -(-units.shape[1] // _HEAD_SHARE)])
        self._bounds = self._bound_rows(units)
        self._bounds_tried = self._products_avoided = 0

    def against(self, better: np.ndarray, first_row: int) -> None:
        """Look for keepers among the rows of a better tile, float32 (m, d), numbered from `first_row`."""
        bounds = self._bound_rows(better)
        for start in range(0, len(better), self._block_rows):
            rows = slice(start, start + self._block_rows)
            for number, pending in enumerate(self._pending):
                if len(pending):
                    self._pending[number] = self._judge(better[rows], bounds[rows], pending, first_row + start)

    def against_itself(self, first_row: int) -> np.ndarray:
        """Look for keepers among the tile's own better rows, numbered from `first_row`.

        Returns the number of the keeper of each row, -1 where there is none: int64 (n,).
        """
        for number, columns in enumerate(self._pending):
            pending = columns
            for start in range(0, (number + 1) * self._block_rows, self._block_rows):
                if len(pending) == 0:
                    break
                rows = slice(start, start + self._block_rows)
                pending = self._judge(self._units[rows], self._bounds[rows], pending, first_row + start, own=start)
        return self._keepers

    def _bound_rows(self, units: np.ndarray) -> np.ndarray:
        """The head of each row and the length of its tail, float32 (n, h + 1)."""
        head = units[:, self._head]
        tail = 1.0 - np.einsum("ij,ij->i", head, head)
        return np.column_stack([head, np.sqrt(np.maximum(tail, 0.0))])

    def _judge(
        self, rows: np.ndarray, bounds: np.ndarray, pending: np.ndarray, first_row: int, own: int | None = None
    ) -> np.ndarray:
        """Record the keepers that rows of `pending` have among `rows`. Returns the rows of `pending` without one.

        `own` is given where `rows` are this tile's own rows from that index on; then only better rows can be keepers.
        """
        first = self._first_by_bound(rows, bounds, pending, own)
        if first is None:
            products = rows @ self._units[pending].T
            if own is not None:
                products[_not_better(len(rows), pending, own)] = -np.inf
            first = _first_above(products, rows, self._units[pending], self._threshold)
        found = first >= 0
        self._keepers[pending[found]] = first_row + first[found]
        return pending[~found]

    def _first_by_bound(
        self, rows: np.ndarray, bounds: np.ndarray, pending: np.ndarray, own: int | None
    ) -> np.ndarray | None:
        """The first row above the threshold for each of `pending`, -1 where there is none: int64 (len(pending),).

        None where the bound leaves too many pairs undecided.
        """
        if self._bounds_tried >= _TRIALS and 4 * self._products_avoided < self._bounds_tried:
            return None
        self._bounds_tried += 1
        bound = bounds @ self._bounds[pending].T
        first = np.full(len(pending), -1)
        if bound.max() >= self._threshold - NEAR:
            doubtful = bound >= self._threshold - NEAR
            if own is not None:
                doubtful &= ~_not_better(len(rows), pending, own)
            if np.count_nonzero(doubtful) > _FEW_PAIRS:
                return None
            better, columns = np.nonzero(doubtful)
            above = exact_products(rows[better], self._units[pending[columns]]) > self._threshold
            # Pairs are in row order, so `np.unique` finds the first row of each column.
            settled, places = np.unique(columns[above], return_index=True)
            first[settled] = better[above][places]
        self._products_avoided += 1
        return first


def _not_better(count: int, pending: np.ndarray, own: int) -> np.ndarray:
    """True where row `own` + i of the tile is not better than the pending row: bool (count, len(pending))."""
    return np.arange(own, own + count)[:, None] >= pending


def _first_above(products: np.ndarray, rows: np.ndarray, columns: np.ndarray, threshold: float) -> np.ndarray:
    """The first row above `threshold` in each column of `products`, -1 where there is none."""
    if products.max() < threshold - NEAR:
        return np.full(len(columns), -1)
    sure = products > threshold + NEAR
    first = np.where(sure.any(axis=0), sure.argmax(axis=0), len(rows))
    doubtful = (products >= threshold - NEAR) & ~sure & (np.arange(len(rows))[:, None] < first)
    open_columns = np.flatnonzero(doubtful.any(axis=0))
    while len(open_columns):  # one doubtful pair of each column at a time: memory is bounded, and one usually decides
        candidates = doubtful[:, open_columns].argmax(axis=0)
        above = exact_products(rows[candidates], columns[open_columns]) > threshold
        first[open_columns[above]] = candidates[above]
        doubtful[candidates, open_columns] = False
        open_columns = open_columns[~above]
        open_columns = open_columns[doubtful[:, open_columns].any(axis=0)]
    return np.where(first < len(rows), first, -1)


class SemanticDedup(beam.PTransform):
    """((cluster, tile), parts of the tile) → ranked tiles.

    The only tile of a small cluster is judged at once. The tiles of a large cluster are written to the work folder;
    when all of them are there, each is judged against the better ones, in parallel, with two tiles in memory at a time.
    Duplicates get no rank, unless `after_duplication` is set. Without settings nothing is a duplicate.
    """

    _LARGE = "large"

    def __init__(
        self, settings: SemanticDedupSettings | None, work: WorkFolder, ranges_path: beam.PCollection[str]
    ) -> None:
        super().__init__()
        self.settings, self.work, self.ranges_path = settings, work, ranges_path

    def expand(self, tiles: beam.PCollection) -> beam.PCollection[RankedTile]:
        judge = _JudgeTile(self.settings, self.work)
        judged = tiles | "Judge small" >> beam.ParDo(judge, AsSingleton(self.ranges_path)).with_outputs(
            self._LARGE, main="small"
        )
        large = (
            judged[self._LARGE]
            | "Tiles are there" >> beam.GroupByKey()
            | "Each tile" >> beam.FlatMap(_each_tile)
            | "Spread tiles" >> beam.Reshuffle()
            | "Judge large" >> beam.Map(_judge_large, self.settings, self.work)
        )
        counts_all = self.settings is None or self.settings.after_duplication
        return (
            (judged["small"], large)
            | "All judged" >> beam.Flatten()
            | "Gather cluster" >> beam.GroupByKey()
            | "Rank" >> beam.FlatMap(_rank, counts_all)
        )


_ClusterTile = tuple[int, tuple[int, Judged]]


class _JudgeTile(beam.DoFn):
    def __init__(self, settings: SemanticDedupSettings | None, work: WorkFolder) -> None:
        self._settings, self._work, self._shared = settings, work, Shared()

    def process(
        self, group: tuple[tuple[int, int], Iterable[TilePart]], ranges_path: str
    ) -> Iterator[_ClusterTile | beam.pvalue.TaggedOutput]:
        (cluster, tile), parts = group
        members = Candidates.joined(part.load() for part in parts).best_first()
        ranges = self._shared.acquire(lambda: read_ranges(ranges_path), tag=ranges_path)
        if self._settings is None:
            yield cluster, (tile, _judged(members, np.full(len(members), b"", "S32")))
        elif ranges.tiles(cluster) == 1:
            numbers = semantic_duplicates(unit_rows(members.embeddings), self._settings.epsilon)
            yield cluster, (tile, _judged(members, np.where(numbers >= 0, members.uids[numbers], b"")))
        else:
            write_candidates(self._work.tile(cluster, tile), members)
            yield beam.pvalue.TaggedOutput(SemanticDedup._LARGE, (cluster, tile))


def _each_tile(group: tuple[int, Iterable[int]]) -> Iterator[tuple[int, int]]:
    cluster, tiles = group
    return ((cluster, tile) for tile in sorted(tiles))


def _judge_large(place: tuple[int, int], settings: SemanticDedupSettings, work: WorkFolder) -> _ClusterTile:
    cluster, tile = place
    members = read_candidates(work.tile(cluster, tile))
    duplicates = TileDuplicates(unit_rows(members.embeddings), settings.epsilon)
    uids = np.empty(0, members.uids.dtype)
    for better in range(tile):
        better_uids, embeddings = read_arrays(work.tile(cluster, better), ["uids", "embeddings"])
        duplicates.against(unit_rows(embeddings), first_row=len(uids))
        uids = np.concatenate([uids, better_uids])
    numbers = duplicates.against_itself(first_row=len(uids))
    uids = np.concatenate([uids, members.uids])
    return cluster, (tile, _judged(members, np.where(numbers >= 0, uids[numbers], b"")))


def _judged(members: Candidates, keepers: np.ndarray) -> Judged:
    return Judged(members.uids, members.shards, members.digits, keepers)


def _rank(group: tuple[int, Iterable[tuple[int, Judged]]], counts_all: bool) -> Iterator[RankedTile]:
    """The ranks of the members of a cluster. There are no embeddings here, only about 80 bytes for each member."""
    cluster, tiles = group
    counted = {tile: np.ones(len(rows), bool) if counts_all else rows.keepers == b"" for tile, rows in tiles}
    size = sum(int(counts.sum()) for counts in counted.values())
    for tile, rows in tiles:
        better = sum(int(counts.sum()) for other, counts in counted.items() if other < tile)
        ranks = np.where(counted[tile], size - better - np.cumsum(counted[tile]), -1)
        yield RankedTile(cluster, rows, ranks, size)
