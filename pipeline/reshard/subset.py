"""Reading subset.npy: what a run decided, in a few numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from pipeline.sinks.subset import ROW, subset_rows
from transforms.storage import files

_READ_ROWS = 2**20  # at a time: 16 MiB


@dataclasses.dataclass(frozen=True)
class SubsetChecksum:
    """How many rows of which uids, whatever their order: the count, and the sums of the uids' upper and of their lower
    64 bits modulo 2^64. Equal for equal rows; different rows have one tally only by an accident of one in 2^128."""

    rows: int = 0
    upper: int = 0
    lower: int = 0

    def __add__(self, other: SubsetChecksum) -> SubsetChecksum:
        return SubsetChecksum(
            self.rows + other.rows, (self.upper + other.upper) % 2**64, (self.lower + other.lower) % 2**64
        )

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> SubsetChecksum:
        """Of an array of dtype `u8,u8`."""
        return cls(len(rows), int(rows["f0"].sum()), int(rows["f1"].sum()))  # numpy's sum wraps at 2^64

    @classmethod
    def of(cls, copies: Iterable[tuple[str, int]]) -> SubsetChecksum:
        """Of (uid, copies)."""
        return cls.of_rows(subset_rows(copies))


@dataclasses.dataclass(frozen=True)
class Subset:
    """What subset.npy says: samples that stand in it, the copies of the one that has most, and all of its rows."""

    samples: int
    most_copies: int
    tally: SubsetChecksum


def read_subset(path: str) -> Subset:
    """The subset at `path`, in 16 MiB of memory whatever its size.

    Raises ValueError where it is no array of dtype `u8,u8`, or breaks off.
    """
    samples = most_copies = copies_of_last = 0
    tally, last = SubsetChecksum(), None
    with files.open_binary(path) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{path}: npy version {version}, not (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != ROW or len(shape) != 1:
            raise ValueError(f"{path}: holds {dtype} of shape {shape}, not rows of u8,u8")
        while content := file.read(_READ_ROWS * ROW.itemsize):
            rows = np.frombuffer(content, ROW)
            starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
            copies = np.diff(np.r_[starts, len(rows)])
            if rows[0] == last:  # goes on from the rows read before
                copies[0] += copies_of_last
                samples -= 1
            samples += len(copies)
            most_copies = max(most_copies, int(copies.max()))
            tally += SubsetChecksum.of_rows(rows)
            last, copies_of_last = rows[-1], copies[-1]
    if tally.rows != shape[0]:
        raise ValueError(f"{path}: breaks off after {tally.rows} of {shape[0]} rows")
    return Subset(samples, most_copies, tally)
