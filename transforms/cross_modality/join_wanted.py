"""Joins batches for the models after CLIP, so that little of their fixed batch shapes is padding.

CLIP's batches are full, but the cascade removes samples from them, and BLIP splits the rest by caption length. Batches
of one shard are therefore joined until they have enough samples for the later models. A sample that no later model
needs keeps only its annotation, so a joined batch has bounded memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import apache_beam as beam

from transforms.core import catalogue
from transforms.core.recipe import CrossModalitySettings
from transforms.core.records import Sample, SampleBatch
from transforms.models.cascade import pending

_MIN_MODEL_BATCHES = 16  # model batches that a joined batch fills; with 3 buckets half full, a tenth is padding
_MAX_SAMPLES = 1024  # limit that also counts samples without model inputs


class JoinWanted(beam.PTransform):
    """SampleBatch -> fewer and larger SampleBatch, in order. Scores do not depend on how samples are batched."""

    def __init__(self, models: CrossModalitySettings) -> None:
        super().__init__()
        self._models = models

    def expand(self, batches: beam.PCollection[SampleBatch]) -> beam.PCollection[SampleBatch]:
        return batches | "Join" >> beam.ParDo(_Join(self._models)).with_output_types(SampleBatch)


class _Join(beam.DoFn):
    def __init__(self, models: CrossModalitySettings) -> None:
        self._models = models
        sections = (getattr(models, score.name) for score in catalogue.model_scores()[1:])
        sizes = [section.batch_size for section in sections if section]
        self._enough = _MIN_MODEL_BATCHES * max(sizes)

    def start_bundle(self) -> None:
        self._held: list[SampleBatch] = []
        self._wanted = 0
        self._index = 0

    def process(self, batch: SampleBatch) -> Iterator[SampleBatch]:
        if batch.index == 0 or batch.attempt.out_of_memory:
            self.start_bundle()
        if batch.attempt.out_of_memory:  # the attempt failed: drop its samples, and pass the batch on to the writer
            yield batch
            return
        self._held.append(dataclasses.replace(batch, samples=tuple(map(self._slim, batch))))
        self._wanted += sum(bool(sample.inputs) for sample in self._held[-1])
        if batch.last or self._wanted >= self._enough or sum(len(held) for held in self._held) >= _MAX_SAMPLES:
            yield joined(self._held, self._index)
            self._held, self._wanted, self._index = [], 0, self._index + 1

    def _slim(self, sample: Sample) -> Sample:
        return sample if pending(sample.annotation, self._models) else dataclasses.replace(sample, inputs={})


def joined(batches: list[SampleBatch], index: int) -> SampleBatch:
    """Join consecutive batches of one shard into one with the given index."""
    return dataclasses.replace(
        batches[-1],
        index=index,
        samples=tuple(sample for batch in batches for sample in batch),
        dead_letters=tuple(letter for batch in batches for letter in batch.dead_letters),
    )
