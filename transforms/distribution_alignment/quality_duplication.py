"""Quality duplication: better samples of a cluster occur more often in the subset.

Paper: samples are sorted by flipped-CLIP score within their cluster and duplicated in proportion, with weights rising
from w1 = 1 to w2 = 2 or 3. Our choice: the weight rises linearly with the rank.
"""

from __future__ import annotations

import numpy as np

from transforms.core.recipe import QualityDuplicationSettings

WITHOUT = QualityDuplicationSettings(w1=1.0, w2=1.0)
"""Equal weights, used if the rule is off."""


def weights(ranks: np.ndarray, size: int, settings: QualityDuplicationSettings) -> np.ndarray:
    """w(x) = w1 + (w2 - w1)·i/(n_c - 1), for ranks i from 0 (worst) to n_c - 1 (best): int64 (n,) → float64 (n,).

    i/(n_c - 1) is taken as ½ where n_c = 1.
    """
    fractions = ranks / (size - 1) if size > 1 else np.full(len(ranks), 0.5)
    return settings.w1 + (settings.w2 - settings.w1) * fractions


def mean_weight(settings: QualityDuplicationSettings) -> float:
    """w̄_c, the mean of w over a cluster: (w1 + w2)/2 for any size, because ranks are evenly spaced."""
    return (settings.w1 + settings.w2) / 2
