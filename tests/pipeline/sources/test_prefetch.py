"""Tests of prefetching: the order of results, the number of calls started early, and errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.sources.prefetch import grouped, map_alternating, map_prefetched


@pytest.mark.parametrize("count", [0, 1, 3, 20])
@pytest.mark.parametrize("prefetch", [0, 1, 5, 50])
def test_results_are_in_order(count: int, prefetch: int) -> None:
    def square(n: int) -> int:
        time.sleep(0.001 * (n % 3))
        return n * n

    assert list(map_prefetched(square, range(count), threads=4, prefetch=prefetch)) == [n * n for n in range(count)]


def test_next_result_is_computed_while_the_consumer_is_busy() -> None:
    computed = threading.Event()

    def record(n: int) -> int:
        if n == 1:
            computed.set()
        return n

    results = map_prefetched(record, range(3), threads=1, prefetch=1)
    assert next(results) == 0
    assert computed.wait(10)
    assert list(results) == [1, 2]


def test_prefetching_stops_at_the_limit() -> None:
    taken = []

    def items() -> Iterator[int]:
        for n in range(100):
            taken.append(n)
            yield n

    results = map_prefetched(str, items(), threads=2, prefetch=4)
    assert next(results) == "0"
    until = time.monotonic() + 10
    while len(taken) < 5 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)  # time enough to take a sixth
    assert len(taken) == 5
    results.close()
    assert len(taken) == 5


def test_prefetching_stops_at_the_limit_in_bytes() -> None:
    """Items count while they wait, and what is computed from them after that."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            taken.append(n)
            yield n

    sizes: dict[int | str, int] = dict.fromkeys(range(100), 10) | {str(n): 40 for n in range(100)}
    sizes |= {0: 1, "0": 1}
    results = map_prefetched(str, items(), 1, 50, sizes.__getitem__, max_bytes=100)
    assert next(results) == "0"
    until = time.monotonic() + 10
    while len(taken) < 4 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)  # time enough to take more
    assert 4 <= len(taken) <= 1 + 10
    assert [*results] == [str(n) for n in range(1, 100)]


def test_a_result_larger_than_the_limit_is_computed_alone() -> None:
    assert list(map_prefetched(str, range(9), 2, 4, lambda _: 1000, max_bytes=10)) == [str(n) for n in range(9)]


def test_groups_are_bounded_by_count_and_bytes() -> None:
    assert list(grouped([1, 1, 1, 5, 1, 9, 1], 3, int, 5)) == [[1, 1, 1], [5], [1, 9], [1]]
    assert list(grouped([], 3, int, 5)) == []


def test_error_of_the_items_follows_the_results_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the network is gone")

    results = map_prefetched(str, items(), threads=2, prefetch=4)
    assert next(results) == "1"
    with pytest.raises(OSError, match="the network is gone"):
        next(results)


def test_next_item_is_requested_while_the_consumer_is_busy() -> None:
    requested = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        requested.set()
        yield 1

    results = map_prefetched(str, items(), threads=1, prefetch=1)
    assert next(results) == "0"
    assert requested.wait(10)
    assert list(results) == ["1"]


def test_error_is_raised_in_place_of_its_result() -> None:
    results = map_prefetched(lambda n: 1 // n, [1, 0, 1], threads=2, prefetch=2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
@pytest.mark.parametrize("group", [1, 4, 50])
def test_alternating_results_are_in_order(count: int, group: int) -> None:
    assert list(map_alternating(str, range(count), threads=4, count=group)) == [str(n) for n in range(count)]


def test_alternating_computes_nothing_while_the_consumer_is_busy() -> None:
    computed: list[int] = []
    results = map_alternating(computed.append, range(12), threads=3, count=5)
    for received, _ in enumerate(results):
        time.sleep(0.005)  # busy
        assert sorted(computed) == list(range(min(12, 5 * (received // 5 + 1))))


def test_alternating_error_reaches_the_consumer_and_ends_the_threads() -> None:
    def fail(n: int) -> int:
        raise OSError(f"the disk is gone at {n}")

    before = threading.active_count()
    with pytest.raises(OSError, match="gone at 0"):
        list(map_alternating(fail, range(9), threads=2, count=3))
    assert threading.active_count() == before
