"""Near-duplicate images: a better-ranked image's perceptual hash is within a few bits.

`hash_neighbours` finds them, and `pool_wide.NearDuplicate` is the step. Source: paper (the rule); how is our choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from transforms.core.catalogue import SINGLE_MODALITY, Rule
from transforms.core.settings import Settings

if TYPE_CHECKING:
    from transforms.core.records import Annotation


class NearDuplicateSettings(Settings):
    """Perceptual hashes of near-duplicate images differ in at most `max_hamming` of 64 bits."""

    max_hamming: int = Field(3, ge=0, le=7)


def keeps(duplicate_of: str | None) -> bool:
    """Whether no better-ranked near-duplicate exists."""
    return duplicate_of is None


def _keeps(annotation: Annotation, settings: NearDuplicateSettings) -> bool:
    return keeps(annotation.duplicate_of)


NEAR_DUPLICATE = Rule(
    name="near_duplicate",
    stage=SINGLE_MODALITY,
    settings=NearDuplicateSettings,
    summary="no better-ranked image has a perceptual hash within 3 of 64 bits",
    source="paper: the rule; ours: the method",
    columns={"duplicate_of": "string"},
    order=10,
    pool_wide=True,
    after_verdicts=True,  # an image that fails another rule must not displace one that passes
    keeps=_keeps,
)
