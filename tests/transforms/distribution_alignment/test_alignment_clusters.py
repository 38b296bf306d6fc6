"""Clusters: training does not depend on threads, and assignment does not depend on batches."""

import apache_beam as beam
import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transforms.distribution_alignment.alignment_graph import lay_out, make_candidates
from transforms.core.recipe import ClustersSettings
from transforms.distribution_alignment.clusters import (
    TrainCentroids,
    assign,
    fine_counts,
    load_centroids,
    train_centroids,
    write_centroids,
)
from transforms.distribution_alignment.hashing import draw
from transforms.distribution_alignment.records import CandidateShard
from transforms.distribution_alignment.vectors import exact_products, unit_rows
from transforms.distribution_alignment.work_folder import WorkFolder


def random_units(n: int, d: int, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).normal(size=(n, d)).astype(np.float16))


def test_no_trained_cluster_mixes_planted_clusters():
    centres = np.eye(5, 8)
    labels = np.arange(200) % 5
    noise = np.random.default_rng(0).normal(scale=0.05, size=(200, 8))
    units = unit_rows(centres[labels] + noise)
    centroids = train_centroids(units, count=20, iterations=20, seed=1)
    found = assign(units, centroids)
    assert centroids.dtype == np.float32
    assert np.linalg.norm(centroids, axis=1) == pytest.approx(np.ones(20), abs=1e-6)
    assert len(set(zip(found.tolist(), labels.tolist(), strict=True))) == len(set(found.tolist())) == 20


def test_training_does_not_depend_on_the_thread_setting_and_restores_it():
    units = random_units(3000, 64)
    threads = faiss.omp_get_max_threads()
    results = []
    try:
        for around in (1, 2):
            faiss.omp_set_num_threads(around)
            results.append(train_centroids(units, 40, 8, seed=3))
            assert faiss.omp_get_max_threads() == around
    finally:
        faiss.omp_set_num_threads(threads)
    assert np.array_equal(results[0], results[1])


def test_seeds_matter_and_may_be_large():
    units = random_units(400, 8)
    first, other = (train_centroids(units, 10, 3, seed) for seed in (0, 2**40 + 1))
    assert not np.array_equal(first, other)


def test_fewer_distinct_rows_than_clusters_become_the_centroids():
    rows = random_units(3, 4)
    units = rows[[0, 1, 0, 2, 1, 0]]
    assert np.array_equal(train_centroids(units, 5, 3, 0), rows)
    assert np.array_equal(train_centroids(units, 3, 3, 0), rows)
    assert train_centroids(units, 2, 3, 0).shape == (2, 4)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7)])
def test_training_on_nothing_gives_no_centroids(shape):
    assert train_centroids(np.empty(shape, np.float32), 5, 3, 0).shape == shape


@given(seed=st.integers(0, 1000), batch=st.integers(1, 40), k=st.integers(1, 12))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_assignment_is_the_float64_argmax_for_any_batching(seed, batch, k):
    rng = np.random.default_rng(seed)
    units = unit_rows(rng.normal(size=(40, 16)).astype(np.float16))
    centroids = unit_rows(rng.normal(size=(k, 16)))
    # Each centroid is repeated exactly, and again within the error of a float32 product: ties and near ties.
    nudged = centroids + rng.choice([-6e-8, 0, 6e-8], size=centroids.shape).astype(np.float32)
    centroids = np.concatenate([centroids, nudged, centroids])
    oracle = [exact_products(np.tile(u, (len(centroids), 1)), centroids).argmax() for u in units]
    batches = [assign(units[i : i + batch], centroids) for i in range(0, 40, batch)]
    assert np.concatenate(batches).tolist() == oracle


def test_equal_centroids_go_to_the_smaller_index():
    row = random_units(1, 8)
    others = -np.ones((1, 8), np.float32) / np.float32(np.sqrt(8))
    assert assign(row, np.concatenate([others, row, row])).tolist() == [1]


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [(0.5, np.nextafter(0.5, 1, dtype=np.float32), 1), (0.5, 0.5, 0), (0.5, 0.49, 0)],
)
def test_the_last_bit_decides_between_centroids(first, second, winner):
    centroids = np.array([[first, 0.8], [second, 0.8]], np.float32)
    assert assign(np.array([[1, 0]], np.float32), centroids).tolist() == [winner]


def test_all_blocks_of_centroids_are_used(monkeypatch):
    monkeypatch.setattr("transforms.distribution_alignment.clusters._BLOCK_CENTROIDS", 3)
    centroids = np.eye(8, dtype=np.float32)
    assert assign(centroids, centroids).tolist() == list(range(8))
    assert assign(centroids[[6]], centroids[[6, 1, 2, 3, 6]]).tolist() == [0]


def test_assignment_errors_name_the_cause():
    with pytest.raises(ValueError, match="embeddings have 4 dimensions, centroids have 5"):
        assign(random_units(1, 4), random_units(2, 5))
    with pytest.raises(ValueError, match="no centroids"):
        assign(random_units(1, 4), np.empty((0, 4), np.float32))
    assert assign(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)).shape == (0,)


def test_centroids_are_written_atomically_and_read_back(tmp_path):
    path = str(tmp_path / "new" / "centroids.npy")
    centroids = random_units(4, 8)
    assert write_centroids(path, centroids) == path
    assert write_centroids(path, centroids[:3]) == path  # a second run replaces it
    assert np.array_equal(load_centroids(path), centroids[:3])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["centroids.npy"]


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.eye(3), "float64"),
        (np.ones(3, np.float32), r"\(3,\)"),
        (2 * np.eye(3, dtype=np.float32), "row 0 has length 2"),
        (np.array([[np.nan, 1]], np.float32), "row 0 has length nan"),
        (np.array([[{}]]), "cannot be read"),
    ],
)
def test_invalid_centroids_raise_with_their_path(tmp_path, array, complaint):
    path = str(tmp_path / "given.npy")
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError, match=complaint) as error:
        load_centroids(path)
    assert path in str(error.value)
    assert "allowed: a .npy of float32 (k, d)" in str(error.value)


def test_missing_centroids_raise_with_their_path(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.npy: cannot be read"):
        load_centroids(str(tmp_path / "nowhere.npy"))


def train(candidates, clusters, folder, seed=7):
    work = WorkFolder(str(folder / "work"))
    path = str(folder / "centroids.npy")
    with beam.Pipeline("FnApiRunner") as pipeline:
        shards = pipeline | "Shards" >> beam.Create(lay_out(candidates, work)).with_output_types(CandidateShard)
        _ = shards | "Train" >> TrainCentroids(clusters, seed, work, path)
    return load_centroids(path)


def by_draw(candidates, seed=7):
    draws = np.array([draw("clusters", seed, uid.decode()) for uid in candidates.uids])
    return candidates.take(np.argsort(draws)), np.sort(draws)


def test_training_uses_the_samples_with_the_smallest_hashes(tmp_path):
    candidates = make_candidates(np.random.default_rng(0).normal(size=(60, 8)))
    ordered, draws = by_draw(candidates)
    chosen = ordered.take(draws < 20 / 60)
    assert 10 < len(chosen) < 30
    # There are as many clusters as chosen rows, so each row is a centroid, in the order of the hashes.
    centroids = train(candidates, ClustersSettings(count=20, samples_per_cluster=1), tmp_path)
    expected = train_centroids(unit_rows(chosen.embeddings), 20, 20, 7)
    assert np.array_equal(centroids, expected)


def test_two_levels_split_every_coarse_cluster_by_its_size(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [240, 120, 40])
    candidates = make_candidates(10 * np.eye(3, 8)[labels] + rng.normal(size=(400, 8)))
    centroids = train(candidates, ClustersSettings(count=10, coarse_count=3, iterations=10), tmp_path)
    assert centroids.shape == (10, 8)
    assert np.linalg.norm(centroids, axis=1) == pytest.approx(np.ones(10), abs=1e-6)
    coarse = load_centroids(str(tmp_path / "work" / "coarse.npy"))
    sizes = np.bincount(assign(unit_rows(candidates.embeddings), coarse), minlength=3).tolist()
    nearest = assign(np.asarray(centroids), coarse)
    assert nearest.tolist() == sorted(nearest)  # sorted by coarse cluster
    assert dict(enumerate(np.bincount(nearest).tolist())) == fine_counts(dict(enumerate(sizes)), 10)


@given(
    sizes=st.dictionaries(st.integers(0, 50), st.integers(1, 1000), min_size=1, max_size=12), extra=st.integers(0, 400)
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_fine_clusters_are_distributed_in_proportion(sizes, extra):
    count = len(sizes) + extra
    counts = fine_counts(sizes, count)
    assert set(counts) == set(sizes)
    assert min(counts.values()) >= 1
    assert count <= sum(counts.values()) < count + len(sizes)
    total = sum(sizes.values())
    for coarse, size in sizes.items():
        assert counts[coarse] in (1, size * count // total, size * count // total + 1)


def test_one_level_up_to_256_clusters_then_the_square_root():
    assert [ClustersSettings(count=n).first_level for n in (1, 256, 257, 10_000)] == [1, 1, 16, 100]
    assert ClustersSettings(count=1000, coarse_count=1).first_level == 1
    with pytest.raises(ValueError, match="must not exceed"):
        ClustersSettings(count=3, coarse_count=4)
