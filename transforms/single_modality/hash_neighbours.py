"""Near-duplicate images: perceptual hash within Hamming distance `max_hamming` of a better-ranked image's hash.

Exact at any size. Identical hashes are reduced to their best image first. Neighbours are found by bands of bits. Where
the bucket of a band value is too large for one worker, it is split into tiles, and every pair of tiles is compared.

    64-bit hash, max_hamming 3:   | band 0 | band 1 | band 2 | band 3 |
    two hashes that differ in at most 3 bits agree in at least one of 4 bands (pigeonhole)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np

from transforms.columns import Columns, Part, buckets_of

HASH_BITS = 64
TILE_HASHES = 2**16  # comparing two tiles takes seconds even if all their hashes share a band
_PAIR_BITS = 40


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked(Columns):
    """Hashes, each with the rank of one image: hashes uint64 (n,), fails bool (n,), pixels int64 (n,), uids S32 (n,).

    An image ranks higher if it passes all other stage-1 rules, then if it has more pixels, then if its uid is smaller.
    So no pair is lost because its keeper fails another rule (our choice).
    """

    hashes: np.ndarray
    fails: np.ndarray
    pixels: np.ndarray
    uids: np.ndarray

    def order(self, groups: np.ndarray) -> np.ndarray:
        """The row indices int64 (n,), sorted by group and best first within each group."""
        return np.lexsort((self.uids, -self.pixels, self.fails, groups))


def best_of_hashes(ranked: Ranked) -> Ranked:
    """The best image of each distinct hash, sorted by hash."""
    ranked = ranked.take(ranked.order(ranked.hashes))
    return ranked.take(np.concatenate([[True], ranked.hashes[1:] != ranked.hashes[:-1]])[: len(ranked)])


def better_neighbours(ranked: Ranked, groups: np.ndarray, max_hamming: int) -> np.ndarray:
    """For each row, the index of the best of all better rows in its group within `max_hamming`: int64 (n,).

    -1 where there is none. `groups` are integers (n,).
    """
    order = ranked.order(groups)
    hashes, groups = ranked.hashes[order], groups[order]
    starts = np.concatenate([[True], groups[1:] != groups[:-1]])[: len(order)]
    rows = np.arange(len(order))
    places = rows - np.maximum.accumulate(np.where(starts, rows, 0))
    best = np.full(len(order), -1)
    # Compares each row with the row `distance` places before it. The last match found is the best-ranked one.
    active, distance = rows[places >= 1], 1
    while len(active):
        close = active[np.bitwise_count(hashes[active] ^ hashes[active - distance]) <= max_hamming]
        best[close] = close - distance
        distance += 1
        active = active[places[active] >= distance]
    found = np.full(len(order), -1)
    found[order] = np.where(best >= 0, order[best], -1)
    return found


def bands(hashes: np.ndarray, max_hamming: int) -> list[np.ndarray]:
    """The values, uint64 (n,), of max_hamming + 1 bands of bits. Hashes within `max_hamming` agree in at least one."""
    count = max_hamming + 1
    edges = [HASH_BITS * i // count for i in range(count + 1)]
    return [
        hashes >> np.uint64(low) & np.uint64((1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)
    ]


class NearDuplicates(beam.PTransform):
    """PCollection[Ranked] -> PCollection[Ranked], the candidates for the keeper of each distinct hash.

    The output has, for each hash, its own best image and better images within `max_hamming`, always including the best
    of those. The keeper is the best of them (`best_of_hashes`). The result depends only on the set of inputs. `buckets`
    is the number of groups for each shuffle, `tile_hashes` the size above which a group is split.
    """

    def __init__(self, max_hamming: int, buckets: int, tile_hashes: int = TILE_HASHES) -> None:
        super().__init__()
        self._max_hamming, self._buckets = max_hamming, buckets
        self._tile_hashes = tile_hashes

    def expand(self, ranked: beam.PCollection) -> beam.PCollection:
        best = (
            ranked
            | "By own hash" >> beam.ParDo(Part(_HashBuckets(self._buckets)))
            | "Group by hash" >> beam.GroupByKey()
            | "Best of identical hashes" >> beam.MapTuple(_best_of_bucket)
        )
        large = (
            best
            | "Sizes of buckets" >> beam.FlatMap(_bucket_sizes, self._max_hamming, self._buckets)
            | "Count bucket" >> beam.CombinePerKey(sum)
            | "Large buckets" >> beam.Filter(_exceeds, self._tile_hashes)
        )
        bands_ = _Bands(self._max_hamming, self._buckets, self._tile_hashes)
        neighbours = (
            best
            | "Bands" >> beam.ParDo(bands_, beam.pvalue.AsDict(large))
            | "By band" >> beam.ParDo(Part(_places))
            | "Bucket" >> beam.GroupByKey()
            | "Compare" >> beam.ParDo(_Compare(self._max_hamming, self._buckets))
        )
        return (best, neighbours) | "Best and neighbours" >> beam.Flatten()


@dataclasses.dataclass(frozen=True)
class _HashBuckets:
    buckets: int

    def __call__(self, ranked: Ranked) -> np.ndarray:
        return buckets_of(ranked.hashes, self.buckets)


def _best_of_bucket(bucket: int, parts: Iterable[Ranked]) -> Ranked:
    return best_of_hashes(Ranked.joined(parts))


def _in_buckets(ranked: Ranked, max_hamming: int, buckets: int) -> Iterator[np.ndarray]:
    """For each band, the bucket of each hash, int64 (n,). Equal values of a band share a bucket; bands share none."""
    for band, values in enumerate(bands(ranked.hashes, max_hamming)):
        yield band * buckets + buckets_of(values, buckets)


def _bucket_sizes(ranked: Ranked, max_hamming: int, buckets: int) -> Iterator[tuple[int, int]]:
    for own in _in_buckets(ranked, max_hamming, buckets):
        yield from zip(*(column.tolist() for column in np.unique(own, return_counts=True)), strict=True)


def _exceeds(counted: tuple[int, int], limit: int) -> bool:
    return counted[1] > limit


@dataclasses.dataclass(frozen=True, eq=False)
class _Placed(Columns):
    """`Ranked` with places int64 (n,): the bucket in which a row is compared, and the pair of tiles in the low bits."""

    hashes: np.ndarray
    fails: np.ndarray
    pixels: np.ndarray
    uids: np.ndarray
    places: np.ndarray


def _places(placed: _Placed) -> np.ndarray:
    return placed.places


class _Bands(beam.DoFn):
    """Sends each hash to one bucket for each band; in a large bucket, to every pair of tiles that includes its tile."""

    def __init__(self, max_hamming: int, buckets: int, tile_hashes: int) -> None:
        self._max_hamming, self._buckets = max_hamming, buckets
        self._tile_hashes = tile_hashes

    def process(self, ranked: Ranked, large: dict[int, int]) -> Iterator[_Placed]:
        for own in _in_buckets(ranked, self._max_hamming, self._buckets):
            is_large = np.isin(own, list(large))
            yield _placed(ranked.take(~is_large), own[~is_large] << _PAIR_BITS)
            for bucket in np.unique(own[is_large]).tolist():
                yield from self._in_tiles(ranked.take(own == bucket), bucket, large[bucket])

    def _in_tiles(self, ranked: Ranked, bucket: int, size: int) -> Iterator[_Placed]:
        count = -(-size // self._tile_hashes)
        own = buckets_of(ranked.hashes, count)
        for pair, (low, high) in enumerate(itertools.combinations(range(count), 2)):
            part = ranked.take((own == low) | (own == high))
            yield _placed(part, np.full(len(part), (bucket << _PAIR_BITS) + pair))


def _placed(ranked: Ranked, places: np.ndarray) -> _Placed:
    return _Placed(ranked.hashes, ranked.fails, ranked.pixels, ranked.uids, places)


class _Compare(beam.DoFn):
    def __init__(self, max_hamming: int, buckets: int) -> None:
        self._max_hamming, self._buckets = max_hamming, buckets

    def process(self, group: tuple[int, Iterable[_Placed]]) -> Iterator[Ranked]:
        place, parts = group
        placed = _Placed.joined(parts)
        ranked = Ranked(placed.hashes, placed.fails, placed.pixels, placed.uids)
        values = bands(ranked.hashes, self._max_hamming)[(place >> _PAIR_BITS) // self._buckets]
        neighbours = better_neighbours(ranked, values, self._max_hamming)
        found = neighbours >= 0
        if found.any():
            yield dataclasses.replace(ranked.take(neighbours[found]), hashes=ranked.hashes[found])
