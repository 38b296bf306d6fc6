"""Working ahead: results in order, begun before they are asked for, and no more of them than allowed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.sources.prefetch import in_order, in_turns


@pytest.mark.parametrize("count", [0, 1, 3, 20])
@pytest.mark.parametrize("ahead", [0, 1, 5, 50])
def test_results_come_in_order(count: int, ahead: int) -> None:
    def square(n: int) -> int:
        time.sleep(0.001 * (n % 3))
        return n * n

    assert list(in_order(square, range(count), threads=4, ahead=ahead)) == [n * n for n in range(count)]


def test_what_comes_next_is_made_while_the_consumer_is_busy() -> None:
    made = threading.Event()

    def note(n: int) -> int:
        if n == 1:
            made.set()
        return n

    results = in_order(note, range(3), threads=1, ahead=1)
    assert next(results) == 0
    assert made.wait(10)
    assert list(results) == [1, 2]


def test_no_more_is_taken_than_allowed() -> None:
    taken = []

    def items() -> Iterator[int]:
        for n in range(100):
            taken.append(n)
            yield n

    results = in_order(str, items(), threads=2, ahead=4)
    assert next(results) == "0"
    until = time.monotonic() + 10
    while len(taken) < 5 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)  # a sixth would have come by now
    assert len(taken) == 5
    results.close()
    assert len(taken) == 5


def test_an_error_of_the_items_comes_after_what_was_there_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the network is gone")

    results = in_order(str, items(), threads=2, ahead=4)
    assert next(results) == "1"
    with pytest.raises(OSError, match="the network is gone"):
        next(results)


def test_the_next_item_is_asked_for_while_the_consumer_is_busy() -> None:
    asked = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        asked.set()
        yield 1

    results = in_order(str, items(), threads=1, ahead=1)
    assert next(results) == "0"
    assert asked.wait(10)
    assert list(results) == ["1"]


def test_an_error_comes_where_its_result_was_due() -> None:
    results = in_order(lambda n: 1 // n, [1, 0, 1], threads=2, ahead=2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
@pytest.mark.parametrize("turn", [1, 4, 50])
def test_results_in_turns_come_in_order(count: int, turn: int) -> None:
    assert list(in_turns(str, range(count), threads=4, count=turn)) == [str(n) for n in range(count)]


def test_in_turns_nothing_is_made_while_the_consumer_is_busy() -> None:
    made: list[int] = []
    results = in_turns(made.append, range(12), threads=3, count=5)
    for given, _ in enumerate(results):
        time.sleep(0.005)  # busy
        assert sorted(made) == list(range(min(12, 5 * (given // 5 + 1))))


def test_an_error_in_turns_reaches_the_consumer_and_ends_the_threads() -> None:
    def fail(n: int) -> int:
        raise OSError(f"the disk is gone at {n}")

    before = threading.active_count()
    with pytest.raises(OSError, match="gone at 0"):
        list(in_turns(fail, range(9), threads=2, count=3))
    assert threading.active_count() == before
