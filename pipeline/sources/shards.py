"""From shards to batches of decoded samples: the head of each per-shard stage."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

import apache_beam as beam

from pipeline.decoding.images import UndecodableImage
from pipeline.decoding.watched_decoder import Decode, decoder_of
from pipeline.sources.prefetch import in_order, in_turns
from pipeline.sources.webdataset import Reading, check_unchanged, read_samples
from transforms.core.metrics import (
    DECODE_BATCH_MS,
    PICTURES_DECODED,
    SHARDS_FINISHED_BEFORE,
    TAR_BYTES_READ,
    TARS_OPENED,
    counter,
    distribution,
)
from transforms.core.recipe import PoolSettings
from transforms.core.records import Annotation, Attempt, DeadLetter, Sample, SampleBatch, Shard, dead_letter

# Of a process; the cores that it may use, and no more pictures at full size at once than memory bears.
DECODE_THREADS = min(8, len(os.sched_getaffinity(0)))


_Wanted = dict[str, Annotation] | None


class Work(Protocol):
    """What a stage has to do on a shard. Decided on the worker, when the shard's turn comes, from the tables that
    exist then: not when the graph is built."""

    stage: str

    def is_complete(self, shard: Shard) -> bool:
        """Whether the shard's table is whole and holds all that the stage wants."""

    def wanted(self, shard: Shard) -> _Wanted:
        """The samples to read by key, as far as they are known; None for all of the shard."""

    def in_progress(self, shard: Shard) -> str:
        """The path of the mark that lies there while the shard is worked on."""


Prepare = Callable[[Sample], Sample]
"""Makes of a decoded sample what the stage's models look at."""


class ReadShards(beam.PTransform):
    """PCollection[Shard] -> batches of its samples (main output) and the shards that need no work (`FINISHED`).

    Threads decode batches, and prepare them where `load_prepare` is given: while the fused stage is busy with the
    batch before, or with `in_turns` only when it is done with that. `load_prepare` is called once per worker, and only
    where a shard needs work.
    """

    BATCHES, FINISHED = "batches", "finished"

    def __init__(
        self,
        work: Work,
        bounds: PoolSettings,
        batch_size: int,
        draft_side_px: int | None = None,
        load_prepare: Callable[[], Prepare] | None = None,
        in_turns: bool = False,
    ) -> None:
        super().__init__()
        self._read = _ReadShard(work, bounds, batch_size, draft_side_px, load_prepare, in_turns)

    def expand(self, shards: beam.PCollection) -> beam.pvalue.DoOutputsTuple:
        read = beam.ParDo(self._read).with_output_types(SampleBatch)
        return shards | "Read and decode" >> read.with_outputs(self.FINISHED, main=self.BATCHES)


class _ReadShard(beam.DoFn):
    def __init__(
        self,
        work: Work,
        bounds: PoolSettings,
        batch_size: int,
        draft_side_px: int | None,
        load_prepare: Callable[[], Prepare] | None,
        turns: bool,
    ) -> None:
        self._work, self._bounds = work, bounds
        self._batch_size, self._draft_side_px = batch_size, draft_side_px
        self._load_prepare, self._threaded = load_prepare, in_turns if turns else in_order
        self._prepare: Prepare | None = None

    def process(self, shard: Shard) -> Iterator[SampleBatch | beam.pvalue.TaggedOutput]:
        shard = Shard(*shard)
        if self._work.is_complete(shard):
            counter(SHARDS_FINISHED_BEFORE).inc()
            yield beam.pvalue.TaggedOutput(ReadShards.FINISHED, shard)
            return
        if self._load_prepare and self._prepare is None:
            self._prepare = self._load_prepare()
        with decoder_of(self._work.in_progress(shard), self._bounds.max_decode_seconds) as decode:
            yield from self._tries(shard, decode)

    def _tries(self, shard: Shard, decode: Decode) -> Iterator[SampleBatch]:
        wanted, attempt = self._work.wanted(shard), Attempt()
        decoding = _Decoding(decode)
        while True:
            if wanted is None or wanted:
                counter(TARS_OPENED).inc()
            reading = Reading()
            due = reading.keys if wanted is None else list(wanted)
            with contextlib.closing(self._decoded_samples(shard, wanted, decoding, reading)) as samples:
                for batch in _batches(shard, samples, self._batch_size, attempt, due):
                    decoding.report()
                    yield batch  # the stage's models look at it before the next line runs
                    if attempt.out_of_memory:
                        break
            counter(TAR_BYTES_READ).inc(reading.size_bytes)
            if not attempt.out_of_memory:
                return
            attempt = attempt.smaller()

    def _decoded_samples(
        self, shard: Shard, wanted: _Wanted, decode: Decode, reading: Reading
    ) -> Generator[Sample | DeadLetter, None, None]:
        decoded = functools.partial(self._decoded, decode)
        return self._threaded(decoded, self._samples(shard, wanted, reading), DECODE_THREADS, self._batch_size)

    def _samples(self, shard: Shard, wanted: _Wanted, reading: Reading) -> Iterator[Sample | DeadLetter]:
        if wanted is None:
            yield from read_samples(shard, self._bounds, self._work.stage, reading)
            check_unchanged(shard)
            return
        missing = dict(wanted)
        # What is already known to be broken was told by the stage that knows all of the shard.
        for found in read_samples(shard, self._bounds, self._work.stage, reading) if wanted else ():
            key = found.key if isinstance(found, DeadLetter) else found.annotation.key
            annotation = missing.pop(key, None)
            if annotation is not None and isinstance(found, Sample):
                yield Sample(annotation, found.metadata, found.image_bytes)
            elif annotation is not None and isinstance(found, DeadLetter):
                yield found._replace(uid=annotation.uid)
        if wanted:
            check_unchanged(shard)
        for annotation in missing.values():
            message = "stage 1 saw this sample, the tar no longer holds it whole"
            yield dead_letter(annotation, self._work.stage, "vanished", message)

    def _decoded(self, decode: Decode, sample: Sample | DeadLetter) -> Sample | DeadLetter:
        if isinstance(sample, DeadLetter):
            return sample
        try:
            pixels, (width, height) = decode(
                sample.image_bytes, self._bounds.max_image_pixels, self._draft_side_px
            )
        except UndecodableImage as error:
            return dead_letter(sample.annotation, self._work.stage, error.reason, str(error))
        annotation = sample.annotation.with_columns(width_px=width, height_px=height)
        decoded = Sample(annotation, sample.metadata, sample.image_bytes, pixels)
        return self._prepare(decoded) if self._prepare else decoded


class _Decoding:
    """A decoder that notes what threads spend on it, until that is reported on the thread that runs the stage: Beam
    knows of no other's metrics."""

    def __init__(self, decode: Decode) -> None:
        self._decode, self._lock = decode, threading.Lock()
        self._pictures, self._seconds = 0, 0.0

    def __call__(self, content: bytes, max_pixels: int, draft_side_px: int | None) -> Any:
        started = time.perf_counter()
        try:
            return self._decode(content, max_pixels, draft_side_px)
        finally:
            seconds = time.perf_counter() - started
            with self._lock:
                self._pictures, self._seconds = self._pictures + 1, self._seconds + seconds

    def report(self) -> None:
        """Count what was decoded since the last time."""
        with self._lock:
            pictures, seconds, self._pictures, self._seconds = self._pictures, self._seconds, 0, 0.0
        if pictures:
            counter(PICTURES_DECODED).inc(pictures)
            distribution(DECODE_BATCH_MS).update(round(1000 * seconds))


def _batches(
    shard: Shard, samples: Iterable[Sample | DeadLetter], batch_size: int, attempt: Attempt, due: Iterable[str]
) -> Iterator[SampleBatch]:
    """Batches of `batch_size` samples in tar order; the last one may be smaller, or empty. `due` is complete when the
    samples are through."""
    index = 0
    whole: list[Sample] = []
    letters: list[DeadLetter] = []
    for sample in samples:
        if isinstance(sample, DeadLetter):
            letters.append(sample)
            continue
        if len(whole) == batch_size:
            yield SampleBatch(shard, index, False, tuple(whole), tuple(letters), attempt)
            index, whole, letters = index + 1, [], []
        whole.append(sample)
    yield SampleBatch(shard, index, True, tuple(whole), tuple(letters), attempt, tuple(due))
