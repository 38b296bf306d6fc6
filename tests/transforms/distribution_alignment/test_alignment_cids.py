"""Cluster importance: the formulas checked by hand, and their invariants."""

import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.core.recipe import (
    CidsSettings,
    DistributionAlignmentSettings,
    QualityDuplicationSettings,
    TargetSettings,
)
from transforms.distribution_alignment import copies, quality_duplication
from transforms.distribution_alignment.cids import (
    allocate,
    cluster_importance,
    likeness_shares,
    load_tasks,
    task_shares,
    task_similarity,
    task_weights,
)
from transforms.distribution_alignment.hashing import draw
from transforms.distribution_alignment.vectors import unit_rows

DOCUMENT = Path(__file__).parents[3] / "docs" / "distribution-alignment.md"
HALVING = 1 / math.log(2)  # at this temperature exp(s/τ) = 2^s


def shares_of(similarity, sizes, **options):
    return likeness_shares(np.array(similarity, float), np.array(sizes), CidsSettings(tasks="t.npz", **options))


def worked_example():
    """The two tables of the documented example, as a dict from the first cell of each row to its other cells."""
    text = DOCUMENT.read_text().split("## A worked example\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    starts = [number for number, row in enumerate(rows) if row[0].startswith("---")]
    ends = [starts[1] - 1, len(rows)]
    return [
        {row[0]: [Fraction(cell) for cell in row[1:]] for row in rows[start + 1 : end]}
        for start, end in zip(starts, ends, strict=True)
    ]


def test_the_documented_example_with_three_clusters_and_two_tasks():
    """Every number in the documented example equals the code's. Centroids and tasks are unit vectors along axes."""
    clusters, samples = worked_example()
    sizes = np.array([int(n) for n in clusters["n_c"]])
    axes = np.eye(3, dtype=np.float32)
    tasks = {"a": axes[:1], "b": axes[1:2]}
    weights = {"a": 3.0, "b": 1.0}
    quality = QualityDuplicationSettings(w1=1.0, w2=3.0)
    rule = DistributionAlignmentSettings(
        target=TargetSettings(samples=7),
        max_copies=100.0,
        cids=CidsSettings(tasks="t.npz", temperature=HALVING, task_weights=weights),
        quality_duplication=quality,
    )
    found = allocate(rule, axes, sizes, tasks, 0, 7)
    for task in tasks:
        likeness = clusters[f"n_c · exp(s({task}, c)/τ)"]
        assert found.similarities[task].tolist() == clusters[f"s({task}, c)"]
        assert [n * 2**s for n, s in zip(clusters["n_c"], clusters[f"s({task}, c)"], strict=True)] == likeness
        assert [cell / sum(likeness) for cell in likeness] == clusters[f"p({task}, c)"]
        shares = likeness_shares(found.similarities[task], sizes, rule.cids)
        assert shares == pytest.approx(floats(clusters[f"p({task}, c)"]), rel=1e-14)
    importance = clusters["p(c) = 3/4 · p(a, c) + 1/4 · p(b, c)"]
    assert sum(importance) == 1
    assert found.importance == pytest.approx(floats(importance), rel=1e-14)
    assert clusters["Σ E = 7 · p(c)"] == [7 * p for p in importance]
    assert found.scale == pytest.approx(7, rel=1e-14)  # no cap binds: λ = N

    capped = allocate(rule.model_copy(update={"max_copies": 1.5}), axes, sizes, tasks, 0, 7)
    assert capped.scale == pytest.approx(1452 / 199, rel=1e-14)
    assert "1452/199" in DOCUMENT.read_text()
    expected, whole = [], []
    for number, (cluster, rank, w, e, u, copies_, e_capped, copies_capped) in samples.items():
        c, uids = int(cluster), np.array([f"{int(number):032x}".encode()])
        place = np.array([int(rank)]), int(sizes[c]), quality
        assert quality_duplication.weights(*place) == pytest.approx(floats([w]), rel=1e-15)
        assert draw("copies", 0, uids[0].decode()) == pytest.approx(float(u), abs=5e-4)
        for allocation, cap, e_, n in ((found, 100.0, e, copies_), (capped, 1.5, e_capped, copies_capped)):
            of_code = copies.expected_copies(float(allocation.factors[c]), *place, cap)
            assert of_code == pytest.approx(floats([e_]), rel=1e-14)
            assert copies.whole_copies(of_code, 0, uids).tolist() == [n]
        expected.append(e)
        whole.append(copies_)
    for c, total in enumerate(clusters["Σ E = 7 · p(c)"]):
        assert sum(e for e, row in zip(expected, samples.values(), strict=True) if row[0] == c) == total
    assert sum(expected) == 7 and sum(whole) == 8
    assert 4 * math.sqrt(sum(e % 1 * (1 - e % 1) for e in expected)) == pytest.approx(4.7, abs=0.05)


def floats(fractions):
    return [float(fraction) for fraction in fractions]


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


def test_empty_clusters_are_skipped_even_if_similar_to_a_task():
    assert shares_of([9, 0, 0], [0, 2, 1], temperature=0.001).tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    assert shares_of([9, 0, 0], [0, 2, 1], prior="uniform").tolist() == [0, 0.5, 0.5]
    assert shares_of([1, 1], [0, 0]).tolist() == [0, 0]
    assert shares_of([], []).shape == (0,)


def test_a_low_temperature_does_not_overflow():
    assert shares_of([1, -1], [1, 1], temperature=1e-5).tolist() == [1, 0]


def test_without_tasks_importance_is_that_of_the_pool():
    assert cluster_importance(np.array([3, 0, 1]), {}, {}).tolist() == [0.75, 0, 0.25]
    assert cluster_importance(np.array([0, 0]), {}, {}).tolist() == [0, 0]


def test_assignment_counts_task_vectors_in_clusters_with_samples():
    centroids = np.eye(3, dtype=np.float32)
    vectors = unit_rows(np.array([[9, 1, 0], [9, 0, 1], [9, 1, 0], [0, 0, 9]], np.float32))
    full = task_shares(centroids, np.array([1, 1, 1]), {"t": vectors})
    assert full["t"].tolist() == [0.75, 0, 0.25]
    first_empty = task_shares(centroids, np.array([0, 5, 1]), {"t": vectors})
    assert first_empty["t"].tolist() == [0, 0.5, 0.5]  # each is assigned to the next nearest
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
    options = CidsSettings(tasks="t.npz", prior=prior, temperature=tau)
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
def test_with_prior_pool_splitting_a_cluster_changes_no_share_of_a_sample(clusters, first):
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
def test_a_higher_task_weight_raises_the_clusters_that_the_task_prefers(clusters, low, high):
    low, high = sorted((low, high))
    before, shares = importance_of(clusters, weight=low)
    after, _ = importance_of(clusters, weight=high)
    liked = shares["a"] >= before
    assert (after[liked] >= before[liked] - 1e-15).all()


POOLS = st.builds(
    lambda seed, sizes: (
        unit_rows(np.random.default_rng(seed).normal(size=(len(sizes), 5))),
        np.array(sizes),
        {name: unit_rows(np.random.default_rng([seed, m]).normal(size=(m, 5))) for m, name in enumerate("abc", 1)},
    ),
    st.integers(0, 10_000),
    st.lists(st.sampled_from([0, 1, 2, 3, 40]), min_size=1, max_size=7).filter(any),
)
"""Centroids, sizes, tasks."""
ESTIMATORS = st.sampled_from([("similarity", "pool"), ("similarity", "uniform"), ("assignment", "pool")])


def allocated(pool, estimator=("similarity", "pool"), weights=None, cap=10.0, target=None, w2=1.0, fill=0.3):
    """The allocation of a given target, else of the share `fill` of what the cap allows; and Σ E by cluster."""
    centroids, sizes, tasks = pool
    name, prior = estimator
    quality = QualityDuplicationSettings(w1=1.0, w2=w2)
    cids = CidsSettings(tasks="t.npz", estimator=name, prior=prior, task_weights=weights)
    if target is None:
        reachable = (
            sizes if name == "similarity" else sizes * (allocated(pool, estimator, weights, target=0)[0].importance > 0)
        )
        target = int(fill * cap * reachable.sum())
    rule = DistributionAlignmentSettings(
        target=TargetSettings(samples=target), max_copies=cap, cids=cids, quality_duplication=quality
    )
    found = allocate(rule, centroids, sizes, tasks, 0, int(sizes.sum()))
    totals = [
        math.fsum(copies.expected_copies(float(factor), np.arange(n), int(n), quality, cap))
        for factor, n in zip(found.factors, sizes, strict=True)
    ]
    return found, np.array(totals)


@given(pool=POOLS, estimator=ESTIMATORS, w2=st.sampled_from([1.0, 3.0]), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_order_of_clusters_and_tasks_does_not_change_a_bit(pool, estimator, w2, data):
    centroids, sizes, tasks = pool
    one, _ = allocated(pool, estimator, cap=2.0, w2=w2)
    order = data.draw(st.permutations(range(len(sizes))))
    names = data.draw(st.permutations(sorted(tasks)))
    other, _ = allocated(
        (centroids[order], sizes[order], {name: tasks[name] for name in names}), estimator, cap=2.0, w2=w2
    )
    assert (other.target, other.scale) == (one.target, one.scale)
    assert other.importance.tobytes() == one.importance[order].tobytes()
    assert other.factors.tobytes() == one.factors[order].tobytes()
    for task in tasks:
        assert other.similarities[task].tobytes() == one.similarities[task][order].tobytes()


@given(
    pool=POOLS, estimator=ESTIMATORS, cap=st.sampled_from([1.0, 1.5, 10.0]), fill=st.floats(0, 1), w2=st.floats(1, 3)
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_expected_copies_sum_to_the_target_below_the_cap(pool, estimator, cap, fill, w2):
    found, totals = allocated(pool, estimator, cap=cap, fill=fill, w2=w2)
    assert math.fsum(totals) == pytest.approx(found.target, rel=1e-9, abs=1e-12)
    assert (totals <= cap * pool[1] * (1 + 1e-12)).all()


@given(pool=POOLS, first=st.integers(0, 40), cap=st.sampled_from([1.0, 1.5, 10.0]), fill=st.floats(0.05, 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_with_prior_pool_splitting_a_cluster_and_its_centroid_changes_no_expectation(pool, first, cap, fill):
    centroids, sizes, tasks = pool
    first = min(first, int(sizes[0]))
    parts = np.concatenate([[first, sizes[0] - first], sizes[1:]])
    target = int(fill * cap * sizes.sum())
    whole, _ = allocated(pool, cap=cap, target=target)
    split, _ = allocated((np.concatenate([centroids[:1], centroids]), parts, tasks), cap=cap, target=target)
    before, after = np.minimum(cap, whole.factors), np.minimum(cap, split.factors)
    for part in range(2):
        if parts[part]:
            assert after[part] == pytest.approx(before[0], rel=1e-9)
    assert after[2:] == pytest.approx(before[1:], rel=1e-9)


@given(pool=POOLS, estimator=ESTIMATORS, low=st.floats(0, 10), more=st.floats(0, 10))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_without_a_binding_cap_a_task_weight_lowers_no_share_of_its_preferred_clusters(pool, estimator, low, more):
    others = {"b": 1.0, "c": 2.0}
    before, totals_before = allocated(pool, estimator, {"a": low, **others}, cap=1e6, target=100)
    _, totals_after = allocated(pool, estimator, {"a": low + more, **others}, cap=1e6, target=100)
    alone, _ = allocated(pool, estimator, {"a": 1.0}, cap=1e6, target=100)
    assert before.scale == pytest.approx(100)  # no cap binds
    liked = alone.importance >= before.importance
    assert (totals_after[liked] >= totals_before[liked] - 1e-9).all()
    assert (totals_after[~liked] <= totals_before[~liked] + 1e-9).all()


def test_tasks_with_other_dimensions_raise_with_the_task_name():
    with pytest.raises(ValueError, match="task digits has 3 dimensions, the clusters have 2"):
        task_similarity(np.eye(2, dtype=np.float32), {"digits": np.eye(3, dtype=np.float32)})


def test_without_clusters_there_is_no_importance():
    rule = DistributionAlignmentSettings(target=TargetSettings(pool_share=0.2), cids=CidsSettings(tasks="t.npz"))
    nothing = np.empty((0, 0), np.float32)
    for estimator in ("similarity", "assignment"):
        cids = CidsSettings(tasks="t.npz", estimator=estimator)
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
        ({}, "has no task"),
        ({"__model__": "m"}, "has no task"),
        ({"t": np.eye(2)}, r"t: is float64 \(2, 2\)"),
        ({"t": np.ones(2, np.float32)}, r"t: is float32 \(2,\)"),
        ({"t": np.empty((0, 2), np.float32)}, r"t: is float32 \(0, 2\)"),
        ({"t": np.zeros((1, 2), np.float32)}, "t: a centroid is zero"),
        ({"t": np.full((1, 2), np.nan, np.float32)}, "t: a centroid is zero or not finite"),
        ({"t": np.array([[Bomb()]])}, "t: cannot be read"),
        ({"s": np.ones((1, 2), np.float32), "t": np.ones((1, 3), np.float32)}, "t: 3 dim.* s has 2"),
    ],
)
def test_invalid_tasks_raise_with_their_name(tmp_path, monkeypatch, arrays, complaint):
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "tasks.npz")
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=complaint) as error:
        load_tasks(path)
    assert str(error.value).startswith(path)
    assert "allowed: " in str(error.value)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("content", [None, b"", b"junk", b"PK\x03\x04junk"])
def test_a_file_without_tasks_raises_with_its_path(tmp_path, content):
    path = tmp_path / "tasks.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as task centroids") as error:
        load_tasks(str(path))
    assert str(path) in str(error.value)


def test_a_single_array_is_not_a_valid_file_of_tasks(tmp_path):
    np.save(tmp_path / "tasks.npy", np.eye(2, dtype=np.float32))
    with pytest.raises(ValueError, match=r"tasks\.npy: .*allowed: a \.npz"):
        load_tasks(str(tmp_path / "tasks.npy"))
