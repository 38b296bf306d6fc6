"""Runs the model of a score through RunInference."""

from __future__ import annotations

from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference

from transforms.core.catalogue import Score
from transforms.core.recipe import CrossModalitySettings
from transforms.core.records import SampleBatch


class ScoreByModel(beam.PTransform):
    """PCollection[SampleBatch] -> PCollection[SampleBatch] with the columns of a score that has a model handler.

    `calls` calls of the model run at once on a CPU.
    """

    def __init__(self, score: Score[Any], models: CrossModalitySettings, calls: int = 1) -> None:
        super().__init__()
        assert score.handler, score.name
        self._handler = score.handler(models)
        self._handler.calls = calls

    def expand(self, batches: beam.PCollection[SampleBatch]) -> beam.PCollection[SampleBatch]:
        return batches | "Score" >> RunInference(self._handler).with_output_types(SampleBatch)
