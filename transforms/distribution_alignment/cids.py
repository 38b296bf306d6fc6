"""CIDS, cluster-importance-based data selection: clusters count by their likeness to tasks.

Paper: clusters are weighted by their similarity to downstream tasks, and the data is resampled to
that distribution. Ours: the exact estimators, priors, temperature and task weights.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import apache_beam as beam
import numpy as np

from transforms.core.recipe import CidsSettings, DistributionAlignmentSettings
from transforms.distribution_alignment import copies, quality_duplication
from transforms.distribution_alignment.clusters import assign, load_centroids
from transforms.distribution_alignment.records import Allocation, RankedTile
from transforms.distribution_alignment.vectors import exact_products_with, unit_rows
from transforms.models.embedding_identity import parse_identity
from transforms.storage import files

MODEL_KEY = "__model__"
"""Under which a file of task centroids names its model."""

_ALLOWED_TASKS = "allowed: a .npz that holds float32 (m, d) centroids, m >= 1, under each task's name"


def load_tasks(path: str) -> dict[str, np.ndarray]:
    """Task name → its centroids as unit vectors, float32 (m, d), by name, from the .npz at `path`
    or `bundled:tasks`.

    Keys that start with `__` (`__model__`, …) are metadata and left out. Nothing in the file is
    unpickled. Raises ValueError, naming file, key and what is allowed.
    """
    with _opened(path) as file:
        arrays = {key: _task_array(file, key, path) for key in sorted(file.files) if not key.startswith("__")}
    if not arrays:
        raise ValueError(f"{path}: holds no task; {_ALLOWED_TASKS}")
    widths = {key: array.shape[1] for key, array in arrays.items()}
    first, width = next(iter(widths.items()))
    for key, other in widths.items():
        if other != width:
            raise ValueError(
                f"{path}: {key}: {other} dimensions, but {first} has {width}; allowed: the same d for every task"
            )
    return arrays


def load_tasks_model(path: str) -> dict[str, Any] | None:
    """The identity of the model that the task centroids at `path` were made with (see
    `models.embedding_identity`); None where the file does not say. Raises ValueError."""
    with _opened(path) as file:
        if MODEL_KEY not in file.files:
            return None
        try:
            return parse_identity(str(file[MODEL_KEY]))
        except (ValueError, RecursionError) as error:
            raise _TaskError(f"{path}: {MODEL_KEY}: {error}; `pairsift centroids` writes it") from error


class _TaskError(ValueError):
    """One entry of the file is not what is allowed."""


@contextlib.contextmanager
def _opened(path: str) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        with np.load(io.BytesIO(_read(path)), allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise _TaskError(f"{path}: holds a single array; {_ALLOWED_TASKS}")
            yield file
    except _TaskError:
        raise
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as task centroids ({error}); {_ALLOWED_TASKS}") from error


def _read(path: str) -> bytes:
    if path == "bundled:tasks":
        return resources.files("pipeline").joinpath("demo", "tasks.npz").read_bytes()
    return files.read_bytes(path)


def _task_array(file: np.lib.npyio.NpzFile, key: str, path: str) -> np.ndarray:
    try:
        array = file[key]
    except ValueError as error:
        raise _TaskError(f"{path}: {key}: cannot be read ({error}); {_ALLOWED_TASKS}") from error
    if array.dtype != np.float32 or array.ndim != 2 or 0 in array.shape:
        raise _TaskError(f"{path}: {key}: holds {array.dtype} {array.shape}; {_ALLOWED_TASKS}")
    if not np.isfinite(array).all() or not array.any(axis=1).all():
        raise _TaskError(f"{path}: {key}: a centroid is zero or not finite; allowed: vectors with a direction")
    return unit_rows(array)


def task_similarity(centroids: np.ndarray, tasks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """s(t, c) = max over task t's centroids of the cosine to the centroid of c: centroids float32
    (k, d), tasks float32 (m, d), both of length 1 → float64 (k,) by task name.

    Added up in float64 in a fixed order, which no number of threads changes. Raises ValueError
    where d differs.
    """
    similarities = {}
    for task, vectors in sorted(tasks.items()):
        best = np.full(len(centroids), -np.inf)
        _check_width(task, vectors, centroids)
        for vector in vectors:
            np.maximum(best, exact_products_with(centroids, vector), out=best)
        similarities[task] = best
    return similarities


def task_shares(centroids: np.ndarray, sizes: np.ndarray, tasks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """p(t, c) of the assignment estimator: the share of task t's vectors whose nearest centroid, of
    the clusters with n_c > 0, is c. float64 (k,) by task name."""
    filled = np.flatnonzero(sizes)
    shares = {}
    for task, vectors in sorted(tasks.items()):
        shares[task] = np.zeros(len(sizes))
        if len(filled):
            _check_width(task, vectors, centroids)
            nearest = assign(vectors, np.ascontiguousarray(centroids[filled]))
            shares[task][filled] = np.bincount(nearest, minlength=len(filled)) / len(vectors)
    return shares


def _check_width(task: str, vectors: np.ndarray, centroids: np.ndarray) -> None:
    if len(centroids) and vectors.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"task {task} has {vectors.shape[1]} dimensions, the clusters {centroids.shape[1]}: "
            "they come from different models"
        )


def likeness_shares(similarity: np.ndarray, sizes: np.ndarray, settings: CidsSettings) -> np.ndarray:
    """p(t, c) of the similarity estimator: ∝ n_c·exp(s(t, c)/τ) with `prior: pool`, ∝ exp(s(t, c)/τ)
    with `prior: uniform`, 0 where n_c = 0. similarity float64 (k,), sizes int64 (k,) →
    float64 (k,), its sum 1."""
    filled = sizes > 0
    if not filled.any():
        return np.zeros(len(sizes))
    below_best = np.where(filled, similarity - similarity[filled].max(), 0.0)
    weights = np.where(filled, np.exp(below_best / settings.temperature), 0.0)  # at most 1
    return _normalised(weights * sizes if settings.prior == "pool" else weights)


def task_weights(tasks: Sequence[str], given: Mapping[str, float] | None) -> dict[str, float]:
    """w_t, Σ_t w_t = 1: as given, 0 for a task not named there; equal where nothing is given.
    Raises ValueError at a name that is no task, or where all weigh 0."""
    if given is None:
        return {task: 1 / len(tasks) for task in sorted(tasks)}
    unknown = sorted(set(given) - set(tasks))
    if unknown:
        raise ValueError(f"cids.task_weights: unknown task {', '.join(unknown)}; allowed: {', '.join(sorted(tasks))}")
    total = math.fsum(given.values())
    if total <= 0:
        raise ValueError("cids.task_weights: every weight is 0; allowed: at least one above 0")
    return {task: given.get(task, 0.0) / total for task in sorted(tasks)}


def cluster_importance(sizes: np.ndarray, shares: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """p(c) = Σ_t w_t·p(t, c), float64 (k,). Without tasks p(c) ∝ n_c: the pool as it is."""
    if not shares:
        return _normalised(sizes.astype(np.float64))
    importance = np.zeros(len(sizes))
    for task in sorted(shares):
        importance += weights[task] * shares[task]
    return importance


def _normalised(weights: np.ndarray) -> np.ndarray:
    total = math.fsum(weights.tolist())
    return weights / total if total > 0 else weights


def allocate(
    settings: DistributionAlignmentSettings,
    centroids: np.ndarray,
    sizes: np.ndarray,
    tasks: Mapping[str, np.ndarray],
    pool_count: int,
    survivor_count: int,
) -> Allocation:
    """How the target is shared among the clusters: centroids float32 (k, d), sizes int64 (k,) =
    n_c, `tasks` empty without `cids`."""
    similarities = task_similarity(centroids, tasks)
    shares, weights = {}, {}
    if settings.cids is not None:
        weights = task_weights(list(tasks), settings.cids.task_weights)
        if settings.cids.estimator == "assignment":
            shares = task_shares(centroids, sizes, tasks)
        else:
            shares = {task: likeness_shares(s, sizes, settings.cids) for task, s in similarities.items()}
    importance = cluster_importance(sizes, shares, weights)
    quality = settings.quality_duplication or quality_duplication.WITHOUT
    target = copies.target_copies(settings.target, pool_count, survivor_count)
    scale = copies.solve_scale(target, importance, sizes, quality, settings.max_copies)
    factors = copies.scaled(scale, copies.share_of_each(importance, sizes, quality))
    return Allocation(sizes, similarities, importance, factors, target, scale)


class ReadTasks(beam.PTransform):
    """A pipeline → the task centroids as one dict in one element: the side input of
    `ClusterImportance`."""

    def __init__(self, settings: CidsSettings) -> None:
        super().__init__()
        self.settings = settings

    def expand(self, pipeline: beam.Pipeline) -> beam.PCollection[dict[str, np.ndarray]]:
        return pipeline | "TasksPath" >> beam.Create([self.settings.tasks]) | "LoadTasks" >> beam.Map(load_tasks)


class ClusterImportance(beam.PTransform):
    """Ranked tiles → one `Allocation`.

    `centroids_path` (one path), `pool_count` (one int: the samples of the raw pool) and `tasks`
    (one dict, see `load_tasks`; None without `cids`) are side inputs.
    """

    def __init__(
        self,
        settings: DistributionAlignmentSettings,
        centroids_path: beam.PCollection[str],
        pool_count: beam.PCollection[int],
        tasks: beam.PCollection[dict[str, np.ndarray]] | None = None,
    ) -> None:
        super().__init__()
        if (settings.cids is None) != (tasks is None):
            raise ValueError("`tasks` belongs to the section `cids`: give both or neither")
        self.settings, self.centroids_path, self.pool_count, self.tasks = (
            settings,
            centroids_path,
            pool_count,
            tasks,
        )

    def expand(self, tiles: beam.PCollection[RankedTile]) -> beam.PCollection[Allocation]:
        return (
            tiles
            | "CountMembers" >> beam.Map(_count_members)
            | "CountByCluster" >> beam.CombinePerKey(beam.combiners.TupleCombineFn(sum, sum))
            | "GatherCounts" >> beam.combiners.ToDict()
            | "Allocate"
            >> beam.Map(
                _allocate,
                self.settings,
                beam.pvalue.AsSingleton(self.centroids_path),
                beam.pvalue.AsSingleton(self.pool_count),
                {} if self.tasks is None else beam.pvalue.AsSingleton(self.tasks),
            )
        )


def _count_members(tile: RankedTile) -> tuple[int, tuple[int, int]]:
    return tile.cluster, (int((tile.ranks >= 0).sum()), int((tile.members.keepers == b"").sum()))


def _allocate(
    counts: Mapping[int, tuple[int, int]],
    settings: DistributionAlignmentSettings,
    centroids_path: str,
    pool_count: int,
    tasks: Mapping[str, np.ndarray],
) -> Allocation:
    centroids = load_centroids(centroids_path)
    sizes = np.zeros(len(centroids), np.int64)
    for cluster, (counted, _) in counts.items():
        sizes[cluster] = counted
    survivor_count = sum(surviving for _, surviving in counts.values())
    return allocate(settings, centroids, sizes, tasks, pool_count, survivor_count)
