"""Image-text matching: BLIP looks at image and caption together. Source: arXiv 2309.15954; the threshold is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from transforms.core.catalogue import CROSS_MODALITY, Preparation, Rule
from transforms.core.settings import Share, ThresholdSettings
from transforms.models.settings import ModelSettings

if TYPE_CHECKING:  # Torch and Beam are imported when a model is needed
    from transforms.core.recipe import CrossModalitySettings
    from transforms.core.records import Annotation
    from transforms.models.blip import BlipHandler


class ImageTextMatchingSettings(ModelSettings, ThresholdSettings):
    """BLIP's probability that caption and image match. The bundled model is `bundled:itm`."""

    min: Share | None = None
    max_tokens: int = Field(64, ge=8, le=512)


def keeps(annotation: Annotation, settings: ImageTextMatchingSettings) -> bool:
    """Whether the rule keeps a sample.

        p(match | image, caption) >= min      (arXiv 2309.15954, "BLIP-ITM")

    A sample that failed flipped CLIP is not scored. This rule keeps it, and flipped CLIP drops it, whatever the order
    of the two. `cascade.unscored` makes sure that no sample is unscored for another reason.
    """
    assert settings.min is not None
    return annotation.match_probability is None or annotation.match_probability >= settings.min


def _handler(models: CrossModalitySettings) -> BlipHandler:
    from transforms.models.blip import BlipHandler

    floor = models.flipped_clip.cascade_min_cosine
    return BlipHandler(models.image_text_matching, models.device, floor, models.precision)


def _preparation(settings: ImageTextMatchingSettings) -> Preparation:
    from transforms.models.blip import BlipPreparation

    return BlipPreparation.load(settings)


def _identity(settings: ImageTextMatchingSettings) -> Mapping[str, Any]:
    from transforms.models.blip import preprocessing
    from transforms.models.weights import model_identity

    return {**model_identity(settings), "preprocessing": preprocessing(settings)}


IMAGE_TEXT_MATCHING = Rule(
    name="image_text_matching",
    stage=CROSS_MODALITY,
    settings=ImageTextMatchingSettings,
    summary="BLIP's probability of a match ≥ 0.5",
    source="paper: BLIP-ITM; ours: the threshold",
    columns={"match_probability": "float32"},
    value="match_probability",
    threshold="min",
    keeps_if="at_least",
    order=20,
    title="Image-text matching",
    handler=_handler,
    preparation=_preparation,
    identity=_identity,
    keeps=keeps,
)
