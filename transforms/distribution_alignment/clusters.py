"""Clusters: spherical k-means on a sample chosen by hash, then assignment by inner product.

Paper: the data is clustered by k-means over image embeddings. Our choice: the sample, the two levels, the seeds and the
treatment of ties, so that clusters depend only on the candidates, the seed and the settings.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import apache_beam as beam
import faiss
import numpy as np
from apache_beam.pvalue import AsSingleton
from apache_beam.utils.shared import Shared

from transforms.core.recipe import ClustersSettings
from transforms.distribution_alignment.hashing import draw
from transforms.distribution_alignment.records import CandidateShard, RankKeys
from transforms.distribution_alignment.vectors import NEAR, exact_products, unit_rows
from transforms.distribution_alignment.work_folder import MEMBER_COLUMNS, WorkFolder, read_candidates, write_arrays
from transforms.storage import files

_TRAINING_THREADS = 1  # with more threads the last bits of sums vary, and k-means amplifies the difference
_BATCH_ROWS = 1024
_BLOCK_CENTROIDS = 16_384
_PAIRS_AT_ONCE = 4096


def train_centroids(embeddings: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    """Spherical k-means over unit vectors float32 (n, d) → unit centroids float32 (k, d).

    k = min(count, number of distinct rows). Where there are at most `count` distinct rows, they are the centroids, in
    order of appearance. faiss repairs an empty cluster by splitting a large one. The result depends on the order of the
    rows, so pass them in an order that depends only on their identity. n = 0 gives (0, d).
    """
    first_rows: dict[bytes, int] = {}
    for index, row in enumerate(embeddings):
        first_rows.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), index)
    if len(first_rows) <= count:
        return embeddings[list(first_rows.values())]
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(_TRAINING_THREADS)
    try:
        kmeans = faiss.Kmeans(
            embeddings.shape[1],
            count,
            niter=iterations,
            seed=seed % 2**31,  # faiss seeds are 32-bit
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=len(embeddings),  # train on all rows: the caller has sampled already
        )
        kmeans.train(embeddings)
    finally:
        faiss.omp_set_num_threads(threads)
    centroids = unit_rows(np.asarray(kmeans.centroids))
    return centroids[centroids.any(axis=1)]  # a centroid is zero where its members cancel out


def assign(units: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The index of the centroid with the largest inner product: units float32 (n, d), centroids float32 (k, d) → int64
    (n,).

    Centroids within 1e-4 of the best are compared again in float64 in a fixed order, and ties go to the smaller index,
    so the cluster of a row does not depend on its batch. Raises ValueError if there is no centroid or d differs.
    """
    if len(units) == 0:
        return np.empty(0, np.int64)
    if len(centroids) == 0:
        raise ValueError("cannot assign embeddings: there are no centroids")
    if units.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"embeddings have {units.shape[1]} dimensions, centroids have {centroids.shape[1]}: "
            "they come from different models"
        )
    blocks = range(0, len(units), _BATCH_ROWS)
    return np.concatenate([_assign_block(units[start : start + _BATCH_ROWS], centroids) for start in blocks])


def _assign_block(units: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    best = np.full(len(units), -np.inf, np.float32)
    contenders = []
    for start in range(0, len(centroids), _BLOCK_CENTROIDS):
        products = units @ centroids[start : start + _BLOCK_CENTROIDS].T
        np.maximum(best, products.max(axis=1), out=best)
        rows, columns = np.nonzero(products >= best[:, None] - NEAR)
        contenders.append((rows, columns + start, products[rows, columns]))
    rows, columns, near = (np.concatenate(parts) for parts in zip(*contenders, strict=True))
    kept = near >= best[rows] - NEAR
    rows, columns = rows[kept], columns[kept]

    judged = np.zeros(len(rows))
    contested = np.flatnonzero(np.bincount(rows, minlength=len(units))[rows] > 1)
    for start in range(0, len(contested), _PAIRS_AT_ONCE):
        pairs = contested[start : start + _PAIRS_AT_ONCE]
        judged[pairs] = exact_products(units[rows[pairs]], centroids[columns[pairs]])
    order = np.lexsort((columns, -judged, rows))
    firsts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    return columns[order][firsts].astype(np.int64)


def load_centroids(path: str) -> np.ndarray:
    """The centroids float32 (k, d) in the .npy at `path`. A local file is memory-mapped.

    Raises ValueError, with the path, if the file is not a valid `clusters.centroids`.
    """
    allowed = "allowed: a .npy of float32 (k, d) with rows of length 1"
    try:
        if files.in_cloud_storage(path):
            centroids = np.load(io.BytesIO(files.read_bytes(path)))
        else:
            centroids = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {allowed}") from error
    if not isinstance(centroids, np.ndarray) or centroids.ndim != 2 or centroids.dtype != np.float32:
        got = f"{centroids.dtype} {centroids.shape}" if isinstance(centroids, np.ndarray) else "several arrays"
        raise ValueError(f"{path}: is {got}; {allowed}")
    lengths = np.sqrt(np.einsum("ij,ij->i", centroids, centroids))
    if not np.all(np.abs(lengths - 1) < 1e-3):
        row = int(np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))[0])
        raise ValueError(f"{path}: row {row} has length {lengths[row]:g}; {allowed}")
    return centroids


def write_centroids(path: str, centroids: np.ndarray) -> str:
    """Write `centroids` to a .npy at `path` atomically. Returns `path`."""
    with files.write_aside(path) as file:
        np.save(file, centroids, allow_pickle=False)
    return path


class TrainCentroids(beam.PTransform):
    """Candidate shards → one element, the path of the centroids.

    Trains on about `samples_per_cluster` candidates for each cluster, those with the smallest hash(seed, uid), and
    writes the centroids to `output_path`. Where the settings name centroids, their path is returned and nothing is
    trained. With more than one first-level cluster, each of them is then clustered independently, in parallel. Without
    candidates the file has shape (0, 0).
    """

    def __init__(self, settings: ClustersSettings, seed: int, work: WorkFolder, output_path: str) -> None:
        super().__init__()
        self.settings, self.seed, self.work, self.output_path = settings, seed, work, output_path

    def expand(self, shards: beam.PCollection[CandidateShard]) -> beam.PCollection[str]:
        settings, work = self.settings, self.work
        if settings.centroids is not None:
            return shards.pipeline | "Given centroids" >> beam.Create([settings.centroids])
        total = shards | "Counts" >> beam.Map(_count) | "Add counts" >> beam.CombineGlobally(sum)
        rows = shards | "Choose rows" >> beam.FlatMap(_chosen, settings, self.seed, work, AsSingleton(total))
        if settings.first_level == 1:
            return rows | "Train" >> _TrainOne(settings, self.seed, settings.count, self.output_path)

        few = rows | "Choose fewer" >> beam.FlatMap(_fewer, settings, AsSingleton(total))
        coarse = few | "Train coarse" >> _TrainOne(settings, self.seed, settings.first_level, work.coarse_centroids)
        parts = rows | "Coarse cluster" >> beam.FlatMap(_by_coarse, AsSingleton(coarse))
        sizes = parts | "Size" >> beam.Map(_size) | "Add sizes" >> beam.CombinePerKey(sum) | beam.combiners.ToDict()
        trained = (
            parts
            | "Gather coarse cluster" >> beam.GroupByKey()
            | "Train fine" >> beam.Map(_train_fine, settings, self.seed, work, AsSingleton(sizes))
        )
        return trained | "All fine" >> beam.combiners.ToList() | "Join" >> beam.Map(_join, work, self.output_path)


class TrainingRows(NamedTuple):
    """Rows to train on: draws float64 (n,), the hash of each row; uids bytes (n,); embeddings float16 (n, d)."""

    draws: np.ndarray
    uids: np.ndarray
    embeddings: np.ndarray


def _count(shard: CandidateShard) -> int:
    return shard.samples


def _chosen(
    shard: CandidateShard, settings: ClustersSettings, seed: int, work: WorkFolder, total: int
) -> Iterator[TrainingRows]:
    candidates = read_candidates(work.candidates(shard.shard))
    draws = np.array([draw("clusters", seed, uid.decode()) for uid in candidates.uids.tolist()])
    kept = draws < settings.samples_per_cluster * settings.count / max(total, 1)
    if kept.any():
        yield TrainingRows(draws[kept], candidates.uids[kept], candidates.embeddings[kept])


def _fewer(rows: TrainingRows, settings: ClustersSettings, total: int) -> Iterator[TrainingRows]:
    kept = rows.draws < settings.samples_per_cluster * settings.first_level / max(total, 1)
    if kept.any():
        yield TrainingRows(*(column[kept] for column in rows))


class _TrainOne(beam.PTransform):
    """Training rows → the path of `count` centroids, trained by one worker."""

    def __init__(self, settings: ClustersSettings, seed: int, count: int, path: str) -> None:
        super().__init__()
        self.settings, self.seed, self.count, self.path = settings, seed, count, path

    def expand(self, rows: beam.PCollection[TrainingRows]) -> beam.PCollection[str]:
        return (
            rows
            | "Gather" >> beam.combiners.ToList()
            | "Train and write" >> beam.Map(_train, self.settings, self.seed, self.count, self.path)
        )


def _train(parts: Sequence[TrainingRows], settings: ClustersSettings, seed: int, count: int, path: str) -> str:
    return write_centroids(path, train_centroids(_units_in_order(parts), count, settings.iterations, seed))


def _units_in_order(parts: Sequence[TrainingRows]) -> np.ndarray:
    """Unit vectors float32 (n, d), sorted by hash, so that the order does not depend on the order of shards."""
    if not parts:
        return np.empty((0, 0), np.float32)
    draws, uids, embeddings = (np.concatenate(column) for column in zip(*parts, strict=True))
    return unit_rows(embeddings[np.lexsort((uids, draws))])


def _by_coarse(rows: TrainingRows, coarse_path: str) -> Iterator[tuple[int, TrainingRows]]:
    clusters = assign(unit_rows(rows.embeddings), load_centroids(coarse_path))
    for cluster in np.unique(clusters).tolist():
        yield cluster, TrainingRows(*(column[clusters == cluster] for column in rows))


def _size(part: tuple[int, TrainingRows]) -> tuple[int, int]:
    cluster, rows = part
    return cluster, len(rows.draws)


def fine_counts(sizes: Mapping[int, int], count: int) -> dict[int, int]:
    """The number of fine clusters in each coarse cluster, in proportion to its number of training rows (`sizes`).

    Every coarse cluster gets at least 1. What rounding leaves of `count` goes to the largest remainders, ties to the
    smaller cluster number.
    """
    total = sum(sizes.values())
    shares = {coarse: size * count // total for coarse, size in sizes.items()}
    counts = {coarse: max(1, share) for coarse, share in shares.items()}
    by_remainder = sorted(sizes, key=lambda coarse: (-(sizes[coarse] * count % total), coarse))
    lifted = set([coarse for coarse in by_remainder if shares[coarse]][: max(0, count - sum(counts.values()))])
    return {coarse: number + (coarse in lifted) for coarse, number in counts.items()}


def _train_fine(
    group: tuple[int, Iterable[TrainingRows]],
    settings: ClustersSettings,
    seed: int,
    work: WorkFolder,
    sizes: Mapping[int, int],
) -> int:
    coarse, parts = group
    _train(list(parts), settings, seed, fine_counts(sizes, settings.count)[coarse], work.fine_centroids(coarse))
    return coarse


def _join(coarse_clusters: Sequence[int], work: WorkFolder, path: str) -> str:
    """Concatenate the fine centroids in the order of their coarse clusters, with one part in memory at a time."""
    parts = [work.fine_centroids(coarse) for coarse in sorted(coarse_clusters)]
    shapes = [load_centroids(part).shape for part in parts]
    header = io.BytesIO()
    shape = (sum(rows for rows, _ in shapes), shapes[0][1] if shapes else 0)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with files.write_aside(path) as file:
        file.write(header.getvalue())
        for part in parts:
            file.write(np.ascontiguousarray(load_centroids(part)).tobytes())
    return path


class AssignClusters(beam.PTransform):
    """Candidate shards → (cluster, sort keys of its members in the shard).

    Also writes the rows of each shard to the work folder, sorted by cluster (`WorkFolder.members`). `centroids_path` is
    the output of `TrainCentroids`. Each process loads the centroids once.
    """

    def __init__(self, work: WorkFolder, centroids_path: beam.PCollection[str]) -> None:
        super().__init__()
        self.work, self.centroids_path = work, centroids_path

    def expand(self, shards: beam.PCollection[CandidateShard]) -> beam.PCollection[tuple[int, RankKeys]]:
        return shards | "Nearest" >> beam.ParDo(_AssignShard(self.work), AsSingleton(self.centroids_path))


@beam.typehints.with_output_types(tuple[int, RankKeys])
class _AssignShard(beam.DoFn):
    def __init__(self, work: WorkFolder) -> None:
        self._work, self._shared = work, Shared()

    def process(self, shard: CandidateShard, centroids_path: str) -> Iterator[tuple[int, RankKeys]]:
        centroids = self._shared.acquire(functools.partial(load_centroids, centroids_path), tag=centroids_path)
        candidates = read_candidates(self._work.candidates(shard.shard))
        clusters = assign(unit_rows(candidates.embeddings), centroids)
        order = np.lexsort((candidates.uids, -candidates.cosines, clusters))
        clusters, candidates = clusters[order], candidates.take(order)
        columns = {"clusters": clusters, **dict(candidates.columns())}
        files.write_bytes(self._work.embeddings(shard.shard), candidates.embeddings.tobytes())
        write_arrays(self._work.members(shard.shard), {name: columns[name] for name in MEMBER_COLUMNS})
        for cluster, members in RankKeys(candidates.cosines, candidates.uids).groups(clusters):
            yield int(cluster), members
