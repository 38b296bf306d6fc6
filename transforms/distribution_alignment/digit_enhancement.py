"""Digit enhancement: pictures that hold digits get a floor of copies.

Paper: digit pictures are raised. Ours: how, and by how much.
"""

from __future__ import annotations

from pipeline.recipe import DigitEnhancement


def enhance(expected: float, digit_probability: float, settings: DigitEnhancement, max_copies: float) -> float:
    """E(x) = max(E(x), floor) for a sample with digit probability >= threshold, never above
    `max_copies`.

    A sample never asked has probability -1.0 and is left as it is. Never called for a dropped
    sample.
    """
    if digit_probability >= settings.min_digit_probability:
        return max(expected, min(settings.floor_copies, max_copies))
    return expected
