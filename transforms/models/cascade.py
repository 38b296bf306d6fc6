"""The cascade: run cheap models first, and expensive ones only where their score can matter. No verdict changes.

Our choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transforms.core import catalogue
from transforms.core.catalogue import CROSS_MODALITY, Score

if TYPE_CHECKING:
    from transforms.core.recipe import CrossModalitySettings
    from transforms.core.records import Annotation
    from transforms.cross_modality.digit import DigitSettings

PREPARATION_FAILED = "preparation_failed"
MODEL_FAILED = "model_failed"
NOT_FINITE = "not_finite"
"""Reasons of dead letters of samples that a model cannot score."""


def wanted(
    annotation: Annotation,
    min_cosine: float | None,
    min_match_probability: float | None = None,
    min_prompt_probability: float | None = None,
) -> bool:
    """Whether a later model scores a sample: its scores so far reach every known floor.

    `min_cosine` is the lowest flipped-CLIP cosine that can still be kept. With digit rescue that is the rescue's, so
    that samples between it and `min` are asked about digits. None means that there is no floor, or that it is not known
    yet (`keep_fraction`).
    """
    return (
        _reaches(annotation.flipped_clip_cosine, min_cosine)
        and _reaches(annotation.match_probability, min_match_probability)
        and _reaches(annotation.digit_prompt_probability, min_prompt_probability)
    )


def match_floor(settings: CrossModalitySettings) -> float | None:
    """The match probability below which the digit question is not asked."""
    return settings.image_text_matching.min if settings.image_text_matching else None


def prompt_floor(settings: DigitSettings) -> float | None:
    """The probability of CLIP's digit prompts below which the digit question is not asked."""
    return settings.clip_prompts.min_probability if settings.clip_prompts else None


def asked(annotation: Annotation, settings: CrossModalitySettings) -> list[str]:
    """The columns after flipped CLIP that `settings` need of a sample, as far as its known scores decide that.

    Whether a model runs can depend on the score of an earlier one that is not known yet.
    """
    floor, columns = settings.flipped_clip.cascade_min_cosine, []
    if settings.image_text_matching and wanted(annotation, floor):
        columns.append("match_probability")
    if settings.digit and wanted(annotation, floor, match_floor(settings), prompt_floor(settings.digit)):
        columns.append("digit_probability")
    for score in added_scores(settings):
        if score.annotator or wanted(annotation, floor):
            columns += score.columns
    return columns


def added_scores(settings: CrossModalitySettings) -> Iterator[Score[Any]]:
    """The scores and rules of other packages that are on."""
    for score in catalogue.scores_of(CROSS_MODALITY):
        if not score.is_built_in and getattr(settings, score.name) is not None:
            yield score


def pending(annotation: Annotation, settings: CrossModalitySettings) -> list[str]:
    """The columns of `asked` that are not computed yet."""
    return [column for column in asked(annotation, settings) if getattr(annotation, column) is None]


def unscored(annotation: Annotation, settings: CrossModalitySettings) -> list[str]:
    """The next column that `settings` need of this sample and that is not computed yet, if any."""
    if annotation.flipped_clip_cosine is None:
        return ["flipped_clip_cosine"]
    if settings.digit and settings.digit.clip_prompts and annotation.digit_prompt_probability is None:
        return ["digit_prompt_probability"]
    return pending(annotation, settings)[:1]


def _reaches(score: float | None, floor: float | None) -> bool:
    return floor is None or (score is not None and score >= floor)
