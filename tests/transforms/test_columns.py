"""Columns: nothing is lost when they are split, joined and pickled."""

from __future__ import annotations

import dataclasses
import pickle

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that

from transforms.columns import Columns, Part, bucket_count, buckets_of


@dataclasses.dataclass(frozen=True, eq=False)
class Things(Columns):
    names: np.ndarray
    keys: np.ndarray
    numbers: np.ndarray
    vectors: np.ndarray


def things(count: int, start: int = 0) -> Things:
    numbers = np.arange(start, start + count)
    return Things(
        np.array([f"{n:08d}" for n in numbers], "S8"),
        np.array([f"k\0{n}\udcff\0" for n in numbers], object),
        numbers,
        np.stack([numbers, numbers], axis=1).astype(np.float16) if count else np.zeros((0, 2), np.float16),
    )


def same(one: Things, other: Things) -> bool:
    return all(
        mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.tolist() == theirs.tolist()
        for (_, mine), (_, theirs) in zip(one.columns(), other.columns(), strict=True)
    )


@pytest.mark.parametrize("count", [0, 1, 5])
def test_columns_survive_pickling(count: int) -> None:
    assert same(pickle.loads(pickle.dumps(things(count))), things(count))


def test_joined_parts_of_a_split_are_the_original() -> None:
    whole = things(20)
    parts = [part for _, part in whole.groups(whole.numbers % 3)]
    assert [part.numbers.tolist() for part in parts] == [list(range(rest, 20, 3)) for rest in range(3)]
    joined = Things.joined(parts)
    assert same(joined.take(np.argsort(joined.numbers)), whole)


@pytest.mark.parametrize(
    "column",
    [
        np.arange(4000, dtype=np.uint64), np.arange(4000, dtype=np.uint64) << np.uint64(52),
        np.array([f"{n:032d}" for n in range(4000)], "S32"),
        np.array([f"{n:04d}" + "0" * 28 for n in range(4000)], "S32"),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_buckets_have_similar_sizes(column: np.ndarray, count: int) -> None:
    sizes = np.bincount(buckets_of(column, count), minlength=count)
    assert len(sizes) == count
    assert sizes.min() > 0.4 * 4000 / count and sizes.max() < 1.6 * 4000 / count


def test_bucket_of_a_value_does_not_depend_on_other_values() -> None:
    column = np.array([f"{n:032x}" for n in range(50)], "S32")
    assert np.concatenate([buckets_of(column[rows : rows + 7], 5) for rows in range(0, 50, 7)]).tolist() == (
        buckets_of(column, 5).tolist()
    )


@pytest.mark.parametrize(("shards", "buckets"), [(1, 1), (15, 1), (16, 2), (40, 4), (10**5, 2**13), (10**7, 2**16)])
def test_number_of_buckets_grows_with_the_pool(shards: int, buckets: int) -> None:
    assert bucket_count(shards) == buckets


def _numbers(rows: Things) -> np.ndarray:
    return rows.numbers % 4


def _names(rows: Things) -> np.ndarray:
    return rows.names


def test_every_row_goes_to_its_key_exactly_once() -> None:
    def check(groups: list[tuple[int, list[Things]]]) -> None:
        found = {key: sorted(n for part in parts for n in part.numbers.tolist()) for key, parts in groups}
        assert found == {rest: list(range(rest, 30, 4)) for rest in range(4)}

    with beam.Pipeline("FnApiRunner") as p:
        rows = p | beam.Create([things(10), things(0), things(20, start=10)])
        assert_that(rows | beam.ParDo(Part(_numbers)) | beam.GroupByKey(), check)


def test_one_bundle_gives_one_part_per_key() -> None:
    part = Part(_numbers)
    part.start_bundle()
    assert [list(part.process(things(10, start))) for start in (0, 10)] == [[], []]
    assert [(each.value[0], len(each.value[1])) for each in part.finish_bundle()] == [(0, 5), (1, 5), (2, 5), (3, 5)]


def test_a_large_bundle_is_sent_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transforms.columns._BUFFERED_ROWS", 15)
    part = Part(_names)
    part.start_bundle()
    assert list(part.process(things(10))) == []
    assert [key for key, _ in part.process(things(10, start=10))] == [f"{n:08d}" for n in range(20)]
    assert list(part.finish_bundle()) == []
