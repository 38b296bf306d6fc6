"""Where the copies of samples stand in resharded tars: whole numbers only, no files."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive samples, `start` <= p < `stop`, whose copy `copy` stands in one tar."""

    copy: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Spread:
    """Where each copy of each sample stands (our choice).

    The P = `samples` that stand in the subset at all are numbered p = 0 … P - 1; C = `most_copies` is the largest
    number of copies that one has. Copy j of sample p stands at

        frac(p/P + j/C)  in [0, 1), counted in whole steps of 1/(P*C): (p*C + j*P) mod (P*C).

    Rows are ordered by position, then p. Tar s of S = `tars` holds the positions in [s/S, (s + 1)/S). So the samples
    whose copy j stands in one tar are consecutive, but for one wrap from the last to the first.

    How far apart two copies of one sample are, whatever the skew. Their positions differ by m/C for a whole m >= 1.

    - In rows: every sample has a copy 0, and those stand at every multiple of 1/P. Strictly between two points 1/C
      apart lie at least ceil(P/C) - 1 of these multiples, so the copies are at least ceil(P/C) rows apart. No larger
      bound holds: where one sample has C copies and all others have one, two of its copies are just that far apart.
    - In tars: 1/C is S/C tars wide, so they are at least floor(S/C) tars apart. `plan` sees to it that C <= S, so that
      they never meet in one tar.

    `plan` also sees to it that no tar is empty: where S <= P, some copy 0 stands in each; where S = C, a copy of the
    sample that has C of them.
    """

    samples: int
    most_copies: int
    tars: int

    @classmethod
    def plan(cls, samples: int, most_copies: int, rows: int, samples_per_shard: int) -> Spread:
        """The spread of `rows` copies of `samples` >= 1 samples over tars of `samples_per_shard` on average, fewer
        where that takes tars enough to part the copies."""
        return cls(samples, most_copies, max(most_copies, min(samples, _ceil(rows, samples_per_shard))))

    def position(self, sample: int, copy: int) -> int:
        """In steps of 1/(P*C)."""
        return (sample * self.most_copies + copy * self.samples) % (self.samples * self.most_copies)

    @property
    def least_rows_apart(self) -> int:
        """Between two copies of one sample, over all tars one after another."""
        return _ceil(self.samples, self.most_copies)

    @property
    def least_tars_apart(self) -> int:
        """Between two copies of one sample."""
        return self.tars // self.most_copies

    def stretches(self, tar: int) -> Iterator[Stretch]:
        """What stands in a tar. Those of one copy come together, in the order of position."""
        steps = self.samples * self.most_copies
        first, end = _ceil(tar * steps, self.tars), _ceil((tar + 1) * steps, self.tars)
        for copy in range(self.most_copies):
            # A sample below 0 is one that the copy's offset carries past the end: it stands for p + P.
            start = _ceil(first - copy * self.samples, self.most_copies)
            stop = _ceil(end - copy * self.samples, self.most_copies)
            if start < 0:
                yield Stretch(copy, start + self.samples, min(stop, 0) + self.samples)
            if stop > 0:
                yield Stretch(copy, max(start, 0), stop)


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """The part of a stretch that lies in one shard. `shard` is its place among the shards; `first` the number of its
    first sample, so that sample p is the shard's (p - first)th that stands in the subset."""

    copy: int
    shard: int
    first: int
    start: int
    stop: int


def segments(stretches: Iterator[Stretch], samples_of_shards: Sequence[int]) -> Iterator[Segment]:
    """`stretches` cut where a shard ends, in their order; `samples_of_shards` says how many of the numbered samples
    each shard holds."""
    ends = list(itertools.accumulate(samples_of_shards))
    for stretch in stretches:
        start = stretch.start
        while start < stretch.stop:
            shard = bisect.bisect_right(ends, start)
            stop = min(stretch.stop, ends[shard])
            yield Segment(stretch.copy, shard, ends[shard] - samples_of_shards[shard], start, stop)
            start = stop


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
