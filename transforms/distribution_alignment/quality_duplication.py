"""Quality duplication: better samples of a cluster stand in the subset more often.

Paper: samples are sorted by flipped-CLIP score within their cluster and duplicated in proportion,
with weights rising from w1 = 1 to w2 = 2 or 3. Ours: the weight rises linearly with the rank.
"""

from __future__ import annotations

from pipeline.recipe import QualityDuplication

WITHOUT = QualityDuplication(w1=1.0, w2=1.0)
"""Every sample weighs the same: what is used where the rule is off."""


def weight(rank: int, size: int, settings: QualityDuplication) -> float:
    """w(x) = w1 + (w2 - w1)·i/(n_c - 1), for the rank i from 0 (worst) to n_c - 1 (best); i/(n_c -
    1) is ½ where n_c = 1."""
    height = rank / (size - 1) if size > 1 else 0.5
    return settings.w1 + (settings.w2 - settings.w1) * height


def mean_weight(settings: QualityDuplication) -> float:
    """w̄_c, the mean of w over a cluster: (w1 + w2)/2 at any size, because ranks are evenly
    spaced."""
    return (settings.w1 + settings.w2) / 2
