"""The digit question: does the image show a number? A score, not a rule: it rescues and enhances, but never drops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from transforms.core.catalogue import CROSS_MODALITY, Preparation, Score
from transforms.models.cascade import match_floor
from transforms.models.settings import ClipPromptsSettings, ModelSettings

if TYPE_CHECKING:  # Torch and Beam are imported when a model is needed
    from transforms.core.recipe import CrossModalitySettings
    from transforms.core.records import Annotation
    from transforms.models.blip2 import Blip2Handler


class DigitSettings(ModelSettings):
    """The question that BLIP-2 is asked. The score is p(yes) / (p(yes) + p(no)) of the first answer token, averaged
    over `prompts`. The bundled model is `bundled:digit`."""

    only_decide = frozenset({"clip_prompts"})  # they select the samples to ask about; CLIP's score of them is apart

    prompts: list[str] = Field(
        ["Question: is there any digit or number written in the image? Answer:"], min_length=1
    )
    clip_prompts: ClipPromptsSettings | None = None


def has_digits(annotation: Annotation, min_probability: float) -> bool:
    """Whether the image shows digits: digit probability >= `min_probability`. A sample that was not asked about has
    none. Source: the question is arXiv 2309.15954's; the score and its threshold are our choice."""
    return annotation.digit_probability is not None and annotation.digit_probability >= min_probability


def _handler(models: CrossModalitySettings) -> Blip2Handler:
    from transforms.models.blip2 import Blip2Handler

    floors = models.flipped_clip.cascade_min_cosine, match_floor(models)
    return Blip2Handler(models.digit, models.device, *floors, models.precision)


def _preparation(settings: DigitSettings) -> Preparation:
    from transforms.models.blip2 import Blip2Preparation

    return Blip2Preparation.load(settings)


def _identity(settings: DigitSettings) -> Mapping[str, Any]:
    from transforms.models.blip2 import preprocessing
    from transforms.models.weights import model_identity

    return {**model_identity(settings), "preprocessing": preprocessing(settings)}


DIGIT = Score(
    name="digit",
    stage=CROSS_MODALITY,
    settings=DigitSettings,
    summary="BLIP-2's probability that the image shows digits",
    source="paper: the question; ours: the score",
    columns={"digit_prompt_probability": "float32", "digit_probability": "float32"},
    value="digit_probability",
    order=30,
    handler=_handler,
    preparation=_preparation,
    identity=_identity,
)
