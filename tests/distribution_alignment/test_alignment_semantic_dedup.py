"""Semantic dedup equals a brute-force oracle, whatever the tiles."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recipe import SemanticDedup
from transforms.distribution_alignment.records import Member
from transforms.distribution_alignment.semantic_dedup import (
    _rank_cluster,
    ranked,
    semantic_duplicates,
)
from transforms.distribution_alignment.vectors import exact_products, unit_rows

TILE_EDGES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 17]


def oracle(units: np.ndarray, epsilon: float) -> list[int]:
    """The definition, one pair at a time."""
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
def test_equals_the_oracle_around_every_tile_edge(n, spread):
    units = clustered(n, 6, spread, seed=n)
    for epsilon in (0.05, 0.3):
        assert semantic_duplicates(units, epsilon, tile_rows=4).tolist() == oracle(units, epsilon)


@pytest.mark.parametrize("n", TILE_EDGES)
def test_of_identical_samples_the_first_stays(n):
    units = np.repeat(unit_rows(np.ones((1, 5), np.float16)), n, axis=0)
    assert semantic_duplicates(units, 0.05, tile_rows=4).tolist() == [-1, *[0] * (n - 1)][:n]


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
def test_the_threshold_itself_is_kept(cosine, keeper):
    units = np.array([[1, 0], [cosine, np.sqrt(1 - np.float64(cosine) ** 2)]], np.float32)
    assert semantic_duplicates(units, epsilon=0.5).tolist() == [-1, keeper]


def test_a_duplicate_may_itself_be_a_keeper():
    angles = np.radians([0, 15, 30])  # neighbours at cosine 0.966, the ends at 0.866
    units = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert semantic_duplicates(units, epsilon=0.05).tolist() == [-1, 0, 1]


def test_memory_is_that_of_tiles():
    n, tile = 3000, 64
    units = clustered(n, 8, 3.0, 0)
    semantic_duplicates(units[:tile], 0.001, tile)
    tracemalloc.start()
    semantic_duplicates(units, 0.001, tile)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * n * 4 / 50


def member(uid: str, cosine: float, embedding: tuple[float, ...] = (1.0, 0.0)) -> Member:
    return Member(uid, "0.tar", cosine, -1.0, np.array(embedding, "<f2").tobytes(), 3)


def test_rank_is_higher_cosine_then_smaller_uid_in_any_order():
    members = [member("b", 0.3), member("a", 0.3), member("c", 0.4), member("d", 0.2)]
    for order in itertools.permutations(members):
        assert [m.uid for m in ranked(order)] == ["c", "a", "b", "d"]


def test_a_score_that_is_not_a_number_is_named():
    with pytest.raises(ValueError, match=r"sample bad of 0\.tar: flipped_clip_cosine"):
        ranked([member("good", 0.2), member("bad", float("nan"))])


MEMBERS = [
    member("best", 0.4),
    member("copy", 0.3),
    member("other", 0.2, (0.0, 1.0)),
    member("worst", 0.1, (0.0, -1.0)),
]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (None, [("", 3, 4), ("", 2, 4), ("", 1, 4), ("", 0, 4)]),
        (SemanticDedup(), [("", 2, 3), ("best", -1, 3), ("", 1, 3), ("", 0, 3)]),
        (
            SemanticDedup(after_duplication=True),
            [("", 3, 4), ("best", 2, 4), ("", 1, 4), ("", 0, 4)],
        ),
    ],
)
def test_ranks_count_what_copies_are_shared_among(rule, expected):
    rows = {row.uid: row for row in _rank_cluster((3, MEMBERS[::-1]), rule)}
    found = [rows[m.uid] for m in MEMBERS]
    assert [(r.semantic_duplicate_of, r.rank, r.cluster_size) for r in found] == expected


def test_a_cluster_of_one_has_rank_0_of_1():
    [row] = _rank_cluster((3, MEMBERS[:1]), SemanticDedup())
    assert (row.rank, row.cluster_size, row.cluster) == (0, 1, 3)
