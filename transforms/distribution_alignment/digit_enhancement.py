"""Digit enhancement: images that show digits get a minimum number of copies.

Paper: digit images are boosted. Our choice: how, and by how much.
"""

from __future__ import annotations

import numpy as np

from transforms.core.recipe import DigitEnhancementSettings


def enhance(
    expected: np.ndarray, digit_probabilities: np.ndarray, settings: DigitEnhancementSettings, max_copies: float
) -> np.ndarray:
    """E(x) = max(E(x), min(floor, max_copies)) for samples with digit probability >= threshold.

    Takes expected float64 (n,) and digit_probabilities float32 (n,). Returns float64 (n,). A sample without a digit
    score has probability -1.0 and keeps its E(x). The caller resets dropped samples to 0 afterwards.
    """
    floor = min(settings.floor_copies, max_copies)
    # Compared in float64, the type of the threshold in the recipe: rounding the threshold to float32 would move it.
    shows_digits = digit_probabilities.astype(np.float64) >= settings.min_digit_probability
    return np.where(shows_digits, np.maximum(expected, floor), expected)
