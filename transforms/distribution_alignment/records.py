"""The rows that flow through stage 3. All slim, frozen, of plain types."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from apache_beam import coders


class Candidate(NamedTuple):
    """A sample that no earlier rule dropped.

    `digit_probability` is -1.0 where the question was never asked; `embedding` holds d
    L2-normalised fp16 values, little-endian.
    """

    uid: str
    shard: str
    flipped_clip_cosine: float
    digit_probability: float
    embedding: bytes


class Member(NamedTuple):
    """A candidate in its cluster."""

    uid: str
    shard: str
    flipped_clip_cosine: float
    digit_probability: float
    embedding: bytes
    cluster: int


class RankedMember(NamedTuple):
    """A member with its place in its cluster.

    `semantic_duplicate_of` is the uid of the best-ranked keeper, "" where there is none. `rank`
    counts from 0 (worst) to `cluster_size` - 1 (best) over the members that copies are shared
    among; it is -1 for one that is not counted.
    """

    uid: str
    shard: str
    digit_probability: float
    cluster: int
    semantic_duplicate_of: str
    rank: int
    cluster_size: int


class Placement(NamedTuple):
    """What stage 3 decided about a sample: its cluster, whose duplicate it is ("" = nobody's), and
    its copies."""

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


# Beam would pickle a NamedTuple; its row coder is three times as fast, and deterministic.
for _record in (Candidate, Member, RankedMember, Placement):
    coders.registry.register_coder(_record, coders.RowCoder)
