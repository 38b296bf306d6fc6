"""The digit question: does the picture show a number? A score; it rescues and never drops."""

from __future__ import annotations

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference

from transforms.core import recipe
from transforms.core.records import Annotation, SampleBatch
from transforms.models.blip2 import Blip2Handler
from transforms.models.cascade import match_floor


def has_digits(annotation: Annotation, min_probability: float) -> bool:
    """Whether the picture shows digits: digit probability >= `min_probability` (the question is
    arXiv 2309.15954's, the score and its threshold are our choice). A sample nobody was asked about
    has none."""
    return annotation.digit_probability is not None and annotation.digit_probability >= min_probability


class Digit(beam.PTransform):
    """Asks the digit question about what the models before it do not drop already."""

    def __init__(self, models: recipe.CrossModality) -> None:
        super().__init__()
        assert models.digit
        floors = models.flipped_clip.cascade_min_cosine, match_floor(models)
        self._handler = Blip2Handler(models.digit, models.device, *floors, models.precision)

    def expand(self, batches: beam.PCollection[SampleBatch]) -> beam.PCollection[SampleBatch]:
        return batches | "Ask for digits" >> RunInference(self._handler).with_output_types(SampleBatch)
