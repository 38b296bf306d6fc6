"""The exact threshold for `keep_fraction`, over any number of scores.

    threshold = sorted_descending[int(n * fraction)]        (DataComp; the lowest score where the index is n)

Sorting billions of scores would shuffle all of them. Two counting passes avoid that. Each float32 is mapped to a 32-bit
integer of the same order and split into its upper and lower 16 bits. The first pass counts the upper halves, which
gives the upper half of the threshold and its rank among the scores with that upper half. The second pass counts the
lower halves of those scores. Counts are integers, so the result does not depend on the order or on the number of
workers, and an accumulator has at most 65,536 entries.
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
    """The threshold for scores (n,) that fit in memory, rounded to float32. None if n = 0."""
    if not len(scores):
        return None
    descending = np.sort(scores.astype(np.float32))[::-1]
    return float(descending[_index(len(scores), fraction)])


class KeepFractionThreshold(beam.PTransform):
    """Scores (with float32 precision) → one element: the threshold, or None if there are no scores."""

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
    """Counts how often each integer occurs."""

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
    """The position of the threshold: its upper half, and its rank (from the top) among the scores with that half."""

    upper: int
    rank: int


def ordered_bits(score: float) -> int:
    """Map a float32 to an unsigned 32-bit integer of the same order. 0.0 and -0.0 map to the same integer.

    Raises ValueError for NaN.
    """
    if score != score:
        raise ValueError("a score is NaN; its sample should have become a dead letter")
    (bits,) = struct.unpack("<I", struct.pack("<f", score + 0.0))
    return bits ^ (_ALL if bits & _SIGN else _SIGN)


def score_of(ordered: int) -> float:
    """The inverse of `ordered_bits`."""
    (score,) = struct.unpack("<f", struct.pack("<I", ordered ^ (_SIGN if ordered & _SIGN else _ALL)))
    return score


def _index(count: int, fraction: float) -> int:
    return min(int(count * fraction), count - 1)


def upper_half(ordered: int) -> int:
    """The upper 16 bits, which the first pass counts."""
    return ordered >> 16


def lower_half_at(ordered: int, place: Place | None) -> list[int]:
    """The lower 16 bits of a score with the upper half of `place`, which the second pass counts; else nothing."""
    return [ordered & 0xFFFF] if place is not None and ordered >> 16 == place.upper else []


def place_in_upper(counts: Mapping[int, int], fraction: float) -> Place | None:
    """The place of the threshold, from the counts of the upper halves. None if there are no scores."""
    if not counts:
        return None
    return Place(*_from_the_top(counts, _index(sum(counts.values()), fraction)))


def threshold_at(counts: Mapping[int, int], place: Place | None) -> float | None:
    """The threshold, from the counts of the lower halves of the scores at `place`."""
    if place is None:
        return None
    lower, _ = _from_the_top(counts, place.rank)
    return score_of(place.upper << 16 | lower)


def _from_the_top(counts: Mapping[int, int], index: int) -> tuple[int, int]:
    """The value at `index` among all values in descending order, and its index among equal values."""
    for key in sorted(counts, reverse=True):
        if index < counts[key]:
            return key, index
        index -= counts[key]
    raise AssertionError("the index is not below the total count")
