"""All deciding, in one place: the rules that are on, in order, and the first one that an annotation fails.

A rule is pure: it looks at one annotation and its settings. What only the whole pool can tell (how many images a
caption stands with, which image is the better duplicate) is a column by then.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, Recipe
from transforms.core.records import Annotation
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
    section = getattr(recipe, stage)
    predicates = _PREDICATES[stage]
    return [
        Rule(name, stage, functools.partial(_keeps, predicates[name], getattr(section, name), thresholds))
        for name in recipe.rule_order or recipe.active_rules
        if name in predicates
    ]


def first_failing(annotation: Annotation, rules: Sequence[Rule]) -> str | None:
    """Name of the first rule that the annotation fails; None where it passes all."""
    return next((rule.name for rule in rules if not rule.keeps(annotation)), None)


def _keeps(predicate: _Predicate, settings: Any, thresholds: Thresholds | None, annotation: Annotation) -> bool:
    return predicate(annotation, settings, thresholds)


# An annotation, the rule's settings, and the thresholds in force -> keep or drop.
_Predicate = Callable[[Any, Any, Any], bool]

_PREDICATES: dict[str, dict[str, _Predicate]] = {
    SINGLE_MODALITY: {
        "near_duplicate": lambda a, s, _: near_duplicate.keeps(a.duplicate_of),
        "caption_length": lambda a, s, _: captions.keeps_length(a.word_count, a.character_count, s),
        "language": lambda a, s, _: language.keeps(a.language, s.allowed),
        "pos_pattern": lambda a, s, _: pos_pattern.keeps(a.pos_tags, any_of=s.any_of, only_of=s.only_of),
        "caption_frequency": lambda a, s, _: captions.keeps_frequency(a.caption_image_count, a.pool_samples, s),
        "aspect_ratio": lambda a, s, _: image_shape.keeps_aspect_ratio(a.original_width_px, a.original_height_px, s),
        "min_side": lambda a, s, _: image_shape.keeps_min_side(a.original_width_px, a.original_height_px, s),
        "face_area": lambda a, s, _: faces.keeps(a.face_area_share, s.max_share),
    },
    CROSS_MODALITY: {
        "flipped_clip": lambda a, s, t: flipped_clip.keeps(a, s, t.flipped_clip_min_cosine),
        "image_text_matching": lambda a, s, t: image_text_matching.keeps(a, s, t.image_text_matching_min_probability),
    },
    DISTRIBUTION_ALIGNMENT: {
        "semantic_dedup": lambda a, s, _: a.semantic_duplicate_of is None,
    },
}
