"""The cascade: run cheap models first, and later models only on samples that can still be kept.

Our choice. It saves computing and changes no verdict.
"""

from __future__ import annotations

from transforms.core import recipe
from transforms.core.records import Annotation


def wanted(
    annotation: Annotation,
    min_cosine: float | None,
    min_match_probability: float | None = None,
    min_prompt_probability: float | None = None,
) -> bool:
    """Whether a later model scores this sample: its scores so far reach every floor that is known in advance.

    `min_cosine` is the lowest flipped-CLIP cosine that can still be kept. With digit rescue on, that is `rescue_min`,
    because a sample between `rescue_min` and `min` still needs a digit score. None means that no floor is known (as
    with `keep_fraction`) or that the setting is off.
    """
    return (
        _reaches(annotation.flipped_clip_cosine, min_cosine)
        and _reaches(annotation.match_probability, min_match_probability)
        and _reaches(annotation.digit_prompt_probability, min_prompt_probability)
    )


def match_floor(settings: recipe.CrossModality) -> float | None:
    """The match probability below which a sample needs no digit score; None without image-text matching."""
    return settings.image_text_matching.min if settings.image_text_matching else None


def prompt_floor(settings: recipe.Digit) -> float | None:
    """The `digit_prompt_probability` below which a sample needs no digit score; None without CLIP prompts."""
    return settings.clip_prompts.min_probability if settings.clip_prompts else None


def asked(annotation: Annotation, settings: recipe.CrossModality) -> list[str]:
    """The columns that the models after flipped CLIP must fill in for a sample that flipped CLIP has scored.

    A column that depends on a missing score is not listed; call again once that score is known.
    """
    floor, columns = settings.flipped_clip.cascade_min_cosine, []
    if settings.image_text_matching and wanted(annotation, floor):
        columns.append("match_probability")
    if settings.digit and wanted(annotation, floor, match_floor(settings), prompt_floor(settings.digit)):
        columns.append("digit_probability")
    return columns


def pending(annotation: Annotation, settings: recipe.CrossModality) -> list[str]:
    """The columns of `asked` that are still None."""
    return [column for column in asked(annotation, settings) if getattr(annotation, column) is None]


def unscored(annotation: Annotation, settings: recipe.CrossModality) -> list[str]:
    """The next column of the cascade that `settings` need for this sample and that is still None.

    At most one: whether later columns are needed depends on it.
    """
    if annotation.flipped_clip_cosine is None:
        return ["flipped_clip_cosine"]
    if settings.digit and settings.digit.clip_prompts and annotation.digit_prompt_probability is None:
        return ["digit_prompt_probability"]
    return pending(annotation, settings)[:1]


def _reaches(score: float | None, floor: float | None) -> bool:
    return floor is None or (score is not None and score >= floor)
