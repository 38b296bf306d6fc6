"""The last step of a per-shard stage: writes a table and a file of dead letters for each shard, in the fused stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import apache_beam as beam
import pyarrow as pa

from pipeline.output_folder import owner, tables
from pipeline.output_folder.accounting import reconcile_shard
from pipeline.output_folder.layout import DONE, Layout
from pipeline.output_folder.pending import ShardTable
from transforms.core.metrics import SAMPLES_BACK, SAMPLES_DONE, SHARDS_DONE, count_dead_letters, counter
from transforms.core.records import DeadLetter, SampleBatch, Shard
from transforms.storage import files


class UnfusedStage(RuntimeError):
    """The batches of a shard reached the writer out of order: the runner did not fuse read, annotate and write."""


class TableBuilder(Protocol):
    """Builds the table of a shard from the results of a stage."""

    stage: str

    def table(
        self, shard: Shard, rows: list[dict[str, Any]], letters: list[DeadLetter], halvings: Mapping[str, int]
    ) -> ShardTable:
        """Return the table to write."""


class WriteShardTable(beam.DoFn):
    """SampleBatch -> Shard, after its table is written.

    Collects the slim rows of a shard, without pixels, and writes them after its last batch. This relies on a fused
    stage, which passes the batches of a shard in order. Raises UnfusedStage if the runner breaks the fusion, and
    Unaccounted if a sample is missing; then nothing is written.
    """

    def __init__(
        self,
        layout: Layout,
        builder: TableBuilder,
        path_of: Callable[[Layout, str], str],
        schema: pa.Schema,
    ) -> None:
        self._layout, self._builder, self._path_of, self._schema = layout, builder, path_of, schema

    def start_bundle(self) -> None:
        self._shard: Shard | None = None
        self._next_index = 0
        self._rows: list[dict] = []
        self._letters: list[DeadLetter] = []

    def process(self, batch: SampleBatch) -> Iterator[Shard]:
        if batch.attempt.out_of_memory:  # the reader will start this shard again
            self.start_bundle()
            return
        if self._shard is None:
            self._shard = batch.shard
        if batch.shard != self._shard or batch.index != self._next_index:
            raise UnfusedStage(
                f"got batch {batch.index} of shard {batch.shard.name}; expected batch {self._next_index} of "
                f"{self._shard.name}; run this stage on a runner that fuses it"
            )
        self._next_index += 1
        self._rows += [tables.annotation_row(sample.annotation) for sample in batch]
        self._letters += batch.dead_letters
        self._report_progress()
        if batch.last:
            yield self._write(batch)

    def finish_bundle(self) -> None:
        if self._shard is not None:
            raise UnfusedStage(f"the bundle ended before shard {self._shard.name} did")

    def _write(self, last: SampleBatch) -> Shard:
        shard = last.shard
        reconcile_shard(shard, self._builder.stage, last.due, self._rows, self._letters)
        table = self._builder.table(shard, self._rows, self._letters, last.attempt.halvings)
        owner.check(self._layout)
        # Dead letters first, because the presence of the table means that the shard is finished.
        tables.write_dead_letters(self._layout.dead_letters(self._builder.stage, shard.name), table.dead_letters)
        path = self._path_of(self._layout, shard.name)
        known_before = len(table.rows) + len(table.dead_letters) - len(self._rows) - len(self._letters)
        due = len(last.due) + known_before
        tables.write_table(path, table.rows, self._schema, table.cache_key, table.halvings, due)
        self._report_progress(DONE)
        counter(SHARDS_DONE).inc()
        counter(SAMPLES_DONE).inc(len(self._rows))
        counter(SAMPLES_BACK).inc(table.samples_back)
        count_dead_letters(letter.reason for letter in self._letters)
        self.start_bundle()
        return shard

    def _report_progress(self, done: str = "") -> None:
        assert self._shard is not None
        path = self._layout.progress(self._builder.stage, self._shard.name)
        files.make_folder(path.rsplit("/", 1)[0])
        # Progress is only displayed, so errors are ignored. If the disk is full, writing the table reports it.
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(f"{len(self._rows) + len(self._letters)}{done}")
