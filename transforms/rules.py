"""All deciding, in one place: the rules that are on, in order, and the first one that an annotation fails.

A rule is pure: it looks at one annotation and its settings. What only the whole pool can tell (how many images a caption
stands with, which image is the better duplicate) is a column by then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pipeline.records import Annotation
from pipeline.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, Recipe
from transforms.cross_modality import flipped_clip, image_text_matching
from transforms.single_modality import (
    captions,
    faces,
    image_shape,
    language,
    near_duplicate,
    pos_pattern,
)


class Thresholds(NamedTuple):
    """The score thresholds in force: the recipe's `min`, or what its `keep_fraction` came to over this pool."""

    flipped_clip_min_cosine: float
    image_text_matching_min_probability: float


@dataclasses.dataclass(frozen=True)
class Rule:
    """A named predicate over annotations: keep or drop."""

    name: str
    stage: str
    keeps: Callable[[Annotation], bool]


def rules_of(recipe: Recipe, stage: str, thresholds: Thresholds | None = None) -> list[Rule]:
    """The rules of one stage that are on, in the recipe's order. Stage 2 needs the resolved thresholds."""
    order = recipe.rule_order or recipe.active_rules
    predicates = _PREDICATES[stage](recipe, thresholds)
    return [Rule(name, stage, predicates[name]) for name in order if name in predicates]


def first_failing(annotation: Annotation, rules: Sequence[Rule]) -> str | None:
    """Name of the first rule that the annotation fails; None where it passes all."""
    return next((rule.name for rule in rules if not rule.keeps(annotation)), None)


def _single_modality(recipe: Recipe, _: Thresholds | None) -> dict[str, Callable[[Any], bool]]:
    s = recipe.single_modality
    return {
        "near_duplicate": lambda a: near_duplicate.keeps(a.duplicate_of),
        "caption_length": lambda a: captions.keeps_length(a.word_count, a.character_count, s.caption_length),
        "language": lambda a: language.keeps(a.language, s.language.allowed),
        "pos_pattern": lambda a: pos_pattern.keeps(
            a.pos_tags, any_of=s.pos_pattern.any_of, only_of=s.pos_pattern.only_of
        ),
        "caption_frequency": lambda a: captions.keeps_frequency(
            a.caption_image_count, a.pool_samples, s.caption_frequency
        ),
        "aspect_ratio": lambda a: image_shape.keeps_aspect_ratio(
            a.original_width_px, a.original_height_px, s.aspect_ratio
        ),
        "min_side": lambda a: image_shape.keeps_min_side(
            a.original_width_px, a.original_height_px, s.min_side
        ),
        "face_area": lambda a: faces.keeps(a.face_area_share, s.face_area.max_share),
    }


def _cross_modality(recipe: Recipe, thresholds: Thresholds | None) -> dict[str, Callable[[Any], bool]]:
    assert thresholds is not None
    s = recipe.cross_modality
    return {
        "flipped_clip": lambda a: flipped_clip.keeps(a, s.flipped_clip, thresholds.flipped_clip_min_cosine),
        "image_text_matching": lambda a: image_text_matching.keeps(
            a, s.image_text_matching, thresholds.image_text_matching_min_probability
        ),
    }


def _distribution_alignment(_: Recipe, __: Thresholds | None) -> dict[str, Callable[[Any], bool]]:
    return {"semantic_dedup": lambda a: a.semantic_duplicate_of is None}


_PREDICATES: dict[str, Any] = {
    SINGLE_MODALITY: _single_modality,
    CROSS_MODALITY: _cross_modality,
    DISTRIBUTION_ALIGNMENT: _distribution_alignment,
}
