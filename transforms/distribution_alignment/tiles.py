"""Tiles: the members of a cluster, best first, in pieces that fit into a worker's memory.

Our choice. The boundaries of the tiles of a large cluster are computed from the sort keys alone; then each row is sent
directly to its tile. No worker ever has all embeddings of a large cluster in memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton
from apache_beam.utils.shared import Shared

from transforms.distribution_alignment.records import Candidates, CandidateShard, RankKeys, best_first
from transforms.distribution_alignment.work_folder import (
    MEMBER_COLUMNS,
    EmbeddingSlice,
    WorkFolder,
    read_arrays,
    write_arrays,
)
from transforms.storage import files

TILE_ROWS = 8192


class Ranges:
    """The tile boundaries of the clusters with more than one tile.

    clusters int64 (m,): the cluster of each boundary, ascending; cosines float32 (m,), uids bytes (m,): the sort key
    of the first row of tile 1, 2, … of that cluster.
    """

    def __init__(self, clusters: np.ndarray, cosines: np.ndarray, uids: np.ndarray) -> None:
        self.clusters, self.cosines, self.uids = clusters, cosines, uids

    def tiles(self, cluster: int) -> int:
        """The number of tiles of a cluster."""
        first, end = np.searchsorted(self.clusters, [cluster, cluster + 1])
        return int(end - first) + 1

    def tile_of(self, cluster: int, cosines: np.ndarray, uids: np.ndarray) -> np.ndarray:
        """The tile, int64 (n,), of members with the sort keys `cosines` float32 (n,) and `uids` bytes (n,)."""
        first, end = np.searchsorted(self.clusters, [cluster, cluster + 1])
        tiles = np.zeros(len(uids), np.int64)
        for cosine, uid in zip(self.cosines[first:end], self.uids[first:end], strict=True):
            tiles += (cosines < cosine) | ((cosines == cosine) & (uids >= uid))
        return tiles


def read_ranges(path: str) -> Ranges:
    """The ranges that `FindRanges` wrote at `path`."""
    return Ranges(*read_arrays(path, ["clusters", "cosines", "uids"]))


class FindRanges(beam.PTransform):
    """(cluster, sort keys of some members) → one element, the path of the `Ranges`."""

    def __init__(self, work: WorkFolder) -> None:
        super().__init__()
        self.work = work

    def expand(self, keys: beam.PCollection[tuple[int, RankKeys]]) -> beam.PCollection[str]:
        return (
            keys
            | "Group keys" >> beam.GroupByKey()
            | "Tile beginnings" >> beam.FlatMap(_boundaries)
            | "All beginnings" >> beam.combiners.ToList()
            | "Write ranges" >> beam.Map(_write_ranges, self.work)
        )


class _Boundaries(NamedTuple):
    cluster: int
    keys: RankKeys


def _boundaries(group: tuple[int, Iterable[RankKeys]]) -> Iterator[_Boundaries]:
    cluster, parts = group
    keys = RankKeys.joined(parts)
    if len(keys) > TILE_ROWS:
        yield _Boundaries(cluster, keys.take(best_first(keys.cosines, keys.uids)[TILE_ROWS::TILE_ROWS]))


def _write_ranges(found: Sequence[_Boundaries], work: WorkFolder) -> str:
    empty = _Boundaries(-1, RankKeys(np.empty(0, np.float32), np.empty(0, "S32")))
    ordered = [empty, *sorted(found, key=lambda boundaries: boundaries.cluster)]
    keys = RankKeys.joined(boundaries.keys for boundaries in ordered)
    clusters = np.concatenate([np.full(len(b.keys), b.cluster, np.int64) for b in ordered])
    write_arrays(work.ranges, {"clusters": clusters, "cosines": keys.cosines, "uids": keys.uids})
    return work.ranges


@dataclasses.dataclass(frozen=True, eq=False)
class TilePart:
    """The members of a tile that come from one shard, best first.

    uids and shards bytes (n,); cosines and digits float32 (n,); embeddings float16 (n, d), or their location.
    """

    uids: np.ndarray
    shards: np.ndarray
    cosines: np.ndarray
    digits: np.ndarray
    embeddings: np.ndarray | EmbeddingSlice

    def load(self) -> Candidates:
        """The members with their embeddings in memory."""
        embeddings = self.embeddings.read() if isinstance(self.embeddings, EmbeddingSlice) else self.embeddings
        return Candidates(self.uids, self.shards, self.cosines, self.digits, embeddings)


class ToTiles(beam.PTransform):
    """Candidate shards with assigned clusters → ((cluster, tile), parts of the tile).

    With a local work folder, embeddings do not go through the shuffle but are read from disk, because the local runner
    keeps several copies of shuffled data in memory. With a remote work folder they do go through the shuffle: a shuffle
    service keeps them on disk, and small reads from Cloud Storage are slow.
    """

    def __init__(self, work: WorkFolder, ranges_path: beam.PCollection[str]) -> None:
        super().__init__()
        self.work, self.ranges_path = work, ranges_path

    def expand(
        self, shards: beam.PCollection[CandidateShard]
    ) -> beam.PCollection[tuple[tuple[int, int], Iterable[TilePart]]]:
        return (
            shards
            | "Rows by tile" >> beam.ParDo(_RowsByTile(self.work), AsSingleton(self.ranges_path))
            | "Gather tile" >> beam.GroupByKey()
        )


@beam.typehints.with_output_types(tuple[tuple[int, int], TilePart])
class _RowsByTile(beam.DoFn):
    def __init__(self, work: WorkFolder) -> None:
        self._work, self._shared = work, Shared()

    def process(self, shard: CandidateShard, ranges_path: str) -> Iterator[tuple[tuple[int, int], TilePart]]:
        ranges = self._shared.acquire(lambda: read_ranges(ranges_path), tag=ranges_path)
        clusters, uids, shards, cosines, digits = read_arrays(self._work.members(shard.shard), MEMBER_COLUMNS)
        embeddings = _Embeddings(self._work.embeddings(shard.shard), len(uids))
        for start, end in _runs(clusters):
            cluster = int(clusters[start])
            tiles = ranges.tile_of(cluster, cosines[start:end], uids[start:end])
            for first, last in _runs(tiles):
                rows = slice(start + first, start + last)
                part = TilePart(uids[rows], shards[rows], cosines[rows], digits[rows], embeddings.of(rows))
                yield (cluster, int(tiles[first])), part


def _runs(ascending: np.ndarray) -> list[tuple[int, int]]:
    """The (start, end) of each run of equal values."""
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]]).tolist()
    return list(zip(starts, [*starts[1:], len(ascending)], strict=True))


class _Embeddings:
    """The embeddings of a shard's members: in memory, or as slices of a local file."""

    def __init__(self, path: str, rows: int) -> None:
        self._path, self._local = path, not files.in_cloud_storage(path)
        content = b"" if self._local else files.read_bytes(path)
        size_bytes = os.path.getsize(path) if self._local else len(content)
        self._dimensions = size_bytes // 2 // rows
        self._rows = np.frombuffer(content, "<f2").reshape(-1, self._dimensions)

    def of(self, rows: slice) -> np.ndarray | EmbeddingSlice:
        if self._local:
            return EmbeddingSlice(self._path, rows.start, rows.stop, self._dimensions)
        return self._rows[rows]
