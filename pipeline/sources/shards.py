"""From shards to batches of decoded samples: the head of each per-shard stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import apache_beam as beam

from pipeline.recipe import PoolBounds
from pipeline.records import Annotation, DeadLetter, Sample, SampleBatch, Shard, dead_letter
from pipeline.sources.images import UndecodableImage, decode
from pipeline.sources.webdataset import read_samples


class Work(Protocol):
    """What a stage has to do on a shard. Decided on the worker, when the shard's turn comes, from the tables that
    exist then: not when the graph is built."""

    stage: str

    def is_finished(self, shard: Shard) -> bool:
        """Whether the shard's table is whole and made from the same inputs and settings."""

    def wanted(self, shard: Shard) -> dict[str, Annotation] | None:
        """The samples to read by key, as far as they are known; None for all of the shard."""


class ReadShards(beam.PTransform):
    """PCollection[Shard] -> batches of its samples (main output) and the shards that need no work (`FINISHED`)."""

    BATCHES, FINISHED = "batches", "finished"

    def __init__(self, work: Work, bounds: PoolBounds, batch_size: int, draft_side_px: int | None = None) -> None:
        super().__init__()
        self._read = _ReadShard(work, bounds, batch_size, draft_side_px)

    def expand(self, shards: beam.PCollection) -> beam.pvalue.DoOutputsTuple:
        return shards | "Read and decode" >> beam.ParDo(self._read).with_outputs(self.FINISHED, main=self.BATCHES)


class _ReadShard(beam.DoFn):
    def __init__(self, work: Work, bounds: PoolBounds, batch_size: int, draft_side_px: int | None) -> None:
        self._work, self._bounds = work, bounds
        self._batch_size, self._draft_side_px = batch_size, draft_side_px

    def process(self, shard: Shard) -> Iterator[SampleBatch | beam.pvalue.TaggedOutput]:
        shard = Shard(*shard)
        if self._work.is_finished(shard):
            yield beam.pvalue.TaggedOutput(ReadShards.FINISHED, shard)
        else:
            yield from _batches(shard, self._samples(shard), self._batch_size)

    def _samples(self, shard: Shard) -> Iterator[Sample | DeadLetter]:
        wanted = self._work.wanted(shard)
        if wanted is None:
            for found in read_samples(shard, self._bounds, self._work.stage):
                yield found if isinstance(found, DeadLetter) else self._decoded(found)
            return
        missing = dict(wanted)
        # What is already known to be broken was told by the stage that knows all of the shard.
        for found in read_samples(shard, self._bounds, self._work.stage) if wanted else ():
            key = found.key if isinstance(found, DeadLetter) else found.annotation.key
            annotation = missing.pop(key, None)
            if annotation is not None and isinstance(found, Sample):
                yield self._decoded(Sample(annotation, found.metadata, found.image_bytes))
            elif annotation is not None and isinstance(found, DeadLetter):
                yield found._replace(uid=annotation.uid)
        for annotation in missing.values():
            message = "stage 1 saw this sample, the tar no longer holds it whole"
            yield dead_letter(annotation, self._work.stage, "vanished", message)

    def _decoded(self, sample: Sample) -> Sample | DeadLetter:
        try:
            pixels, (width, height) = decode(
                sample.image_bytes, self._bounds.max_image_pixels, self._draft_side_px
            )
        except UndecodableImage as error:
            return dead_letter(sample.annotation, self._work.stage, error.reason, str(error))
        annotation = sample.annotation.with_columns(width_px=width, height_px=height)
        return Sample(annotation, sample.metadata, sample.image_bytes, pixels)


def _batches(
    shard: Shard, samples: Iterable[Sample | DeadLetter], batch_size: int
) -> Iterator[SampleBatch]:
    """Batches of `batch_size` samples in tar order; the last one may be smaller, or empty."""
    index = 0
    whole: list[Sample] = []
    letters: list[DeadLetter] = []
    for sample in samples:
        if isinstance(sample, DeadLetter):
            letters.append(sample)
            continue
        if len(whole) == batch_size:
            yield SampleBatch(shard, index, False, tuple(whole), tuple(letters))
            index, whole, letters = index + 1, [], []
        whole.append(sample)
    yield SampleBatch(shard, index, True, tuple(whole), tuple(letters))
