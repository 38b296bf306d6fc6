"""Adds the columns of a score to the samples of a batch."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import apache_beam as beam

from transforms.core.catalogue import Annotator, Score
from transforms.core.metrics import MODELS_LOADED, batch_ms, counter, load_ms, timed_ms
from transforms.core.records import DeadLetter, Sample, SampleBatch, dead_letter
from transforms.core.settings import Settings

THREADS = min(8, len(os.sched_getaffinity(0)))
"""Threads per process, at most: the cores that it may use, capped because much of the work holds the GIL."""


class Annotate(beam.PTransform):
    """PCollection[SampleBatch] -> PCollection[SampleBatch] with the columns of a score that has an annotator."""

    def __init__(self, score: Score[Any], settings: Settings) -> None:
        super().__init__()
        assert score.annotator, score.name
        make = functools.partial(score.annotator, settings)
        self._annotate = AnnotateSamples(score.name, score.stage, make, score.loads_model, score.thread_safe)

    def expand(self, batches: beam.PCollection[SampleBatch]) -> beam.PCollection[SampleBatch]:
        return batches | "Annotate" >> beam.ParDo(self._annotate).with_output_types(SampleBatch)


class AnnotateSamples(beam.DoFn):
    """Adds columns to every sample of a batch. A sample for which that fails becomes a dead letter with the reason
    `NAME_failed`.

    The annotator is made and loaded when the first sample arrives, so that shards that are complete load no model. If
    it is thread-safe, several threads each take a part of the batch.
    """

    def __init__(
        self,
        name: str,
        stage: str,
        make: Callable[[], Annotator],
        loads_model: bool = False,
        thread_safe: bool = False,
    ) -> None:
        self._name, self._stage, self._make, self._loads_model = name, stage, make, loads_model
        self._thread_safe = thread_safe
        self._annotator: Annotator | None = None

    def process(self, batch: SampleBatch) -> Iterator[SampleBatch]:
        annotator = self._annotator
        if annotator is None and batch.samples:
            annotator = self._load()
        with timed_ms(batch_ms(self._name)):
            annotated = functools.partial(self._annotated, annotator)
            parts = _parts(batch.samples, THREADS if self._thread_safe else 1)
            found = list(itertools.chain.from_iterable(_threads().map(annotated, parts)))
        samples = tuple(item for item in found if isinstance(item, Sample))
        letters = tuple(item for item in found if isinstance(item, DeadLetter))
        yield batch.replace(samples, letters)

    def _annotated(self, annotator: Annotator | None, samples: Sequence[Sample]) -> list[Sample | DeadLetter]:
        found: list[Sample | DeadLetter] = []
        for sample in samples:
            assert annotator is not None  # loaded with the first sample
            try:
                found.append(sample.annotated(**annotator.columns(sample)))
            except MemoryError:  # not the sample's fault
                raise
            except Exception as error:  # pool content can break any library; only this sample is lost, with a reason
                message = f"{type(error).__name__}: {error}"
                found.append(dead_letter(sample.annotation, self._stage, f"{self._name}_failed", message))
        return found

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


def _parts(samples: Sequence[Sample], count: int) -> list[Sequence[Sample]]:
    """At most `count` consecutive parts of a batch; none is empty."""
    size = max(1, -(-len(samples) // count))
    return [samples[start : start + size] for start in range(0, len(samples), size)]


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """The threads of this process, for all steps."""
    return ThreadPoolExecutor(THREADS, "annotate")
