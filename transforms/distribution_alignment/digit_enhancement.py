"""Digit enhancement: pictures that hold digits get a floor of copies.

Paper: digit pictures are raised. Ours: how, and by how much.
"""

from __future__ import annotations

import numpy as np

from transforms.core.recipe import DigitEnhancementSettings


def enhance(
    expected: np.ndarray, digit_probabilities: np.ndarray, settings: DigitEnhancementSettings, max_copies: float
) -> np.ndarray:
    """E(x) = max(E(x), floor) for the samples with digit probability >= threshold, never above `max_copies`: float64
    (n,), float32 (n,) → float64 (n,).

    A sample never asked has probability -1.0 and is left as it is. Never called for a dropped sample.
    """
    floor = min(settings.floor_copies, max_copies)
    # In float64, as the recipe has the threshold: a float32 above it may lie below its nearest float32.
    shows_digits = digit_probabilities.astype(np.float64) >= settings.min_digit_probability
    return np.where(shows_digits, np.maximum(expected, floor), expected)
