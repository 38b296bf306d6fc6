"""Makes the inputs of all models of stage 2 from one decoded image, before any model runs.

Each image is decoded once for all models. The inputs are small and of one size (bytes, not floats), so the batches that
wait for a model use bounded memory, whatever the sizes of the pool's images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from transforms.core import catalogue
from transforms.core.catalogue import Preparation
from transforms.core.recipe import CrossModalitySettings
from transforms.core.records import Sample
from transforms.models.handler import prepared_or_error


@dataclasses.dataclass(frozen=True)
class PrepareSample:
    """Sample with pixels -> sample with the inputs of each model by the name of its score, without pixels and bytes."""

    preparations: Mapping[str, Preparation]

    def __call__(self, sample: Sample) -> Sample:
        inputs = {name: prepared_or_error(preparation, sample) for name, preparation in self.preparations.items()}
        return Sample(sample.annotation, {}, b"", None, inputs)


def load_prepare(settings: CrossModalitySettings) -> PrepareSample:
    """The preparation for the models that are on. Loads processors and tokenizers, but no weights."""
    preparations = {}
    for score in catalogue.model_scores():
        section = getattr(settings, score.name)
        if section is not None and score.preparation:
            preparations[score.name] = score.preparation(section)
    return PrepareSample(preparations)
