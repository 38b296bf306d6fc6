"""CIDS, cluster-importance-based data selection: clusters are weighted by their similarity to downstream tasks.

Paper: the weighting, and resampling the data to that distribution. Our choice: the exact estimators, priors,
temperature and task weights.
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
"""The key under which a file of task centroids stores the identity of its model."""

_ALLOWED_TASKS = "allowed: a .npz with float32 (m, d) centroids, m >= 1, under the name of each task"


def load_tasks(path: str) -> dict[str, np.ndarray]:
    """Read task centroids from the .npz at `path`, or from `bundled:tasks`.

    Returns, for each task name in sorted order, its centroids scaled to length 1, float32 (m, d). Keys that start with
    `__` (such as `__model__`) are metadata and are skipped. Nothing is unpickled. Raises ValueError with the file, the
    key and what is allowed.
    """
    with _opened(path) as file:
        arrays = {key: _task_array(file, key, path) for key in sorted(file.files) if not key.startswith("__")}
    if not arrays:
        raise ValueError(f"{path}: has no task; {_ALLOWED_TASKS}")
    widths = {key: array.shape[1] for key, array in arrays.items()}
    first, width = next(iter(widths.items()))
    for key, other in widths.items():
        if other != width:
            raise ValueError(
                f"{path}: {key}: {other} dimensions, but {first} has {width}; allowed: the same d for every task"
            )
    return arrays


def load_tasks_model(path: str) -> dict[str, Any] | None:
    """The identity (see `models.embedding_identity`) of the model that computed the task centroids at `path`.

    None if the file has no `__model__`. Raises ValueError if it is not an identity.
    """
    with _opened(path) as file:
        if MODEL_KEY not in file.files:
            return None
        try:
            return parse_identity(str(file[MODEL_KEY]))
        except (ValueError, RecursionError) as error:
            raise _TaskError(f"{path}: {MODEL_KEY}: {error}; `pairsift centroids` writes this key") from error


class _TaskError(ValueError):
    """An invalid entry in a file of task centroids."""


@contextlib.contextmanager
def _opened(path: str) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        with np.load(io.BytesIO(_read(path)), allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise _TaskError(f"{path}: is a single array; {_ALLOWED_TASKS}")
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
        raise _TaskError(f"{path}: {key}: is {array.dtype} {array.shape}; {_ALLOWED_TASKS}")
    if not np.isfinite(array).all() or not array.any(axis=1).all():
        raise _TaskError(f"{path}: {key}: a centroid is zero or not finite; allowed: finite vectors that are not zero")
    return unit_rows(array)


def task_similarity(centroids: np.ndarray, tasks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """s(t, c), the maximum over the centroids of task t of the cosine to the centroid of cluster c.

    Takes unit vectors: cluster centroids float32 (k, d) and, for each task, float32 (m, d). Returns float64 (k,) for
    each task name. Sums are taken in float64 in a fixed order, so the result does not depend on the number of threads.
    Raises ValueError if d differs.
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
    """p(t, c) of the assignment estimator: the share of the vectors of task t whose nearest centroid is that of c.

    Clusters with n_c = 0 are skipped. Returns float64 (k,) for each task name.
    """
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
            f"task {task} has {vectors.shape[1]} dimensions, the clusters have {centroids.shape[1]}: "
            "they come from different models"
        )


def likeness_shares(similarity: np.ndarray, sizes: np.ndarray, settings: CidsSettings) -> np.ndarray:
    """p(t, c) of the similarity estimator, for one task.

    Proportional to n_c·exp(s(t, c)/τ) with `prior: pool` and to exp(s(t, c)/τ) with `prior: uniform`; 0 where n_c = 0.
    Takes similarity float64 (k,) and sizes int64 (k,). Returns float64 (k,) with sum 1, or zeros if all n_c are 0.
    """
    filled = sizes > 0
    if not filled.any():
        return np.zeros(len(sizes))
    below_best = np.where(filled, similarity - similarity[filled].max(), 0.0)
    weights = np.where(filled, np.exp(below_best / settings.temperature), 0.0)  # at most 1, so no overflow
    return _normalised(weights * sizes if settings.prior == "pool" else weights)


def task_weights(tasks: Sequence[str], given: Mapping[str, float] | None) -> dict[str, float]:
    """The task weights w_t, scaled so that Σ_t w_t = 1.

    A task that `given` does not name has weight 0. Without `given` all weights are equal. Raises ValueError if
    `given` names an unknown task, or where all weights are 0.
    """
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
    """p(c) = Σ_t w_t·p(t, c), float64 (k,). Without tasks p(c) is proportional to n_c, as in the pool."""
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
    """Distribute the target over the clusters.

    Takes centroids float32 (k, d), sizes int64 (k,) (n_c) and `tasks` (see `load_tasks`; empty without `cids`).
    `pool_count` is the number of samples in the raw pool, `survivor_count` the number that no rule dropped. Raises
    `copies.UnreachableTargetError` if the cap is too low for the target.
    """
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
    """Pipeline → one element, the dict of task centroids: the side input of `ClusterImportance`."""

    def __init__(self, settings: CidsSettings) -> None:
        super().__init__()
        self.settings = settings

    def expand(self, pipeline: beam.Pipeline) -> beam.PCollection[dict[str, np.ndarray]]:
        return pipeline | "TasksPath" >> beam.Create([self.settings.tasks]) | "LoadTasks" >> beam.Map(load_tasks)


class ClusterImportance(beam.PTransform):
    """Ranked tiles → one `Allocation`.

    Side inputs, with one element each: `centroids_path`, `pool_count` (the number of samples in the raw pool) and
    `tasks` (see `load_tasks`; None without `cids`).
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
            raise ValueError("`tasks` and the section `cids` belong together: give both or neither")
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
