"""Making of a decoded picture all that the models of stage 2 look at, before any of them runs.

One decoding serves every model. What is made is small and of one size (bytes, not floats), so that the batches that
wait for a model have bounded memory, whatever sizes the pool's pictures have.
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
        """What one model looks at."""


@dataclasses.dataclass(frozen=True)
class PrepareSample:
    """Sample with pixels -> sample with the inputs of each rule's model, and without pixels and file."""

    preparations: Mapping[str, _Preparation]

    def __call__(self, sample: Sample) -> Sample:
        inputs = {rule: prepared_or_error(preparation, sample) for rule, preparation in self.preparations.items()}
        return Sample(sample.annotation, {}, b"", None, inputs)


def load_prepare(settings: recipe.CrossModality) -> PrepareSample:
    """The preparation for the models that are on; loads processors and tokenizers, no weights."""
    preparations: dict[str, _Preparation] = {ClipHandler.rule: ClipPreparation.load(settings.flipped_clip)}
    if settings.image_text_matching:
        preparations[BlipHandler.rule] = BlipPreparation.load(settings.image_text_matching)
    if settings.digit:
        preparations[Blip2Handler.rule] = Blip2Preparation.load(settings.digit)
    return PrepareSample(preparations)
