from __future__ import annotations

import functools
import math

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st

from transforms.cross_modality import thresholds
from transforms.cross_modality.thresholds import (
    KeepFractionThreshold,
    keep_fraction_threshold,
    ordered_bits,
    score_of,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.01, 0.9), (0.25, 0.5), (0.5, 0.5), (0.75, -0.1), (0.99, -0.1), (1.0, -0.1)]
)
def test_threshold_by_hand(fraction: float, expected: float):
    scores = np.array([0.5, -0.1, 0.9, 0.5], np.float32)
    assert keep_fraction_threshold(scores, fraction) == float(np.float32(expected))


def test_no_scores_have_no_threshold():
    assert keep_fraction_threshold(np.array([], np.float32), 0.5) is None


@given(FLOATS, FLOATS)
def test_ordered_bits_sort_as_the_numbers_do(a: float, b: float):
    assert (ordered_bits(a) < ordered_bits(b)) == (a < b)
    assert (ordered_bits(a) == ordered_bits(b)) == (a == b)
    assert score_of(ordered_bits(a)) == a


def test_ordered_bits_of_nan():
    with pytest.raises(ValueError, match="NaN"):
        ordered_bits(math.nan)


RNG = np.random.default_rng(0)
CASES = {
    "cosines": (RNG.normal(0.2, 0.05, 3000).astype(np.float32), 0.3),
    "few": (RNG.normal(0.2, 0.05, 500).astype(np.float32), 0.001),
    "tied": (RNG.choice(np.array([-0.0, 0.0, 0.25, 0.25000003, -0.25], np.float32), 1000), 0.3),
    "extreme": (np.array([1e-45, -1e-45, 3e38, -3e38, 0.0, 1.0], np.float32), 0.5),
    "all": (RNG.normal(0, 1, 500).astype(np.float32), 1.0),
    "none": (np.array([], np.float32), 0.5),
}


def test_the_transform_gives_numpys_threshold():
    with TestPipeline("FnApiRunner") as p:
        for name, (scores, fraction) in CASES.items():
            found = (
                p
                | f"{name} scores" >> beam.Create([float(score) for score in scores], reshuffle=False)
                | f"{name} threshold" >> KeepFractionThreshold(fraction)
            )
            assert_that(found, equal_to([keep_fraction_threshold(scores, fraction)]), label=name)


@given(st.lists(FLOATS, min_size=1), st.floats(0.001, 1.0))
def test_the_two_passes_find_numpys_threshold(scores: list[float], fraction: float):
    counts = thresholds.Counts()

    def count(keys: list[int]) -> dict[int, int]:
        halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
        accumulators = [functools.reduce(counts.add_input, half, counts.create_accumulator()) for half in halves]
        return counts.extract_output(counts.merge_accumulators(accumulators))

    ordered = [ordered_bits(score) for score in scores]
    place = thresholds.place_in_upper(count([o >> 16 for o in ordered]), fraction)
    found = thresholds.threshold_at(count([low for o in ordered for low in thresholds.lower_half_at(o, place)]), place)
    assert found == keep_fraction_threshold(np.array(scores, np.float32), fraction)
