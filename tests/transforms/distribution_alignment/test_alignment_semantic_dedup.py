"""Semantic dedup equals a brute-force oracle for any tiles."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.distribution_alignment import duplicate_search
from transforms.distribution_alignment.duplicate_search import _rank, semantic_duplicates
from transforms.distribution_alignment.records import Judged, best_first
from transforms.distribution_alignment.vectors import exact_products, unit_rows

TILE_EDGES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 17]


def oracle(units: np.ndarray, epsilon: float) -> list[int]:
    """The definition, evaluated one pair at a time."""
    keepers = []
    for x in range(len(units)):
        better = (y for y in range(x) if exact_products(units[y : y + 1], units[x : x + 1])[0] > 1.0 - epsilon)
        keepers.append(next(better, -1))
    return keepers


def clustered(n: int, d: int, spread: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, n // 3), d))
    rows = centres[rng.integers(len(centres), size=n)] + spread * rng.normal(size=(n, d))
    return unit_rows(rows.astype(np.float16))


@pytest.mark.parametrize("n", TILE_EDGES)
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3, 3.0])
def test_equals_the_oracle_for_sizes_around_a_tile_edge(n, spread):
    units = clustered(n, 6, spread, seed=n)
    for epsilon in (0.05, 0.3):
        assert semantic_duplicates(units, epsilon, block_rows=4).tolist() == oracle(units, epsilon)


@pytest.mark.parametrize("n", TILE_EDGES)
def test_the_first_of_identical_samples_is_kept(n):
    units = np.repeat(unit_rows(np.ones((1, 5), np.float16)), n, axis=0)
    assert semantic_duplicates(units, 0.05, block_rows=4).tolist() == [-1, *[0] * (n - 1)][:n]


@given(
    n=st.integers(2, 24),
    tile=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    pair=st.tuples(st.integers(0, 23), st.integers(0, 23)),
    side=st.sampled_from([-1, 0, 1]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_equals_the_oracle_with_the_threshold_on_a_pair(n, tile, seed, pair, side):
    units = clustered(n, 64, 0.1, seed)
    x, y = (index % n for index in pair)
    cosine = exact_products(units[x : x + 1], units[y : y + 1])[0]
    epsilon = float(np.clip(1.0 - cosine + side * 1e-12, 1e-9, 0.999))
    assert semantic_duplicates(units, epsilon, tile).tolist() == oracle(units, epsilon)


def test_equals_the_oracle_where_every_pair_is_near_the_threshold():
    units = unit_rows(np.concatenate([np.eye(11), np.full((11, 1), 2.0)], axis=1))
    cosines = [exact_products(units[[x]], units[[y]])[0] for x, y in itertools.pairwise(range(11))]
    for epsilon in (1 - max(cosines), 1 - min(cosines), 1 - min(cosines) + 1e-15):
        for tile in (3, 4, 11, 20):
            found = semantic_duplicates(units, epsilon, tile).tolist()
            assert found == oracle(units, epsilon)


@pytest.mark.parametrize(
    ("cosine", "keeper"),
    [(0.5, -1), (np.nextafter(0.5, 1, dtype=np.float32), 0), (0.49999997, -1), (0.7, 0)],
)
def test_a_cosine_equal_to_the_threshold_is_not_a_duplicate(cosine, keeper):
    units = np.array([[1, 0], [cosine, np.sqrt(1 - np.float64(cosine) ** 2)]], np.float32)
    assert semantic_duplicates(units, epsilon=0.5).tolist() == [-1, keeper]


def test_a_duplicate_may_itself_be_a_keeper():
    angles = np.radians([0, 15, 30])  # neighbours at cosine 0.966, the ends at 0.866
    units = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert semantic_duplicates(units, epsilon=0.05).tolist() == [-1, 0, 1]


def test_memory_is_bounded_by_the_tile_size():
    n, tile = 3000, 64
    units = clustered(n, 8, 3.0, 0)
    semantic_duplicates(units[:tile], 0.001, tile)
    tracemalloc.start()
    semantic_duplicates(units, 0.001, tile)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * n * 4 / 50


@pytest.mark.parametrize("few_pairs", [0, 10**9])
@pytest.mark.parametrize("trials", [0, 10**9])
def test_the_bound_and_the_exact_pairs_do_not_change_the_result(monkeypatch, few_pairs, trials):
    monkeypatch.setattr("transforms.distribution_alignment.duplicate_search._FEW_PAIRS", few_pairs)
    monkeypatch.setattr("transforms.distribution_alignment.duplicate_search._TRIALS", trials)
    for spread in (0.1, 0.5):
        units = clustered(60, 16, spread, seed=4)
        assert semantic_duplicates(units, 0.05, block_rows=16).tolist() == oracle(units, 0.05)


def test_the_bound_avoids_products_and_is_given_up_where_it_fails(monkeypatch):
    units = clustered(200, 32, 3.0, 0)
    looked = []
    real = duplicate_search._first_above
    monkeypatch.setattr(
        duplicate_search, "_first_above", lambda *given: (looked.append(given[0].shape), real(*given))[1]
    )
    assert (semantic_duplicates(units, 0.05, block_rows=20) == -1).all()
    assert looked == []
    monkeypatch.setattr(duplicate_search, "_FEW_PAIRS", 0)
    near = unit_rows(np.ones((1, 128)) + 0.4 * np.random.default_rng(0).normal(size=(200, 128)))
    duplicates = duplicate_search.TileDuplicates(near, 0.05, block_rows=10)
    assert (duplicates.against_itself(0) == -1).all()
    assert len(looked) == 20 * 21 // 2
    assert duplicates._bounds_tried == duplicate_search._TRIALS


def test_the_bound_is_never_below_the_product():
    units = clustered(80, 24, 0.5, seed=1)
    bounds = duplicate_search.TileDuplicates(units, 0.05)._bound_rows(units)
    assert ((bounds @ bounds.T) - units @ units.T).min() > -1e-6
    assert bounds.shape == (80, 7)


def judged(*keepers: bytes) -> Judged:
    count = len(keepers)
    uids = np.array([f"{number:032x}" for number in range(count)], "S32")
    return Judged(uids, np.full(count, b"0"), np.zeros(count, np.float32), np.array(keepers, "S32"))


@pytest.mark.parametrize(
    ("counts_all", "first", "second", "size"),
    [(True, [4, 3, 2], [1, 0], 5), (False, [2, -1, 1], [0, -1], 3)],
)
def test_ranks_run_over_the_members_that_share_copies(counts_all, first, second, size):
    tiles = [(1, judged(b"", b"a")), (0, judged(b"", b"b", b""))]
    ranked = {len(tile.members): tile for tile in _rank((3, tiles), counts_all)}
    assert (ranked[3].ranks.tolist(), ranked[2].ranks.tolist()) == (first, second)
    assert {(tile.cluster, tile.cluster_size) for tile in ranked.values()} == {(3, size)}


def test_rank_is_higher_cosine_then_smaller_uid():
    uids, cosines = np.array([b"b", b"a", b"c", b"d"]), np.array([0.3, 0.3, 0.4, 0.2], np.float32)
    for order in itertools.permutations(range(4)):
        shuffled = list(order)
        assert uids[shuffled][best_first(cosines[shuffled], uids[shuffled])].tolist() == [b"c", b"a", b"b", b"d"]
