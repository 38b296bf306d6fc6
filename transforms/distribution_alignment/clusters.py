"""Clusters: spherical k-means on a hash-chosen sample, then assignment by inner product.

Paper: the data is clustered by k-means over image embeddings. Ours: the sample, the seeds and how
ties are judged, so that the clusters depend on nothing but the candidates, the seed and the
settings.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterator, Sequence

import apache_beam as beam
import faiss
import numpy as np
from apache_beam.io.filesystems import FileSystems
from apache_beam.utils.shared import Shared

from pipeline import files
from pipeline.recipe import Clusters
from transforms.distribution_alignment.hashing import draw
from transforms.distribution_alignment.records import Candidate, Member
from transforms.distribution_alignment.vectors import NEAR, exact_products, stored_units, unit_rows

_TRAINING_THREADS = 1  # sums taken by several threads end in other last bits, and k-means magnifies them
_BATCH_ROWS = 1024
_BLOCK_CENTROIDS = 16_384
_PAIRS_AT_ONCE = 4096


def train_centroids(embeddings: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    """Spherical k-means over unit vectors float32 (n, d) → unit centroids float32 (k, d).

    k = min(count, distinct rows); where every distinct row can have a cluster of its own, the rows
    themselves are the centroids, in order of appearance. Empty clusters are repaired by faiss,
    which splits a large one. The result depends on the order of the rows: give them in one that
    identity decides. n = 0 gives (0, d).
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
            max_points_per_centroid=len(embeddings),  # all rows given train: the caller has sampled
        )
        kmeans.train(embeddings)
    finally:
        faiss.omp_set_num_threads(threads)
    centroids = unit_rows(np.asarray(kmeans.centroids))
    return centroids[centroids.any(axis=1)]  # members that cancel out leave no direction


def assign(units: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The centroid with the largest inner product: unit vectors float32 (n, d), centroids float32
    (k, d) → int64 (n,).

    Centroids within 1e-4 of the best are judged again in float64 in a fixed order, equal ones go to
    the smaller index; so a row's cluster does not depend on its batch. Raises ValueError where
    there is no centroid or d differs.
    """
    if len(units) == 0:
        return np.empty(0, np.int64)
    if len(centroids) == 0:
        raise ValueError("there are no centroids to assign to")
    if units.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"embeddings have {units.shape[1]} dimensions, centroids {centroids.shape[1]}: "
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
    """The centroids float32 (k, d) of the .npy at `path`; a local file is memory-mapped, not read.

    Raises ValueError, naming the file, where it is not what `Clusters.centroids` allows.
    """
    allowed = "allowed: a .npy of float32 (k, d) with rows of length 1"
    try:
        if FileSystems.get_scheme(path) is None:
            centroids = np.load(path, mmap_mode="r")
        else:
            with FileSystems.open(path) as file:
                centroids = np.load(io.BytesIO(file.read()))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {allowed}") from error
    if not isinstance(centroids, np.ndarray) or centroids.ndim != 2 or centroids.dtype != np.float32:
        got = f"{centroids.dtype} {centroids.shape}" if isinstance(centroids, np.ndarray) else "several arrays"
        raise ValueError(f"{path}: holds {got}; {allowed}")
    lengths = np.sqrt(np.einsum("ij,ij->i", centroids, centroids))
    if not np.all(np.abs(lengths - 1) < 1e-3):
        row = int(np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))[0])
        raise ValueError(f"{path}: row {row} has length {lengths[row]:g}; {allowed}")
    return centroids


def write_centroids(path: str, centroids: np.ndarray) -> str:
    """Writes the .npy at `path`, whole or not at all; returns `path`."""
    with files.write_aside(path) as file:
        np.save(file, centroids, allow_pickle=False)
    return path


class TrainCentroids(beam.PTransform):
    """Candidates → the path of the centroids, in one element.

    Trains on the `training_samples` candidates with the smallest hash(seed, uid), and writes
    `output_path`; where the settings name centroids, gives that path and trains nothing. Without
    candidates the file holds an array of (0, 0).
    """

    def __init__(self, settings: Clusters, seed: int, output_path: str) -> None:
        super().__init__()
        self.settings, self.seed, self.output_path = settings, seed, output_path

    def expand(self, candidates: beam.PCollection[Candidate]) -> beam.PCollection[str]:
        if self.settings.centroids is not None:
            return candidates.pipeline | "GivenCentroids" >> beam.Create([self.settings.centroids])
        return (
            candidates
            | "HashCandidates" >> beam.Map(_hashed, self.seed)
            | "SmallestHashes" >> beam.combiners.Top.Smallest(self.settings.training_samples)
            | "TrainAndWrite" >> beam.Map(_train, self.settings, self.seed, self.output_path)
        )


def _hashed(candidate: Candidate, seed: int) -> tuple[float, str, bytes]:
    return draw("clusters", seed, candidate.uid), candidate.uid, candidate.embedding


def _train(sample: Sequence[tuple[float, str, bytes]], settings: Clusters, seed: int, output_path: str) -> str:
    units = stored_units([embedding for _, _, embedding in sample])
    return write_centroids(output_path, train_centroids(units, settings.count, settings.iterations, seed))


class AssignClusters(beam.PTransform):
    """Candidates → members of the cluster whose centroid is nearest. `centroids_path` is
    `TrainCentroids`' output; the centroids are loaded once a process."""

    def __init__(self, centroids_path: beam.PCollection[str]) -> None:
        super().__init__()
        self.centroids_path = centroids_path

    def expand(self, candidates: beam.PCollection[Candidate]) -> beam.PCollection[Member]:
        return (
            candidates
            | "BatchCandidates" >> beam.BatchElements(min_batch_size=_BATCH_ROWS, max_batch_size=_BATCH_ROWS)
            | "Nearest" >> beam.ParDo(_AssignBatch(), beam.pvalue.AsSingleton(self.centroids_path))
        )


class _AssignBatch(beam.DoFn):
    def __init__(self) -> None:
        self._shared = Shared()

    def process(self, batch: Sequence[Candidate], centroids_path: str) -> Iterator[Member]:
        load = functools.partial(load_centroids, centroids_path)
        centroids = self._shared.acquire(load, tag=centroids_path)
        clusters = assign(stored_units([candidate.embedding for candidate in batch]), centroids)
        for candidate, cluster in zip(batch, clusters.tolist(), strict=True):
            yield Member(*candidate, cluster=cluster)
