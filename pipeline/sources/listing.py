"""The pool listing: the shards that a run found when it started.

Graphs read the listing at run time. Their size therefore does not depend on the number of shards, and all stages see
the same pool even if shards are added during the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import apache_beam as beam

from pipeline.output_folder.layout import Layout
from transforms.core.records import Shard
from transforms.storage import files


def write_listing(layout: Layout, shards: Sequence[Shard]) -> None:
    """Write `shards` to the listing file."""
    # JSON in ASCII, because a tar's name may contain invalid UTF-8, which Python represents as lone surrogates.
    files.write_bytes(layout.shards, json.dumps([list(shard) for shard in shards], indent=2).encode("ascii"))


def read_listing(layout: Layout) -> tuple[Shard, ...]:
    """Return the listed shards. Raises OSError or ValueError if there is no valid listing."""
    return tuple(Shard(*shard) for shard in json.loads(files.read_bytes(layout.shards)))


class ListShards(beam.PTransform):
    """PCollection of one element of any type -> PCollection[Shard], distributed over the workers."""

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
