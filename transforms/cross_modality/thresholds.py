"""The threshold that `keep_fraction` comes to, exactly, over any number of scores.

    threshold = sorted_descending[int(n * fraction)]        (DataComp; the lowest where that is n)

Sorting billions of scores takes a shuffle of them all. Two passes that count do not: a float32,
read as an ordered 32-bit integer, is split into its upper and its lower 16 bits; the first pass
counts the upper halves, which tells the one upper half that holds the threshold and its rank there;
the second counts the lower halves under it. Counts are integers, so neither order nor the number of
workers changes the result, and an accumulator has at most 65,536 entries.
"""

from __future__ import annotations

import collections
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import apache_beam as beam
import numpy as np

_SIGN = 0x80000000
_ALL = 0xFFFFFFFF


def keep_fraction_threshold(scores: np.ndarray, fraction: float) -> float | None:
    """The threshold for scores that fit in memory (float32; None where there are none)."""
    if not len(scores):
        return None
    descending = np.sort(scores.astype(np.float32))[::-1]
    return float(descending[_index(len(scores), fraction)])


class KeepFractionThreshold(beam.PTransform):
    """Scores (of float32's precision) → one element: the threshold, or None for no scores."""

    def __init__(self, fraction: float) -> None:
        super().__init__()
        self._fraction = fraction

    def expand(self, scores: beam.PCollection[float]) -> beam.PCollection[float | None]:
        keys = scores | "As ordered integers" >> beam.Map(ordered_bits).with_output_types(int)
        place = (
            keys
            | "Upper half" >> beam.Map(upper_half).with_output_types(int)
            | "Count upper halves" >> beam.CombineGlobally(Counts())
            | "Find the upper half" >> beam.Map(place_in_upper, self._fraction)
        )
        return (
            keys
            | "Lower half" >> beam.FlatMap(lower_half_at, beam.pvalue.AsSingleton(place)).with_output_types(int)
            | "Count lower halves" >> beam.CombineGlobally(Counts())
            | "Find the threshold" >> beam.Map(threshold_at, beam.pvalue.AsSingleton(place))
        )


class Counts(beam.CombineFn):
    """How often each integer occurs."""

    def create_accumulator(self) -> collections.Counter[int]:
        return collections.Counter()

    def add_input(self, accumulator: collections.Counter[int], element: int) -> collections.Counter[int]:
        accumulator[element] += 1
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[collections.Counter[int]]) -> collections.Counter[int]:
        total = self.create_accumulator()
        for accumulator in accumulators:
            total.update(accumulator)
        return total

    def extract_output(self, accumulator: collections.Counter[int]) -> dict[int, int]:
        return dict(accumulator)


class Place(NamedTuple):
    """Where the threshold lies: its upper half, and its rank among the scores of that half."""

    upper: int
    rank: int


def ordered_bits(score: float) -> int:
    """The float32 as an unsigned integer that sorts as the number does; zero has one form."""
    if score != score:
        raise ValueError("a score is NaN; such samples are dead letters and never get here")
    (bits,) = struct.unpack("<I", struct.pack("<f", score + 0.0))
    return bits ^ (_ALL if bits & _SIGN else _SIGN)


def score_of(ordered: int) -> float:
    """The float32 that `ordered_bits` gave `ordered` for."""
    (score,) = struct.unpack("<f", struct.pack("<I", ordered ^ (_SIGN if ordered & _SIGN else _ALL)))
    return score


def _index(count: int, fraction: float) -> int:
    return min(int(count * fraction), count - 1)


def upper_half(ordered: int) -> int:
    """What the first pass counts."""
    return ordered >> 16


def lower_half_at(ordered: int, place: Place | None) -> list[int]:
    """What the second pass counts: the lower half of a score whose upper half is the place's."""
    return [ordered & 0xFFFF] if place is not None and ordered >> 16 == place.upper else []


def place_in_upper(counts: Mapping[int, int], fraction: float) -> Place | None:
    """The threshold's place, from the counts of all upper halves."""
    if not counts:
        return None
    return Place(*_from_the_top(counts, _index(sum(counts.values()), fraction)))


def threshold_at(counts: Mapping[int, int], place: Place | None) -> float | None:
    """The threshold, from the counts of the lower halves at its place."""
    if place is None:
        return None
    lower, _ = _from_the_top(counts, place.rank)
    return score_of(place.upper << 16 | lower)


def _from_the_top(counts: Mapping[int, int], index: int) -> tuple[int, int]:
    """The key at `index` of all keys in descending order, and the index among its equals."""
    for key in sorted(counts, reverse=True):
        if index < counts[key]:
            return key, index
        index -= counts[key]
    raise AssertionError("the index lies beyond the counts")
