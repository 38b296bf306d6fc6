"""Adds the columns of a score to the samples of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import apache_beam as beam

from transforms.core.catalogue import Annotator, Score
from transforms.core.metrics import MODELS_LOADED, batch_ms, counter, load_ms, timed_ms
from transforms.core.records import DeadLetter, Sample, SampleBatch, dead_letter
from transforms.core.settings import Settings


class Annotate(beam.PTransform):
    """PCollection[SampleBatch] -> PCollection[SampleBatch] with the columns of a score that has an annotator."""

    def __init__(self, score: Score[Any], settings: Settings) -> None:
        super().__init__()
        assert score.annotator, score.name
        make = functools.partial(score.annotator, settings)
        self._annotate = AnnotateSamples(score.name, score.stage, make, score.loads_model)

    def expand(self, batches: beam.PCollection[SampleBatch]) -> beam.PCollection[SampleBatch]:
        return batches | "Annotate" >> beam.ParDo(self._annotate).with_output_types(SampleBatch)


class AnnotateSamples(beam.DoFn):
    """Adds columns to every sample of a batch. A sample for which that fails becomes a dead letter with the reason
    `NAME_failed`.

    The annotator is made and loaded when the first sample arrives, so that shards that are complete load no model.
    """

    def __init__(self, name: str, stage: str, make: Callable[[], Annotator], loads_model: bool = False) -> None:
        self._name, self._stage, self._make, self._loads_model = name, stage, make, loads_model
        self._annotator: Annotator | None = None

    def process(self, batch: SampleBatch) -> Iterator[SampleBatch]:
        annotator = self._annotator
        if annotator is None and batch.samples:
            annotator = self._load()
        samples: list[Sample] = []
        letters: list[DeadLetter] = []
        with timed_ms(batch_ms(self._name)):
            for sample in batch:
                assert annotator is not None
                try:
                    samples.append(sample.annotated(**annotator.columns(sample)))
                except MemoryError:  # not the sample's fault
                    raise
                except (
                    Exception
                ) as error:  # pool content can break any library; only this sample is lost, with a reason
                    message = f"{type(error).__name__}: {error}"
                    letters.append(dead_letter(sample.annotation, self._stage, f"{self._name}_failed", message))
        yield batch.replace(tuple(samples), tuple(letters))

    def _load(self) -> Annotator:
        annotator = self._make()
        if self._loads_model:
            with timed_ms(load_ms(self._name)):
                annotator.load()
            counter(MODELS_LOADED).inc()
        else:
            annotator.load()
        self._annotator = annotator
        return annotator
