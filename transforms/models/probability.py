"""From logits to the probabilities that the annotations hold."""

from __future__ import annotations

import numpy as np


def of_two(logit: np.ndarray, other: np.ndarray) -> np.ndarray:
    """exp(logit) / (exp(logit) + exp(other)), in float64 and without overflow: the softmax over
    two."""
    return np.exp(-np.logaddexp(0.0, other.astype(np.float64) - logit.astype(np.float64)))


def as_float32(value: np.floating | np.ndarray) -> float:
    """The number as tables keep it, so that a threshold sees the same before and after a table is
    written."""
    return float(np.float32(value))
