"""Writes subset.npy, DataComp's subset file: dtype `u8,u8`, one row (uid[:16], uid[16:32]) per copy, sorted."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np

from pipeline.output_folder.layout import Layout
from transforms.distribution_alignment.records import Placements
from transforms.distribution_alignment.work_folder import WorkFolder
from transforms.storage import files

ROW = np.dtype("u8,u8")


def subset_rows(copies: Iterable[tuple[str, int]]) -> np.ndarray:
    """Return the sorted rows, of dtype `u8,u8`, for pairs (uid, copies)."""
    repeated = [(uid, n) for uid, n in sorted(copies) if n > 0]
    rows = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid, _ in repeated], dtype=ROW)
    return np.repeat(rows, [n for _, n in repeated]) if repeated else rows


class WriteSubset(beam.PTransform):
    """PCollection[Placements] -> the path of subset.npy.

    Ranges of uids are sorted in parallel. One worker then concatenates them, with one range in memory at a time.
    """

    def __init__(self, layout: Layout, work: WorkFolder) -> None:
        super().__init__()
        self._layout, self._work = layout, work

    def expand(self, placements: beam.PCollection) -> beam.PCollection:
        return (
            placements
            | "By range of uid" >> beam.FlatMap(_by_range).with_output_types(tuple[str, tuple[bytes, bytes]])
            | "Group range" >> beam.GroupByKey()
            | "Sort range" >> beam.Map(_write_range, self._work)
            | "All ranges" >> beam.combiners.ToList()
            | "Write subset" >> beam.Map(_join, self._layout, self._work)
        )


def _by_range(placements: Placements) -> Iterator[tuple[str, tuple[bytes, bytes]]]:
    """Yield (prefix of two digits, (concatenated uids with that prefix, their copies as int64 bytes)).

    Samples with 0 copies are left out.
    """
    kept = placements.take(placements.copies > 0)
    prefixes = kept.uids.astype("S2")
    for prefix, part in kept.groups(prefixes):
        yield prefix.decode(), (part.uids.tobytes(), part.copies.tobytes())


def _write_range(group: tuple[str, Iterable[tuple[bytes, bytes]]], work: WorkFolder) -> tuple[str, int]:
    prefix, parts = group
    uids, copies = (b"".join(column) for column in zip(*parts, strict=True))
    rows = subset_rows(
        zip((uid.decode() for uid in np.frombuffer(uids, "S32")), np.frombuffer(copies, np.int64), strict=True)
    )
    files.write_bytes(work.subset(prefix), rows.tobytes())
    return prefix, len(rows)


def _join(ranges: list[tuple[str, int]], layout: Layout, work: WorkFolder) -> str:
    header = io.BytesIO()
    count = sum(rows for _, rows in ranges)
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (count,)}
    )
    with files.write_aside(layout.subset) as file:
        file.write(header.getvalue())
        for prefix, _ in sorted(ranges):
            file.write(files.read_bytes(work.subset(prefix)))
    return layout.subset
