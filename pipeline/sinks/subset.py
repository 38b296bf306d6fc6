"""subset.npy: DataComp's subset file. dtype `u8,u8`, one row (uid[:16], uid[16:32]) per copy, sorted."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np

from pipeline import files
from pipeline.layout import Layout
from transforms.distribution_alignment.records import Placement

ROW = np.dtype("u8,u8")


def subset_rows(copies: Iterable[tuple[str, int]]) -> np.ndarray:
    """Sorted rows of dtype `u8,u8` from (uid, copies)."""
    repeated = [(uid, n) for uid, n in sorted(copies) if n > 0]
    rows = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid, _ in repeated], dtype=ROW)
    return np.repeat(rows, [n for _, n in repeated]) if repeated else rows


class WriteSubset(beam.PTransform):
    """PCollection[Placement] -> subset.npy.

    Sorted by ranges of the uid in parallel; one worker then writes the ranges one after another, and holds 16 bytes a
    copy.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self._layout = layout

    def expand(self, placements: beam.PCollection) -> beam.PCollection:
        ranges = (
            placements
            | "Range of uid" >> beam.Map(_by_range).with_output_types(tuple[str, tuple[str, int]])
            | "Group range" >> beam.GroupByKey()
            | "Sort range" >> beam.MapTuple(_sorted_range).with_output_types(tuple[str, bytes])
        )
        return (
            placements.pipeline
            | "One file" >> beam.Create([self._layout.subset])
            | "Write subset" >> beam.ParDo(_WriteNpy(), beam.pvalue.AsDict(ranges))
        )


def _by_range(placement: Placement) -> tuple[str, tuple[str, int]]:
    return placement.uid[:2], (placement.uid, placement.copies)


def _sorted_range(prefix: str, copies: Iterable[tuple[str, int]]) -> tuple[str, bytes]:
    return prefix, subset_rows(copies).tobytes()


class _WriteNpy(beam.DoFn):
    def process(self, path: str, ranges: dict[str, bytes]) -> Iterator[str]:
        count = sum(map(len, ranges.values())) // ROW.itemsize
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (count,)}
        )
        with files.write_aside(path) as file:
            file.write(header.getvalue())
            for prefix in sorted(ranges):
                file.write(ranges[prefix])
        yield path
