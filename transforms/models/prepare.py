"""Preparing the inputs of all stage-2 models from a decoded image, before any model runs.

Each image is decoded once for all models. The inputs are small and of fixed size (bytes, not floats), so batches that
wait for a model use bounded memory, however large the images of the pool are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from transforms.core import recipe
from transforms.core.records import Sample
from transforms.models.blip import BlipHandler, BlipPreparation
from transforms.models.blip2 import Blip2Handler, Blip2Preparation
from transforms.models.clip import ClipHandler, ClipPreparation
from transforms.models.handler import prepared_or_error


class _Preparation(Protocol):
    def prepare(self, sample: Sample) -> Any:
        """The inputs of one model."""


@dataclasses.dataclass(frozen=True)
class PrepareSample:
    """Replaces the file and pixels of a decoded sample by the inputs of each model.

    `preparations` maps a rule to the preparation of its model. Where a preparation raises, the exception takes the
    place of the inputs (see `Sample.inputs`).
    """

    preparations: Mapping[str, _Preparation]

    def __call__(self, sample: Sample) -> Sample:
        inputs = {rule: prepared_or_error(preparation, sample) for rule, preparation in self.preparations.items()}
        return Sample(sample.annotation, {}, b"", None, inputs)


def load_prepare(settings: recipe.CrossModality) -> PrepareSample:
    """The `PrepareSample` for all enabled models. Loads processors and tokenizers, but no weights."""
    preparations: dict[str, _Preparation] = {ClipHandler.rule: ClipPreparation.load(settings.flipped_clip)}
    if settings.image_text_matching:
        preparations[BlipHandler.rule] = BlipPreparation.load(settings.image_text_matching)
    if settings.digit:
        preparations[Blip2Handler.rule] = Blip2Preparation.load(settings.digit)
    return PrepareSample(preparations)
