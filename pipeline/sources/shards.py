"""Turns shards into batches of decoded samples. This is the first step of each per-shard stage."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

import apache_beam as beam

from pipeline.decoding.guarded_decoder import DECODERS, Decode, shared_decoders
from pipeline.decoding.images import UndecodableImage
from pipeline.sources.grouping import Reading
from pipeline.sources.pool import check_unchanged, dead_shard
from pipeline.sources.prefetch import map_alternating, map_prefetched
from pipeline.sources.webdataset import key_of, read_samples
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

MAX_BATCH_BYTES = MAX_READ_AHEAD_BYTES = 128 * 2**20
"""Files and decoded pictures in a batch, and as many again that are read ahead: 64 pictures of 512 px take 50 MiB."""


_Wanted = dict[str, Annotation] | None


class PendingReads(Protocol):
    """What a stage still has to read of a shard.

    The worker determines it from the existing tables when it reaches the shard, not when the graph is built.
    """

    stage: str

    def is_complete(self, shard: Shard) -> bool:
        """Return whether the shard's table is complete and contains everything the stage computes."""

    def wanted(self, shard: Shard) -> _Wanted:
        """Return the samples to read, by key, with their existing annotations; None means all samples of the shard."""


Prepare = Callable[[Sample], Sample]
"""Converts a decoded sample into the input of the stage's models."""


class ReadShards(beam.PTransform):
    """PCollection[Shard] -> batches of samples (main output) and the shards that need no work (`FINISHED`).

    Threads decode the samples and, if `load_prepare` is given, prepare them. By default they work on the next batch
    while the fused stage processes the current one; with `in_turns` they start only after it is done. `load_prepare`
    is called at most once per worker, when the first shard needs work.
    """

    BATCHES, FINISHED = "batches", "finished"

    def __init__(
        self,
        pending: PendingReads,
        bounds: PoolSettings,
        batch_size: int,
        draft_side_px: int | None = None,
        load_prepare: Callable[[], Prepare] | None = None,
        in_turns: bool = False,
    ) -> None:
        super().__init__()
        self._read = _ReadShard(pending, bounds, batch_size, draft_side_px, load_prepare, in_turns)

    def expand(self, shards: beam.PCollection) -> beam.pvalue.DoOutputsTuple:
        read = beam.ParDo(self._read).with_output_types(SampleBatch)
        return shards | "Read and decode" >> read.with_outputs(self.FINISHED, main=self.BATCHES)


class _ReadShard(beam.DoFn):
    def __init__(
        self,
        pending: PendingReads,
        bounds: PoolSettings,
        batch_size: int,
        draft_side_px: int | None,
        load_prepare: Callable[[], Prepare] | None,
        alternate: bool,
    ) -> None:
        self._pending, self._bounds = pending, bounds
        self._batch_size, self._draft_side_px = batch_size, draft_side_px
        self._load_prepare, self._map = load_prepare, map_alternating if alternate else map_prefetched
        self._prepare: Prepare | None = None

    def process(self, shard: Shard) -> Iterator[SampleBatch | beam.pvalue.TaggedOutput]:
        shard = Shard(*shard)
        if self._pending.is_complete(shard):
            counter(SHARDS_FINISHED_BEFORE).inc()
            yield beam.pvalue.TaggedOutput(ReadShards.FINISHED, shard)
            return
        if self._load_prepare and self._prepare is None:
            self._prepare = self._load_prepare()
        yield from self._read(shard)

    def _read(self, shard: Shard) -> Iterator[SampleBatch]:
        """Yield the batches of a shard. Starts over with smaller batches if a model runs out of GPU memory."""
        wanted, attempt = self._pending.wanted(shard), Attempt()
        decoding = _Decoding(shared_decoders(self._bounds.max_decode_seconds).decode)
        while True:
            if (wanted is None or wanted) and not shard.fault:
                counter(TARS_OPENED).inc()
            reading = Reading()
            expected = reading.keys if wanted is None else list(wanted)
            with contextlib.closing(self._decoded_samples(shard, wanted, decoding, reading)) as samples:
                for batch in _batches(shard, samples, self._batch_size, attempt, expected):
                    decoding.report()
                    yield batch  # the stage's models process it before the next line runs
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
        samples = self._samples(shard, wanted, reading)
        return self._map(decoded, samples, DECODERS, self._batch_size, _size_bytes, MAX_READ_AHEAD_BYTES)

    def _samples(self, shard: Shard, wanted: _Wanted, reading: Reading) -> Iterator[Sample | DeadLetter]:
        if shard.fault:
            yield dead_shard(shard, self._pending.stage)
            return
        if wanted is None:
            yield from read_samples(shard, self._bounds, self._pending.stage, reading)
            check_unchanged(shard)
            return
        missing = dict(wanted)
        # Ignore broken samples that are not wanted: stage 1, which reads the complete shard, has reported them.
        for found in read_samples(shard, self._bounds, self._pending.stage, reading) if wanted else ():
            annotation = missing.pop(key_of(found), None)
            if annotation is not None and isinstance(found, Sample):
                yield Sample(annotation, found.metadata, found.image_bytes)
            elif annotation is not None and isinstance(found, DeadLetter):
                yield found._replace(uid=annotation.uid)
        if wanted:
            check_unchanged(shard)
        for annotation in missing.values():
            message = "stage 1 read this sample, but it is now missing from the tar or incomplete"
            yield dead_letter(annotation, self._pending.stage, "vanished", message)

    def _decoded(self, decode: Decode, sample: Sample | DeadLetter) -> Sample | DeadLetter:
        if isinstance(sample, DeadLetter):
            return sample
        try:
            pixels, (width, height) = decode(
                sample.image_bytes, self._bounds.max_image_pixels, self._draft_side_px
            )
        except UndecodableImage as error:
            return dead_letter(sample.annotation, self._pending.stage, error.reason, str(error))
        annotation = sample.annotation.with_columns(width_px=width, height_px=height)
        decoded = Sample(annotation, sample.metadata, sample.image_bytes, pixels)
        return self._prepare(decoded) if self._prepare else decoded


class _Decoding:
    """A decoder that counts pictures and decoding time across threads.

    `report` adds them to the metrics. It must run on the stage's own thread, because Beam ignores metrics of others.
    """

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
        """Add the pictures and the time since the last call to the metrics."""
        with self._lock:
            pictures, seconds, self._pictures, self._seconds = self._pictures, self._seconds, 0, 0.0
        if pictures:
            counter(PICTURES_DECODED).inc(pictures)
            distribution(DECODE_BATCH_MS).update(round(1000 * seconds))


def _size_bytes(sample: Sample | DeadLetter) -> int:
    """Return the size of the file and the pixels of a sample. The inputs of models are small and of one size."""
    if isinstance(sample, DeadLetter):
        return 0
    return len(sample.image_bytes) + (sample.pixels.nbytes if sample.pixels is not None else 0)


def _batches(
    shard: Shard, samples: Iterable[Sample | DeadLetter], batch_size: int, attempt: Attempt, expected: Iterable[str]
) -> Iterator[SampleBatch]:
    """Yield batches of `batch_size` samples in tar order, or of fewer where these take `MAX_BATCH_BYTES`.

    The last batch may be smaller, or empty.

    `expected` holds the keys of the samples that the stage has to account for. It is read after the last sample, when
    it is complete.
    """
    index = size_bytes = 0
    good: list[Sample] = []
    letters: list[DeadLetter] = []
    for sample in samples:
        if isinstance(sample, DeadLetter):
            letters.append(sample)
            continue
        if len(good) == batch_size or size_bytes >= MAX_BATCH_BYTES:
            yield SampleBatch(shard, index, False, tuple(good), tuple(letters), attempt)
            index, good, letters, size_bytes = index + 1, [], [], 0
        good.append(sample)
        size_bytes += _size_bytes(sample)
    yield SampleBatch(shard, index, True, tuple(good), tuple(letters), attempt, tuple(expected))
