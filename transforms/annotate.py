"""The one way in which features are added to the samples of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam

from transforms.core.metrics import MODELS_LOADED, batch_ms, counter, load_ms, timed_ms
from transforms.core.records import DeadLetter, Sample, SampleBatch, dead_letter


class AnnotateSamples(beam.DoFn):
    """Adds columns to every sample of a batch; a sample for which that fails becomes a dead letter.

    Subclasses name their `stage` and `reason`, and say in `columns` what they add.
    """

    stage: str
    reason: str

    @property
    def step(self) -> str:
        """What its metrics are named after."""
        return self.reason.removesuffix("_failed")

    def columns(self, sample: Sample) -> dict[str, Any]:
        """The annotation columns to add, by name."""
        raise TypeError(f"{type(self).__name__} does not say which columns it adds")

    def process(self, batch: SampleBatch) -> Iterator[SampleBatch]:
        samples: list[Sample] = []
        letters: list[DeadLetter] = []
        with timed_ms(batch_ms(self.step)):
            for sample in batch:
                try:
                    samples.append(sample.annotated(**self.columns(sample)))
                except MemoryError:  # no sample's fault
                    raise
                except Exception as error:  # pool content may break any library; the sample says why, and only it goes
                    message = f"{type(error).__name__}: {error}"
                    letters.append(dead_letter(sample.annotation, self.stage, self.reason, message))
        yield batch.replace(tuple(samples), tuple(letters))


class AnnotateByModel(AnnotateSamples):
    """As AnnotateSamples, by a model that is loaded when the first sample comes: over finished shards none is."""

    _is_loaded = False

    def load(self) -> None:
        """Load what `columns` asks."""
        raise TypeError(f"{type(self).__name__} does not say which model it loads")

    def process(self, batch: SampleBatch) -> Iterator[SampleBatch]:
        if batch.samples and not self._is_loaded:
            with timed_ms(load_ms(self.step)):
                self.load()
            self._is_loaded = True
            counter(MODELS_LOADED).inc()
        yield from super().process(batch)
