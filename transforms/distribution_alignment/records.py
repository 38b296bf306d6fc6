"""The records of stage 3: columns of many samples, as numpy arrays.

The largest elements are the candidates of one shard and the members of one tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np

from transforms.columns import Columns


class CandidateShard(NamedTuple):
    """A shard whose candidates are in the work folder. `samples` is their number."""

    shard: str
    samples: int


def best_first(cosines: np.ndarray, uids: np.ndarray) -> np.ndarray:
    """The row indices int64 (n,) in rank order: higher flipped-CLIP cosine first, then smaller uid."""
    return np.lexsort((uids, -cosines))


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates(Columns):
    """Samples that no rule of stages 1 and 2 dropped.

    uids S32 (n,); shards bytes (n,); cosines float32 (n,): flipped-CLIP; digits float32 (n,): digit probability, -1.0
    where there is none; embeddings float16 (n, d), L2-normalised, little-endian.
    """

    uids: np.ndarray
    shards: np.ndarray
    cosines: np.ndarray
    digits: np.ndarray
    embeddings: np.ndarray

    def best_first(self) -> Self:
        """The rows in rank order (see the function `best_first`)."""
        return self.take(best_first(self.cosines, self.uids))


@dataclasses.dataclass(frozen=True, eq=False)
class RankKeys(Columns):
    """The sort keys of the rank: cosines float32 (n,), uids bytes (n,)."""

    cosines: np.ndarray
    uids: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Judged(Columns):
    """Members of one cluster after semantic dedup, best first.

    keepers bytes (n,): for a duplicate, the uid of the best-ranked better member that it duplicates, else b"".
    """

    uids: np.ndarray
    shards: np.ndarray
    digits: np.ndarray
    keepers: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class RankedTile:
    """Consecutive members of one cluster with their ranks.

    ranks int64 (n,) run from 0 (worst) to `cluster_size` - 1 (best) over the members that share the copies of the
    cluster; -1 for the other members.
    """

    cluster: int
    members: Judged
    ranks: np.ndarray
    cluster_size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Placements(Columns):
    """The decisions of stage 3.

    uids, shards and keepers bytes (n,) (keepers is b"" for a sample that is not a duplicate); clusters int32 (n,);
    expected_copies float64 (n,); copies int64 (n,).
    """

    uids: np.ndarray
    shards: np.ndarray
    clusters: np.ndarray
    keepers: np.ndarray
    expected_copies: np.ndarray
    copies: np.ndarray

    def one_by_one(self) -> Iterator[Placement]:
        """The decision on each sample, as plain Python values."""
        values = (column.tolist() for _, column in self.columns())
        for uid, shard, cluster, keeper, expected, copies in zip(*values, strict=True):
            yield Placement(uid.decode(), shard.decode(), cluster, keeper.decode(), expected, copies)


class Placement(NamedTuple):
    """The decision of stage 3 on one sample. `semantic_duplicate_of` is "" for a sample that is not a duplicate."""

    uid: str
    shard: str
    cluster: int
    semantic_duplicate_of: str
    expected_copies: float
    copies: int


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """How the target is distributed over k clusters. Arrays are indexed by cluster.

    sizes int64 (k,): n_c. similarities: for each task float64 (k,), s(t, c). importance float64 (k,): p(c), 0 where
    n_c = 0. factors float64 (k,): λ·p(c)/(n_c·w̄_c), so that E(x) = min(cap, factors[c]·w(x)). target: N, in copies.
    scale: λ.
    """

    sizes: np.ndarray
    similarities: dict[str, np.ndarray]
    importance: np.ndarray
    factors: np.ndarray
    target: float
    scale: float
