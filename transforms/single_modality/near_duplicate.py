"""Near-duplicate images: a better-ranked image has nearly the same perceptual hash and thumbnail.

`hash_neighbours` finds them, `pool_wide.NearDuplicate` is the step, and `duplicate_groups` decides which member of a
group stands once stage 2 has scored them. Source: paper (the rule); how is our choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from transforms.core.catalogue import SINGLE_MODALITY, Rule
from transforms.core.settings import Settings

if TYPE_CHECKING:
    from transforms.core.records import Annotation


class NearDuplicateSettings(Settings):
    """Two images are near-duplicates if their hashes and their thumbnails are.

    Hashes: one of the four fields of 16 bits is equal, and at most `max_hamming` of 64 bits differ. With 3 or less, a
    field is always equal. Thumbnails: no cell differs by more than `max_cell_steps`, of 17 grey levels or 8 of chroma
    each, besides one step by which all of the image is brighter or darker.

    Stage 2 scores the keeper of a group and at most `further_members` others, the best-ranked ones. If a later rule
    drops the keeper, the best of them that survives stands in its place.
    """

    max_hamming: int = Field(8, ge=0, le=16)
    max_cell_steps: int = Field(1, ge=0, le=15)
    further_members: int = Field(4, ge=0, le=1000)


def keeps(duplicate_of: str | None) -> bool:
    """Whether no other member of its group of near-duplicates stands in the sample's place."""
    return duplicate_of is None


def as_contender(annotation: Annotation) -> Annotation:
    """The annotation as the other rules judge it: a member of a group that stage 2 scores is no duplicate yet."""
    if annotation.duplicate_of is None or annotation.near_duplicate_rank is None:
        return annotation
    return annotation.with_columns(duplicate_of=None)


def _keeps(annotation: Annotation, settings: NearDuplicateSettings) -> bool:
    return keeps(annotation.duplicate_of)


NEAR_DUPLICATE = Rule(
    name="near_duplicate",
    stage=SINGLE_MODALITY,
    settings=NearDuplicateSettings,
    summary="no better-ranked image has nearly the same perceptual hash and thumbnail",
    source="paper: the rule; ours: the method",
    columns={"duplicate_of": "string", "near_duplicate_group": "string", "near_duplicate_rank": "int32"},
    order=10,
    pool_wide=True,
    after_verdicts=True,  # an image that fails another rule must not displace one that passes
    keeps=_keeps,
)
