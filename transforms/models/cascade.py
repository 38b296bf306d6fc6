"""Cheap before dear: which samples the later models look at (our choice; no verdict changes)."""

from __future__ import annotations

from transforms.core import recipe
from transforms.core.records import Annotation


def wanted(
    annotation: Annotation,
    min_cosine: float | None,
    min_match_probability: float | None = None,
    min_prompt_probability: float | None = None,
) -> bool:
    """Whether a later model is asked about a sample: it reaches every floor known beforehand.

    `min_cosine` is the lowest flipped-CLIP cosine that can still be kept, so with digit rescue on
    it is the rescue's: a sample between that and `min` must be asked about digits. None means that
    no floor is known (`keep_fraction`), or that the setting is off.
    """
    return (
        _reaches(annotation.flipped_clip_cosine, min_cosine)
        and _reaches(annotation.match_probability, min_match_probability)
        and _reaches(annotation.digit_prompt_probability, min_prompt_probability)
    )


def match_floor(settings: recipe.CrossModality) -> float | None:
    """The match probability below which nobody needs to be asked about digits."""
    return settings.image_text_matching.min if settings.image_text_matching else None


def prompt_floor(settings: recipe.Digit) -> float | None:
    """The share of CLIP's digit prompts below which nobody needs to be asked about digits."""
    return settings.clip_prompts.min_probability if settings.clip_prompts else None


def asked(annotation: Annotation, settings: recipe.CrossModality) -> list[str]:
    """The columns of the later models that `settings` need of a sample scored by flipped CLIP, as far as its scores
    tell: what comes after an unknown score in the cascade is known only once that is there."""
    floor, columns = settings.flipped_clip.cascade_min_cosine, []
    if settings.image_text_matching and wanted(annotation, floor):
        columns.append("match_probability")
    if settings.digit and wanted(annotation, floor, match_floor(settings), prompt_floor(settings.digit)):
        columns.append("digit_probability")
    return columns


def pending(annotation: Annotation, settings: recipe.CrossModality) -> list[str]:
    """What of `asked` is not there yet."""
    return [column for column in asked(annotation, settings) if getattr(annotation, column) is None]


def unscored(annotation: Annotation, settings: recipe.CrossModality) -> list[str]:
    """The next column that `settings` need of this sample and that was never computed, if any.

    What comes after it in the cascade is known only once it is there.
    """
    if annotation.flipped_clip_cosine is None:
        return ["flipped_clip_cosine"]
    if settings.digit and settings.digit.clip_prompts and annotation.digit_prompt_probability is None:
        return ["digit_prompt_probability"]
    return pending(annotation, settings)[:1]


def _reaches(score: float | None, floor: float | None) -> bool:
    return floor is None or (score is not None and score >= floor)
