"""The positions of the copies of samples in resharded tars. Pure integer arithmetic, without files."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class SampleRange:
    """Consecutive samples, `start` <= p < `stop`, whose copy number `copy` is in one tar."""

    copy: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class CopyPlacement:
    """The position of each copy of each sample (our choice).

    The P = `samples` samples of the subset are numbered p = 0 … P - 1. C = `most_copies` is the largest number of
    copies of one sample. The position of copy j of sample p is

        frac(p/P + j/C)  in [0, 1), counted in whole steps of 1/(P*C): (p*C + j*P) mod (P*C).

    Rows are ordered by position, then by p. Tar s of S = `tars` holds the positions in [s/S, (s + 1)/S). The samples
    whose copy j is in a given tar are therefore consecutive, except for one wrap from the last sample to the first.

    Two copies of one sample are at least this far apart, for any distribution of copies. Their positions differ by m/C
    with an integer m >= 1.

    - In rows: every sample has a copy 0, and these copies are at the multiples of 1/P. There are at least
      ceil(P/C) - 1 such multiples strictly between two points at distance 1/C, so the copies are at least ceil(P/C)
      rows apart. The bound is tight: if one sample has C copies and all others have one, it is reached.
    - In tars: a distance of 1/C is S/C tars, so the copies are at least floor(S/C) tars apart. `plan` ensures C <= S,
      so that no tar contains two copies of one sample.

    `plan` also ensures that no tar is empty. If S <= P, each tar contains a copy 0; if S = C, each tar contains a copy
    of the sample with C copies.
    """

    samples: int
    most_copies: int
    tars: int

    @classmethod
    def plan(cls, samples: int, most_copies: int, rows: int, samples_per_shard: int) -> CopyPlacement:
        """Return the placement of `rows` copies of `samples` >= 1 samples.

        Tars have `samples_per_shard` rows on average, or fewer if more tars are needed to separate the copies.
        """
        return cls(samples, most_copies, max(most_copies, min(samples, _ceil(rows, samples_per_shard))))

    def position(self, sample: int, copy: int) -> int:
        """Return the position of a copy, in steps of 1/(P*C)."""
        return (sample * self.most_copies + copy * self.samples) % (self.samples * self.most_copies)

    @property
    def least_rows_apart(self) -> int:
        """The least distance between two copies of one sample, in rows of the concatenated tars."""
        return _ceil(self.samples, self.most_copies)

    @property
    def least_tars_apart(self) -> int:
        """The least distance between two copies of one sample, in tars."""
        return self.tars // self.most_copies

    def ranges(self, tar: int) -> Iterator[SampleRange]:
        """Yield the contents of a tar, grouped by copy number and in order of position within each group."""
        steps = self.samples * self.most_copies
        first, end = _ceil(tar * steps, self.tars), _ceil((tar + 1) * steps, self.tars)
        for copy in range(self.most_copies):
            # A negative number p denotes sample p + P, whose position wraps around the end.
            start = _ceil(first - copy * self.samples, self.most_copies)
            stop = _ceil(end - copy * self.samples, self.most_copies)
            if start < 0:
                yield SampleRange(copy, start + self.samples, min(stop, 0) + self.samples)
            if stop > 0:
                yield SampleRange(copy, max(start, 0), stop)


@dataclasses.dataclass(frozen=True, slots=True)
class ShardRange:
    """The part of a SampleRange in one shard.

    `shard` is the index of the shard. `first` is the number of the shard's first sample, so that sample p has index
    p - first among the shard's samples in the subset.
    """

    copy: int
    shard: int
    first: int
    start: int
    stop: int


def split_by_shard(ranges: Iterator[SampleRange], samples_of_shards: Sequence[int]) -> Iterator[ShardRange]:
    """Split `ranges` at shard boundaries, keeping their order. `samples_of_shards` holds the sample count per shard."""
    ends = list(itertools.accumulate(samples_of_shards))
    for range_ in ranges:
        start = range_.start
        while start < range_.stop:
            shard = bisect.bisect_right(ends, start)
            stop = min(range_.stop, ends[shard])
            yield ShardRange(range_.copy, shard, ends[shard] - samples_of_shards[shard], start, stop)
            start = stop


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
