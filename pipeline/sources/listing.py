"""The transform that reads the listing of a pool (`pipeline.output_folder.listing`) at run time."""

from __future__ import annotations

from collections.abc import Iterator

import apache_beam as beam

from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import read_listing
from transforms.core.records import Shard


class ListShards(beam.PTransform):
    """PCollection of one element of any type -> PCollection[Shard], spread over the workers."""

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
