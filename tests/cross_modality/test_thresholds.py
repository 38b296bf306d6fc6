from __future__ import annotations

import math

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st

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
    scores = np.float32([0.5, -0.1, 0.9, 0.5])
    assert keep_fraction_threshold(scores, fraction) == float(np.float32(expected))


def test_no_scores_have_no_threshold():
    assert keep_fraction_threshold(np.float32([]), 0.5) is None


@given(FLOATS, FLOATS)
def test_ordered_bits_sort_as_the_numbers_do(a: float, b: float):
    assert (ordered_bits(a) < ordered_bits(b)) == (a < b)
    assert (ordered_bits(a) == ordered_bits(b)) == (a == b)
    assert score_of(ordered_bits(a)) == a


def test_ordered_bits_of_nan():
    with pytest.raises(ValueError, match="NaN"):
        ordered_bits(math.nan)


def cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "cosines": rng.normal(0.2, 0.05, 5000).astype(np.float32),
        "tied": rng.choice(np.float32([-0.0, 0.0, 0.25, 0.25000003, -0.25]), 2000),
        "extreme": np.float32([1e-45, -1e-45, 3e38, -3e38, 0.0, 1.0]),
        "one": np.float32([0.19]),
        "none": np.float32([]),
    }


@pytest.mark.parametrize("fraction", [0.001, 0.3, 1.0])
def test_the_transform_gives_numpys_threshold(fraction: float):
    with TestPipeline("FnApiRunner") as p:
        for name, scores in cases().items():
            shuffled = np.random.default_rng(1).permutation(scores)
            found = (
                p
                | f"{name} scores" >> beam.Create([float(s) for s in shuffled], reshuffle=False)
                | f"{name} threshold" >> KeepFractionThreshold(fraction)
            )
            expected = keep_fraction_threshold(scores, fraction)
            assert_that(found, equal_to([expected]), label=name)
