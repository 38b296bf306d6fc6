"""Copies: how often each sample occurs in the training subset.

E(x) = min(cap, λ·p(c)/n_c·w(x)/w̄_c), with the one λ for which Σ E = N. Paper: clusters are resampled to their
importance, and better samples are duplicated more. Our choice: the cap, λ, and the hash that rounds E to whole copies.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np

from transforms.core.recipe import DistributionAlignmentSettings, QualityDuplicationSettings, TargetSettings
from transforms.distribution_alignment import quality_duplication
from transforms.distribution_alignment.digit_enhancement import enhance
from transforms.distribution_alignment.hashing import draw
from transforms.distribution_alignment.records import Allocation, Placements, RankedTile

PLACEMENTS = "placements"
TALLIES = "tallies"

_INFINITY_BITS = 0x7FF0_0000_0000_0000
_TALLY_BITS = 40  # expected copies are summed as integers in units of 2^-40, so the order does not matter


class UnreachableTargetError(ValueError):
    """The target asks for more copies than the cap allows."""


def target_copies(target: TargetSettings, pool_count: int, survivor_count: int) -> float:
    """N in copies: `target.samples`, or `target.pool_share` of the samples in the raw pool, or all survivors.

    Survivors are the samples that no rule dropped, including semantic dedup. A share of the pool is 0 copies where
    nothing survived.
    """
    if target.samples is not None:
        return float(target.samples)
    if target.pool_share is not None:
        return target.pool_share * pool_count if survivor_count else 0.0
    return float(survivor_count)


def total_expected(
    scale: float, shares: np.ndarray, sizes: np.ndarray, quality: QualityDuplicationSettings, cap: float
) -> float:
    """Σ E over all samples for λ = `scale`, computed from cluster sizes without looking at samples.

    Takes shares float64 (k,), p(c)/(n_c·w̄_c) > 0, and sizes int64 (k,), n_c >= 1. The ranks of a cluster are evenly
    spaced, so w_i = w1 + i·(w2 - w1)/(n_c - 1): the samples below the cap have a closed-form sum, and the others are at
    the cap. Clusters are summed exactly (math.fsum).
    """
    single = sizes == 1
    lowest = np.where(single, quality_duplication.mean_weight(quality), quality.w1)
    step = np.where(single, 0.0, (quality.w2 - quality.w1) / np.maximum(sizes - 1, 1))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        each = scale * shares  # E(x) before the cap, for w(x) = 1
        flat = np.where(each * lowest < cap, sizes, 0)
        below = np.where(step > 0, np.clip(np.ceil((cap / each - lowest) / step), 0, sizes), flat)
        uncapped = np.where(below > 0, each * (below * lowest + step * below * (below - 1) / 2), 0.0)
    return math.fsum((uncapped + cap * (sizes - below)).tolist())


def solve_scale(
    target: float,
    importance: np.ndarray,
    sizes: np.ndarray,
    quality: QualityDuplicationSettings,
    cap: float,
) -> float:
    """λ, the smallest float for which Σ E reaches `target`, found by bisection to the last bit.

    Takes importance float64 (k,), p(c), and sizes int64 (k,), n_c. A cluster with n_c = 0 has no share. Raises
    UnreachableTargetError if the target is not reached even with every sample at the cap.
    """
    if target == 0:
        return 0.0
    shares = share_of_each(importance, sizes, quality)
    sizes, shares = sizes[shares > 0], shares[shares > 0]
    reachable = total_expected(math.inf, shares, sizes, quality, cap)
    if target > reachable:
        count = int(sizes.sum())
        enough = math.ceil(target / max(count, 1) * 1000) / 1000
        raise UnreachableTargetError(
            f"the target of {target:.10g} copies cannot be reached: `max_copies` {cap:g} allows "
            f"{reachable:.10g} from {count} samples, {target - reachable:.10g} too few; "
            + (f"raise `max_copies` to {enough:g} or " if count else "")
            + "lower `target`"
        )
    low, high = 0, _INFINITY_BITS  # non-negative floats sort like their bits read as integers
    while high - low > 1:
        middle = (low + high) // 2
        if total_expected(_float_of(middle), shares, sizes, quality, cap) < target:
            low = middle
        else:
            high = middle
    return _float_of(high)


def _float_of(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def share_of_each(importance: np.ndarray, sizes: np.ndarray, quality: QualityDuplicationSettings) -> np.ndarray:
    """p(c)/(n_c·w̄_c), float64 (k,); 0 where n_c = 0."""
    return np.where(sizes > 0, importance, 0.0) / np.maximum(sizes, 1) / quality_duplication.mean_weight(quality)


def scaled(scale: float, shares: np.ndarray) -> np.ndarray:
    """λ·p(c)/(n_c·w̄_c), float64 (k,). 0 where the share is 0, even if λ is infinite.

    λ is infinite where every sample must be at the cap and some share is too small for a finite λ.
    """
    return np.multiply(scale, shares, out=np.zeros_like(shares), where=shares > 0)


def expected_copies(
    factor: float, ranks: np.ndarray, size: int, quality: QualityDuplicationSettings, cap: float
) -> np.ndarray:
    """E(x) = min(cap, factor·w(x)) with factor = λ·p(c)/(n_c·w̄_c), for ranks int64 (n,): float64 (n,)."""
    return np.minimum(cap, factor * quality_duplication.weights(ranks, size, quality))


def whole_copies(expected: np.ndarray, seed: int, uids: np.ndarray) -> np.ndarray:
    """⌊E⌋ + [u(seed, uid) < E - ⌊E⌋], with u a hash in [0, 1): E on average, and the same on every run.

    Takes expected float64 (n,) and uids bytes (n,). Returns int64 (n,).
    """
    floors = np.floor(expected)
    draws = np.array([draw("copies", seed, uid.decode()) for uid in uids.tolist()])
    return floors.astype(np.int64) + (draws < expected - floors)


class ClusterTally(NamedTuple):
    """Sums over members of a cluster. `expected` and `digit_addition` are in units of 2^-40 copies."""

    members: int = 0
    semantic_duplicates: int = 0
    expected: int = 0
    digit_addition: int = 0
    copies: int = 0


class AssignCopies(beam.PTransform):
    """Ranked tiles → outputs `PLACEMENTS`, one `Placements` for each tile, and `TALLIES`, the input of `ClusterTable`.

    `allocation` is the output of `ClusterImportance`.
    """

    def __init__(
        self, settings: DistributionAlignmentSettings, seed: int, allocation: beam.PCollection[Allocation]
    ) -> None:
        super().__init__()
        self.settings, self.seed, self.allocation = settings, seed, allocation

    def expand(self, tiles: beam.PCollection[RankedTile]) -> beam.pvalue.DoOutputsTuple:
        factors = self.allocation | "Factors" >> beam.Map(_factors)
        return tiles | "Place members" >> beam.ParDo(
            _Place(self.settings, self.seed), beam.pvalue.AsSingleton(factors)
        ).with_outputs(TALLIES, main=PLACEMENTS)


def _factors(allocation: Allocation) -> np.ndarray:
    return allocation.factors


@beam.typehints.with_output_types(Placements)
class _Place(beam.DoFn):
    def __init__(self, settings: DistributionAlignmentSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed

    def process(self, tile: RankedTile, factors: np.ndarray) -> Iterator[Placements | beam.pvalue.TaggedOutput]:
        members, cluster = tile.members, tile.cluster
        kept = members.keepers == b""
        planned = np.where(kept, self._planned(tile, float(factors[cluster])), 0.0)
        expected = planned
        if (digits := self.settings.digit_enhancement) is not None:
            raised = enhance(planned, members.digits, digits, self.settings.max_copies)
            expected = np.where(kept, raised, 0.0)
        copies = whole_copies(expected, self.seed, members.uids)
        clusters = np.full(len(members), cluster, np.int32)
        yield Placements(members.uids, members.shards, clusters, members.keepers, expected, copies)
        tally = ClusterTally(
            len(members), int((~kept).sum()), _units(expected), _units(expected - planned), int(copies.sum())
        )
        yield beam.pvalue.TaggedOutput(TALLIES, (cluster, tuple(tally)))

    def _planned(self, tile: RankedTile, factor: float) -> np.ndarray:
        quality = self.settings.quality_duplication or quality_duplication.WITHOUT
        return expected_copies(factor, tile.ranks, tile.cluster_size, quality, self.settings.max_copies)


def _units(copies: np.ndarray) -> int:
    """The sum of `copies` in units of 2^-40."""
    return sum(np.rint(np.ldexp(copies, _TALLY_BITS)).astype(np.int64).tolist())


def cluster_rows(allocation: Allocation, tallies: Mapping[int, ClusterTally]) -> list[dict[str, Any]]:
    """One row for each cluster in ascending order, including empty clusters.

    Columns: cluster, size (n_c), semantic_duplicates (members dropped), similarity_<task> for each task, importance
    (p(c)), expected_copies, digit_addition (the part of expected_copies that digit enhancement added above the target)
    and copies.
    """
    rows = []
    for cluster, (size, importance) in enumerate(zip(allocation.sizes, allocation.importance, strict=True)):
        tally = tallies.get(cluster, ClusterTally())
        rows.append(
            {
                "cluster": cluster,
                "size": int(size),
                "semantic_duplicates": tally.semantic_duplicates,
                **{f"similarity_{task}": float(s[cluster]) for task, s in sorted(allocation.similarities.items())},
                "importance": float(importance),
                "expected_copies": math.ldexp(tally.expected, -_TALLY_BITS),
                "digit_addition": math.ldexp(tally.digit_addition, -_TALLY_BITS),
                "copies": tally.copies,
            }
        )
    return rows


class ClusterTable(beam.PTransform):
    """`TALLIES` → one element, the rows of clusters.parquet (see `cluster_rows`)."""

    def __init__(self, allocation: beam.PCollection[Allocation]) -> None:
        super().__init__()
        self.allocation = allocation

    def expand(self, tallies: beam.PCollection[tuple[int, tuple[int, ...]]]) -> beam.PCollection[list[dict[str, Any]]]:
        return (
            tallies
            | "SumByCluster" >> beam.CombinePerKey(_add_tallies)
            | "GatherClusters" >> beam.combiners.ToDict()
            | "ClusterRows" >> beam.Map(_rows, beam.pvalue.AsSingleton(self.allocation))
        )


def _add_tallies(tallies: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    sums = list(ClusterTally())
    for tally in tallies:
        sums = [total + part for total, part in zip(sums, tally, strict=True)]
    return tuple(sums)


def _rows(tallies: Mapping[int, tuple[int, ...]], allocation: Allocation) -> list[dict[str, Any]]:
    return cluster_rows(allocation, {cluster: ClusterTally(*sums) for cluster, sums in tallies.items()})
