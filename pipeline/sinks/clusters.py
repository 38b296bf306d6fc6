"""Writes clusters.parquet, with one row per cluster, and clusters.svg, a figure of the same table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.output_folder.layout import Layout
from transforms.storage import files


class WriteClusters(beam.DoFn):
    """PCollection of one element, the rows of the table -> the path of clusters.parquet.

    The columns depend on the recipe's tasks. Also writes clusters.svg.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def process(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        # Imported here, because matplotlib takes a second to import and only this worker draws.
        from pipeline.report.clusters import clusters_svg

        with files.write_aside(self._layout.clusters) as file:
            pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")
        files.write_bytes(self._layout.clusters_figure, clusters_svg(rows))
        yield self._layout.clusters
