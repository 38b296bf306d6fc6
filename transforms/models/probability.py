"""Probabilities from logits."""

from __future__ import annotations

import numpy as np


def of_two(logit: np.ndarray, other: np.ndarray) -> np.ndarray:
    """exp(logit) / (exp(logit) + exp(other)), the softmax over two logits, computed in float64 without overflow."""
    return np.exp(-np.logaddexp(0.0, other.astype(np.float64) - logit.astype(np.float64)))


def as_float32(value: np.floating | np.ndarray) -> float:
    """The value rounded to float32, the precision of the tables.

    A threshold then gives the same verdict before a table is written and after it is read.
    """
    return float(np.float32(value))
