"""Cluster importance: the formulas by hand, and what must not change them."""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recipe import Cids, DistributionAlignment, QualityDuplication, Target
from transforms.distribution_alignment import copies
from transforms.distribution_alignment.cids import (
    allocate,
    cluster_importance,
    likeness_shares,
    load_tasks,
    task_shares,
    task_similarity,
    task_weights,
)
from transforms.distribution_alignment.vectors import unit_rows

HALVING = 1 / math.log(2)  # at this temperature exp(s/τ) = 2^s


def shares_of(similarity, sizes, **options):
    return likeness_shares(np.array(similarity, float), np.array(sizes), Cids(tasks="t.npz", **options))


def test_three_clusters_and_two_tasks_worked_by_hand():
    """Centroids and tasks lie on the axes, so s is 1 or 0, and at τ = 1/ln 2 exp(s/τ) is 2 or 1.

    p(a, ·) ∝ (4·2, 2·1, 1·1), p(b, ·) ∝ (4·1, 2·2, 1·1); with weights ¾ and ¼, p = ¾·(8, 2, 1)/11 + ¼·(4, 4, 1)/9.
    """
    settings_ = DistributionAlignment(
        target=Target(samples=7),
        max_copies=100.0,
        cids=Cids(tasks="t.npz", temperature=HALVING, task_weights={"a": 3.0, "b": 1.0}),
        quality_duplication=QualityDuplication(w1=1.0, w2=3.0),
    )
    axes = np.eye(3, dtype=np.float32)
    found = allocate(settings_, axes, np.array([4, 2, 1]), {"a": axes[:1], "b": axes[1:2]}, 0, 7)
    p = [Fraction(3, 4) * Fraction(a, 11) + Fraction(1, 4) * Fraction(b, 9) for a, b in [(8, 4), (2, 4), (1, 1)]]
    assert found.similarities["a"].tolist() == [1, 0, 0]
    assert found.similarities["b"].tolist() == [0, 1, 0]
    assert found.importance == pytest.approx([float(x) for x in p], rel=1e-14)
    assert found.scale == pytest.approx(7, rel=1e-14)  # no cap binds: λ = N
    # w̄ = 2; the ranks of the cluster of 4 weigh 1, 5/3, 7/3, 3
    quality = settings_.quality_duplication
    first = [copies.expected_copies(found.factors[0], rank, 4, quality, 100.0) for rank in range(4)]
    by_hand = [7 * p[0] / 4 * w / 2 for w in (1, Fraction(5, 3), Fraction(7, 3), 3)]
    assert first == pytest.approx([float(x) for x in by_hand], rel=1e-14)
    alone = copies.expected_copies(found.factors[2], 0, 1, quality, 100.0)
    assert alone == pytest.approx(float(7 * p[2]), rel=1e-14)


def test_similarity_is_the_best_cosine_over_a_tasks_centroids():
    centroids = unit_rows(np.array([[1, 0], [3, 4], [0, -1]], np.float32))
    tasks = {"axes": np.array([[1, 0], [0, 1]], np.float32), "x": np.array([[1, 0]], np.float32)}
    found = task_similarity(centroids, tasks)
    assert found["axes"] == pytest.approx([1, 0.8, 0], abs=1e-7)
    assert found["x"] == pytest.approx([1, 0.6, 0], abs=1e-7)
    assert found["x"].dtype == np.float64


def test_priors():
    assert shares_of([1, 0, 0], [3, 2, 1], temperature=HALVING) == pytest.approx([6 / 9, 2 / 9, 1 / 9])
    uniform = shares_of([1, 0, 0], [3, 2, 1], temperature=HALVING, prior="uniform")
    assert uniform == pytest.approx([2 / 4, 1 / 4, 1 / 4])


def test_empty_clusters_are_skipped_however_alike():
    assert shares_of([9, 0, 0], [0, 2, 1], temperature=0.001).tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    assert shares_of([9, 0, 0], [0, 2, 1], prior="uniform").tolist() == [0, 0.5, 0.5]
    assert shares_of([1, 1], [0, 0]).tolist() == [0, 0]
    assert shares_of([], []).shape == (0,)


def test_a_low_temperature_does_not_overflow():
    assert shares_of([1, -1], [1, 1], temperature=1e-5).tolist() == [1, 0]


def test_without_tasks_importance_is_the_pools_own():
    assert cluster_importance(np.array([3, 0, 1]), {}, {}).tolist() == [0.75, 0, 0.25]
    assert cluster_importance(np.array([0, 0]), {}, {}).tolist() == [0, 0]


def test_assignment_counts_a_tasks_vectors_in_the_clusters_that_hold_samples():
    centroids = np.eye(3, dtype=np.float32)
    vectors = unit_rows(np.array([[9, 1, 0], [9, 0, 1], [9, 1, 0], [0, 0, 9]], np.float32))
    full = task_shares(centroids, np.array([1, 1, 1]), {"t": vectors})
    assert full["t"].tolist() == [0.75, 0, 0.25]
    first_empty = task_shares(centroids, np.array([0, 5, 1]), {"t": vectors})
    assert first_empty["t"].tolist() == [0, 0.5, 0.5]  # each goes to the next nearest
    assert task_shares(centroids, np.zeros(3, int), {"t": vectors})["t"].tolist() == [0, 0, 0]


def test_task_weights():
    assert task_weights(["b", "a"], None) == {"a": 0.5, "b": 0.5}
    assert task_weights(["b", "a"], {"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}
    assert task_weights(["b", "a"], {"b": 2.0}) == {"a": 0.0, "b": 1.0}
    with pytest.raises(ValueError, match="unknown task c, d; allowed: a, b"):
        task_weights(["b", "a"], {"c": 1.0, "a": 1.0, "d": 0.0})
    with pytest.raises(ValueError, match="every weight is 0"):
        task_weights(["a"], {"a": 0.0})


CLUSTERS = st.lists(st.tuples(st.integers(0, 50), st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=8)


def importance_of(clusters, weight=0.5, prior="pool", tau=0.1):
    sizes, a, b = (np.array(column) for column in zip(*clusters, strict=True))
    options = Cids(tasks="t.npz", prior=prior, temperature=tau)
    shares = {"a": likeness_shares(a, sizes, options), "b": likeness_shares(b, sizes, options)}
    return cluster_importance(sizes, shares, {"a": weight, "b": 1 - weight}), shares


@given(clusters=CLUSTERS, prior=st.sampled_from(["pool", "uniform"]), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_importance_is_a_distribution_and_permutes_with_the_clusters(clusters, prior, data):
    importance, _ = importance_of(clusters, prior=prior)
    sizes = np.array([size for size, _, _ in clusters])
    assert math.fsum(importance) == pytest.approx(float(sizes.any()), abs=1e-12)
    assert not importance[sizes == 0].any()
    order = data.draw(st.permutations(range(len(clusters))))
    permuted, _ = importance_of([clusters[i] for i in order], prior=prior)
    assert permuted.tolist() == importance[order].tolist()


@given(clusters=CLUSTERS, first=st.integers(0, 50))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_with_prior_pool_splitting_a_cluster_changes_no_samples_share(clusters, first):
    size, a, b = clusters[0]
    first = min(first, size)
    before, _ = importance_of(clusters)
    after, _ = importance_of([(first, a, b), (size - first, a, b), *clusters[1:]])
    assert after[:2].sum() == pytest.approx(before[0], rel=1e-12)
    assert after[2:] == pytest.approx(before[1:], rel=1e-12)
    if 0 < first < size:
        assert after[0] / first == pytest.approx(before[0] / size, rel=1e-12)


@given(clusters=CLUSTERS, low=st.floats(0, 1), high=st.floats(0, 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_tasks_weight_raises_the_clusters_it_likes_better_than_the_rest(clusters, low, high):
    low, high = sorted((low, high))
    before, shares = importance_of(clusters, weight=low)
    after, _ = importance_of(clusters, weight=high)
    liked = shares["a"] >= before
    assert (after[liked] >= before[liked] - 1e-15).all()


def test_tasks_in_another_order_change_not_one_bit():
    rng = np.random.default_rng(0)
    centroids = unit_rows(rng.normal(size=(7, 5)))
    tasks = {name: unit_rows(rng.normal(size=(2, 5))) for name in "abcde"}
    rule = DistributionAlignment(target=Target(samples=9), cids=Cids(tasks="t.npz"))
    sizes = np.arange(7)
    one = allocate(rule, centroids, sizes, tasks, 0, 21)
    other = allocate(rule, centroids, sizes, dict(reversed(tasks.items())), 0, 21)
    assert one.factors.tobytes() == other.factors.tobytes()


def test_tasks_of_another_model_are_named():
    with pytest.raises(ValueError, match="task digits has 3 dimensions, the clusters 2"):
        task_similarity(np.eye(2, dtype=np.float32), {"digits": np.eye(3, dtype=np.float32)})


def test_no_clusters_no_importance():
    rule = DistributionAlignment(target=Target(pool_share=0.2), cids=Cids(tasks="t.npz"))
    nothing = np.empty((0, 0), np.float32)
    for estimator in ("similarity", "assignment"):
        cids = Cids(tasks="t.npz", estimator=estimator)
        found = allocate(
            rule.model_copy(update={"cids": cids}),
            nothing,
            np.zeros(0, int),
            {"t": np.eye(3, dtype=np.float32)},
            pool_count=1000,
            survivor_count=0,
        )
        assert (found.target, found.scale, found.factors.shape) == (0, 0, (0,))


def test_tasks_are_read_by_name_as_unit_vectors_without_metadata(tmp_path):
    path = str(tmp_path / "tasks.npz")
    np.savez(path, b=2 * np.eye(2, dtype=np.float32), a=np.ones((1, 2), np.float32), __model__="m")
    tasks = load_tasks(path)
    assert list(tasks) == ["a", "b"]
    assert tasks["b"].tolist() == [[1, 0], [0, 1]]
    assert tasks["a"] == pytest.approx(np.full((1, 2), 0.5**0.5))


def test_bundled_tasks_come_with_the_package(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    np.savez(tmp_path / "demo" / "tasks.npz", t=np.eye(2, dtype=np.float32))
    monkeypatch.setattr("importlib.resources.files", {"pipeline": tmp_path}.__getitem__)
    assert list(load_tasks("bundled:tasks")) == ["t"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({}, "holds no task"),
        ({"__model__": "m"}, "holds no task"),
        ({"t": np.eye(2)}, r"t: holds float64 \(2, 2\)"),
        ({"t": np.ones(2, np.float32)}, r"t: holds float32 \(2,\)"),
        ({"t": np.empty((0, 2), np.float32)}, r"t: holds float32 \(0, 2\)"),
        ({"t": np.zeros((1, 2), np.float32)}, "t: a centroid is zero"),
        ({"t": np.full((1, 2), np.nan, np.float32)}, "t: a centroid is zero or not finite"),
        ({"t": np.array([[Bomb()]])}, "t: cannot be read"),
        ({"s": np.ones((1, 2), np.float32), "t": np.ones((1, 3), np.float32)}, "t: 3 dim.* s has 2"),
    ],
)
def test_tasks_that_cannot_be_used_are_named(tmp_path, monkeypatch, arrays, complaint):
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "tasks.npz")
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=complaint) as error:
        load_tasks(path)
    assert str(error.value).startswith(path)
    assert "allowed: " in str(error.value)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("content", [None, b"", b"junk", b"PK\x03\x04junk"])
def test_a_file_that_holds_no_tasks_is_named(tmp_path, content):
    path = tmp_path / "tasks.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as task centroids") as error:
        load_tasks(str(path))
    assert str(path) in str(error.value)


def test_a_single_array_is_not_a_file_of_tasks(tmp_path):
    np.save(tmp_path / "tasks.npy", np.eye(2, dtype=np.float32))
    with pytest.raises(ValueError, match=r"tasks\.npy: .*allowed: a \.npz"):
        load_tasks(str(tmp_path / "tasks.npy"))
