"""The listing of a pool: its shards as a run found them. Graphs read it when they run, so that they hold no shard and
are of one size, however many there are; and all stages see one pool, whatever is added to it meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import apache_beam as beam

from pipeline.output_folder.layout import Layout
from transforms.core.records import Shard
from transforms.storage import files


def write_listing(layout: Layout, shards: Sequence[Shard]) -> None:
    """Write down the shards that the pool has now."""
    # As ASCII: a tar's name may hold bytes that are no UTF-8, which Python has as lone surrogates.
    files.write_bytes(layout.shards, json.dumps([list(shard) for shard in shards], indent=2).encode("ascii"))


def read_listing(layout: Layout) -> tuple[Shard, ...]:
    """The shards as they were written down. Raises OSError or ValueError where they were not."""
    return tuple(Shard(*shard) for shard in json.loads(files.read_bytes(layout.shards)))


class ListShards(beam.PTransform):
    """PCollection of one element, whatever it is -> PCollection[Shard], spread over the workers."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self._layout = layout

    def expand(self, start: beam.PCollection) -> beam.PCollection[Shard]:
        return (
            start
            | "Read listing" >> beam.FlatMap(_listed, self._layout).with_output_types(Shard)
            | "Spread shards" >> beam.Reshuffle()
        )


def _listed(start: object, layout: Layout) -> Iterator[Shard]:
    return iter(read_listing(layout))
