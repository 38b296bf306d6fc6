"""What flows through stage 3: columns of many samples at once, as numpy arrays. No element holds more than one shard's
candidates or one tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np

from transforms.columns import Columns


class CandidateShard(NamedTuple):
    """A shard whose candidates lie in the work folder: so many samples that no earlier rule dropped."""

    shard: str
    samples: int


def best_first(cosines: np.ndarray, uids: np.ndarray) -> np.ndarray:
    """The order of the rank: higher flipped-CLIP cosine, then smaller uid. int64 (n,)."""
    return np.lexsort((uids, -cosines))


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates(Columns):
    """Samples that no earlier rule dropped.

    uids bytes (n,) of 32; shards bytes (n,); cosines float32 (n,): flipped-CLIP; digits float32 (n,): digit
    probability, -1.0 where the question was never asked; embeddings float16 (n, d), L2-normalised, little-endian.
    """

    uids: np.ndarray
    shards: np.ndarray
    cosines: np.ndarray
    digits: np.ndarray
    embeddings: np.ndarray

    def best_first(self) -> Self:
        """By rank."""
        return self.take(best_first(self.cosines, self.uids))


@dataclasses.dataclass(frozen=True, eq=False)
class RankKeys(Columns):
    """What the rank of samples hangs on: cosines float32 (n,), uids bytes (n,)."""

    cosines: np.ndarray
    uids: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Judged(Columns):
    """Members of one cluster after semantic dedup, best first. keepers bytes (n,): the uid of the best-ranked better
    member that each is a duplicate of, b"" where there is none."""

    uids: np.ndarray
    shards: np.ndarray
    digits: np.ndarray
    keepers: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class RankedTile:
    """Consecutive members of one cluster with their places in it.

    ranks int64 (n,) count from 0 (worst) to `cluster_size` - 1 (best) over the members that copies are shared among; -1
    for one that is not counted.
    """

    cluster: int
    members: Judged
    ranks: np.ndarray
    cluster_size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Placements(Columns):
    """What stage 3 decided: clusters int32 (n,), keepers bytes (n,) (b"" = nobody's duplicate), expected_copies float64
    (n,), copies int64 (n,)."""

    uids: np.ndarray
    shards: np.ndarray
    clusters: np.ndarray
    keepers: np.ndarray
    expected_copies: np.ndarray
    copies: np.ndarray

    def one_by_one(self) -> Iterator[Placement]:
        """Each sample's decision as plain Python values."""
        values = (column.tolist() for _, column in self.columns())
        for uid, shard, cluster, keeper, expected, copies in zip(*values, strict=True):
            yield Placement(uid.decode(), shard.decode(), cluster, keeper.decode(), expected, copies)


class Placement(NamedTuple):
    """What stage 3 decided about one sample: its cluster, whose duplicate it is ("" = nobody's), and its copies."""

    uid: str
    shard: str
    cluster: int
    semantic_duplicate_of: str
    expected_copies: float
    copies: int


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """How the target is shared among k clusters; arrays are indexed by cluster.

    sizes int64 (k,): n_c. similarities float64 (k,) by task: s(t, c). importance float64 (k,):
    p(c), 0 where n_c = 0. factors float64 (k,): λ·p(c)/(n_c·w̄_c), so that E(x) = min(cap,
    factors[c]·w(x)). target: N, in copies. scale: λ.
    """

    sizes: np.ndarray
    similarities: dict[str, np.ndarray]
    importance: np.ndarray
    factors: np.ndarray
    target: float
    scale: float
