"""Flipped CLIP: caption and image must agree even if the text in the image cannot be read.

Source: arXiv 2309.15954, which scores horizontally flipped images and keeps cosines of at least 0.19 (with OpenAI's
ViT-L/14). Digit rescue is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pydantic

from transforms.core.catalogue import CROSS_MODALITY, Preparation, Rule
from transforms.core.settings import Cosine, Settings, Share, ThresholdSettings
from transforms.models.settings import ClipModelSettings

if TYPE_CHECKING:  # Torch and Beam are imported when a model is needed
    from transforms.core.recipe import CrossModalitySettings
    from transforms.core.records import Annotation
    from transforms.models.clip import ClipHandler


class DigitRescueSettings(Settings):
    """A sample with digit probability >= `min_digit_probability` needs only `min_cosine` (our choice)."""

    min_digit_probability: Share = 0.5
    min_cosine: Cosine


class FlippedClipSettings(ClipModelSettings, ThresholdSettings):
    """Cosine of caption and horizontally flipped image."""

    only_decide = ThresholdSettings.only_decide | {"digit_rescue"}

    min: Cosine | None = None
    score_unflipped: bool = False
    digit_rescue: DigitRescueSettings | None = None

    @pydantic.model_validator(mode="after")
    def _rescue_is_lower(self) -> FlippedClipSettings:
        if self.digit_rescue:
            if self.min is None:
                raise ValueError("`digit_rescue` needs `min`, not `keep_fraction`")
            if self.digit_rescue.min_cosine > self.min:
                raise ValueError("`digit_rescue.min_cosine` must not exceed `min`")
        return self

    @property
    def cascade_min_cosine(self) -> float | None:
        """The cosine below which no later model needs to run; None if it is known only once the pool is scored."""
        return self.digit_rescue.min_cosine if self.digit_rescue else self.min


def keeps(annotation: Annotation, settings: FlippedClipSettings) -> bool:
    """Whether the rule keeps a sample.

        cos(caption, flipped image) >= min        (arXiv 2309.15954, "flipped-CLIP")

    Digit rescue (our choice, off by default): flipping hurts images of digits most, so a sample with digit probability
    >= `digit_rescue.min_digit_probability` needs only `digit_rescue.min_cosine`. Raises ValueError for a sample that
    was never scored.
    """
    cosine = annotation.flipped_clip_cosine
    if cosine is None:
        raise ValueError(f"sample {annotation.uid} has no flipped_clip_cosine")
    assert settings.min is not None
    if cosine >= settings.min:
        return True
    rescue = settings.digit_rescue
    digit = annotation.digit_probability
    return (
        rescue is not None
        and digit is not None
        and digit >= rescue.min_digit_probability
        and cosine >= rescue.min_cosine
    )


def _check(settings: FlippedClipSettings, models: CrossModalitySettings) -> None:
    if settings.digit_rescue and not models.digit:
        raise ValueError("`flipped_clip.digit_rescue` needs the section `digit`")


def _handler(models: CrossModalitySettings) -> ClipHandler:
    from transforms.models.clip import ClipHandler

    prompts = models.digit.clip_prompts if models.digit else None
    return ClipHandler(models.flipped_clip, models.device, models.precision, prompts)


def _preparation(settings: FlippedClipSettings) -> Preparation:
    from transforms.models.clip import ClipPreparation

    return ClipPreparation.load(settings)


def _identity(settings: FlippedClipSettings) -> Mapping[str, Any]:
    from transforms.models.clip import preprocessing
    from transforms.models.weights import model_identity

    return {**model_identity(settings), "preprocessing": preprocessing(settings)}


FLIPPED_CLIP = Rule(
    name="flipped_clip",
    stage=CROSS_MODALITY,
    settings=FlippedClipSettings,
    summary="cosine of caption and horizontally flipped image ≥ 0.19",
    source="paper",
    columns={"flipped_clip_cosine": "float32", "unflipped_clip_cosine": "float32", "embedding": "binary"},
    value="flipped_clip_cosine",
    threshold="min",
    keeps_if="at_least",
    order=10,
    title="Flipped CLIP",
    required=True,  # later stages need its embeddings
    handler=_handler,
    preparation=_preparation,
    identity=_identity,
    keeps=keeps,
    check=_check,
)
