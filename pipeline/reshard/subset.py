"""Reads subset.npy into a few numbers that identify the subset."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from pipeline.sinks.subset import ROW, subset_rows
from transforms.storage import files

_READ_ROWS = 2**20  # at a time: 16 MiB


@dataclasses.dataclass(frozen=True)
class SubsetChecksum:
    """A checksum of rows of uids that does not depend on their order.

    It consists of the number of rows, and of the sums of the upper and of the lower 64 bits of the uids, modulo 2^64.
    Different rows have the same checksum with a probability of about 2^-128.
    """

    rows: int = 0
    upper: int = 0
    lower: int = 0

    def __add__(self, other: SubsetChecksum) -> SubsetChecksum:
        return SubsetChecksum(
            self.rows + other.rows, (self.upper + other.upper) % 2**64, (self.lower + other.lower) % 2**64
        )

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> SubsetChecksum:
        """Return the checksum of an array of dtype `u8,u8`."""
        return cls(len(rows), int(rows["f0"].sum()), int(rows["f1"].sum()))  # numpy's sum wraps at 2^64

    @classmethod
    def of(cls, copies: Iterable[tuple[str, int]]) -> SubsetChecksum:
        """Return the checksum of pairs (uid, copies)."""
        return cls.of_rows(subset_rows(copies))


@dataclasses.dataclass(frozen=True)
class Subset:
    """A summary of subset.npy: the number of samples, the most copies of one sample, and the checksum of all rows."""

    samples: int
    most_copies: int
    checksum: SubsetChecksum


def read_subset(path: str) -> Subset:
    """Summarize the subset file at `path`, using 16 MiB of memory for any size.

    Raises ValueError if the file is not an array of dtype `u8,u8` or is truncated.
    """
    samples = most_copies = copies_of_last = 0
    checksum, last = SubsetChecksum(), None
    with files.open_binary(path) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{path}: npy version {version}, expected (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != ROW or len(shape) != 1:
            raise ValueError(f"{path}: holds {dtype} of shape {shape}, not rows of u8,u8")
        while content := file.read(_READ_ROWS * ROW.itemsize):
            rows = np.frombuffer(content, ROW)
            starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
            copies = np.diff(np.r_[starts, len(rows)])
            if rows[0] == last:  # continues the last sample of the previous chunk
                copies[0] += copies_of_last
                samples -= 1
            samples += len(copies)
            most_copies = max(most_copies, int(copies.max()))
            checksum += SubsetChecksum.of_rows(rows)
            last, copies_of_last = rows[-1], copies[-1]
    if checksum.rows != shape[0]:
        raise ValueError(f"{path}: truncated after {checksum.rows} of {shape[0]} rows")
    return Subset(samples, most_copies, checksum)
