"""Near-duplicate images: better-ranked images with nearly the same signature, which is a hash and a thumbnail.

Exact at any size. Identical signatures are reduced to their best image first. Images whose hashes agree in a field of
16 bits meet in a bucket. Where a bucket is too large for one worker, it is split into tiles, and every pair of tiles is
compared.

    64-bit hash:   | band 0 | band 1 | band 2 | band 3 |
    two hashes that differ in at most 3 bits agree in at least one band (pigeonhole); of those that differ in more, only
    pairs that agree in one are near-duplicates
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np

from transforms.columns import Columns, Part, buckets_of
from transforms.single_modality.near_duplicate import NearDuplicateSettings
from transforms.single_modality.perceptual_hash import BANDS, HASH_BITS, THUMBNAIL_BYTES, steps_apart, steps_of

HASH_BYTES = HASH_BITS // 8
SIGNATURE_BYTES = HASH_BYTES + THUMBNAIL_BYTES
TILE_HASHES = 2**16  # comparing two tiles takes seconds even if all their hashes share a band
_PAIR_BITS = 40


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked(Columns):
    """Signatures, each with the rank of one image: signatures S56 (n,), fails bool (n,), pixels int64 (n,), uids S16
    (n,), the 16 bytes of each.

    An image ranks higher if it passes all other stage-1 rules, then if it has more pixels, then if its uid is smaller.
    So no pair is lost because its keeper fails another rule (our choice).
    """

    signatures: np.ndarray
    fails: np.ndarray
    pixels: np.ndarray
    uids: np.ndarray

    def order(self, groups: np.ndarray) -> np.ndarray:
        """The row indices int64 (n,), sorted by group and best first within each group."""
        return np.lexsort((self.uids, -self.pixels, self.fails, groups))


def signatures_of(hashes: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """S56 (n,), of hashes uint64 (n,) and thumbnails S48 (n,)."""
    parts = (_bytes_of(hashes, HASH_BYTES), _bytes_of(thumbnails, THUMBNAIL_BYTES))
    return np.concatenate(parts, axis=1).view(f"S{SIGNATURE_BYTES}").reshape(len(hashes))


def hashes_of(signatures: np.ndarray) -> np.ndarray:
    """The hashes, uint64 (n,)."""
    return np.ascontiguousarray(_bytes_of(signatures, SIGNATURE_BYTES)[:, :HASH_BYTES]).view(np.uint64).reshape(-1)


def _bytes_of(values: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), size)


def best_of_signatures(ranked: Ranked) -> Ranked:
    """The best image of each distinct signature, sorted by signature."""
    ranked = ranked.take(ranked.order(ranked.signatures))
    return ranked.take(np.concatenate([[True], ranked.signatures[1:] != ranked.signatures[:-1]])[: len(ranked)])


def better_neighbours(ranked: Ranked, groups: np.ndarray, limits: NearDuplicateSettings) -> np.ndarray:
    """For each row, the index of the best of all better rows in its group within the limits: int64 (n,).

    -1 where there is none. `groups` are integers (n,).
    """
    order = ranked.order(groups)
    signatures, groups = ranked.signatures[order], groups[order]
    hashes = hashes_of(signatures)
    steps = steps_of(_bytes_of(signatures, SIGNATURE_BYTES)[:, HASH_BYTES:])
    starts = np.concatenate([[True], groups[1:] != groups[:-1]])[: len(order)]
    rows = np.arange(len(order))
    places = rows - np.maximum.accumulate(np.where(starts, rows, 0))
    best = np.full(len(order), -1)
    # Compares each row with the row `distance` places before it. The last match found is the best-ranked one.
    active, distance = rows[places >= 1], 1
    while len(active):
        close = active[np.bitwise_count(hashes[active] ^ hashes[active - distance]) <= limits.max_hamming]
        if len(close):
            close = close[steps_apart(steps[close], steps[close - distance]) <= limits.max_cell_steps]
            best[close] = close - distance
        distance += 1
        active = active[places[active] >= distance]
    found = np.full(len(order), -1)
    found[order] = np.where(best >= 0, order[best], -1)
    return found


def bands(hashes: np.ndarray) -> list[np.ndarray]:
    """The values, uint64 (n,), of the 4 bands of 16 bits."""
    width = HASH_BITS // BANDS
    return [hashes >> np.uint64(low) & np.uint64((1 << width) - 1) for low in range(0, HASH_BITS, width)]


class NearDuplicates(beam.PTransform):
    """PCollection[Ranked] -> PCollection[Ranked], the candidates for the keeper of each distinct signature.

    The output has, for each signature, its own best image and better near-duplicates, always including the best of
    those. The keeper is the best of them (`best_of_signatures`). The result depends only on the set of inputs.
    `buckets` is the number of groups for each shuffle, `tile_hashes` the size above which a group is split.
    """

    def __init__(self, limits: NearDuplicateSettings, buckets: int, tile_hashes: int = TILE_HASHES) -> None:
        super().__init__()
        self._limits, self._buckets = limits, buckets
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
            | "Sizes of buckets" >> beam.FlatMap(_bucket_sizes, self._buckets)
            | "Count bucket" >> beam.CombinePerKey(sum)
            | "Large buckets" >> beam.Filter(_exceeds, self._tile_hashes)
        )
        bands_ = _Bands(self._buckets, self._tile_hashes)
        neighbours = (
            best
            | "Bands" >> beam.ParDo(bands_, beam.pvalue.AsDict(large))
            | "By band" >> beam.ParDo(Part(_places))
            | "Bucket" >> beam.GroupByKey()
            | "Compare" >> beam.ParDo(_Compare(self._limits, self._buckets))
        )
        return (best, neighbours) | "Best and neighbours" >> beam.Flatten()


@dataclasses.dataclass(frozen=True)
class _HashBuckets:
    buckets: int

    def __call__(self, ranked: Ranked) -> np.ndarray:
        return buckets_of(ranked.signatures, self.buckets)


def _best_of_bucket(bucket: int, parts: Iterable[Ranked]) -> Ranked:
    return best_of_signatures(Ranked.joined(parts))


def _in_buckets(ranked: Ranked, buckets: int) -> Iterator[np.ndarray]:
    """For each band, the bucket of each hash, int64 (n,). Equal values of a band share a bucket; bands share none."""
    for band, values in enumerate(bands(hashes_of(ranked.signatures))):
        yield band * buckets + buckets_of(values, buckets)


def _bucket_sizes(ranked: Ranked, buckets: int) -> Iterator[tuple[int, int]]:
    for own in _in_buckets(ranked, buckets):
        yield from zip(*(column.tolist() for column in np.unique(own, return_counts=True)), strict=True)


def _exceeds(counted: tuple[int, int], limit: int) -> bool:
    return counted[1] > limit


@dataclasses.dataclass(frozen=True, eq=False)
class _Placed(Columns):
    """`Ranked` with places int64 (n,): the bucket in which a row is compared, and the pair of tiles in the low bits."""

    signatures: np.ndarray
    fails: np.ndarray
    pixels: np.ndarray
    uids: np.ndarray
    places: np.ndarray


def _places(placed: _Placed) -> np.ndarray:
    return placed.places


class _Bands(beam.DoFn):
    """Sends each signature to one bucket for each band; in a large one, to every pair of tiles with its own."""

    def __init__(self, buckets: int, tile_hashes: int) -> None:
        self._buckets, self._tile_hashes = buckets, tile_hashes

    def process(self, ranked: Ranked, large: dict[int, int]) -> Iterator[_Placed]:
        for own in _in_buckets(ranked, self._buckets):
            is_large = np.isin(own, list(large))
            yield _placed(ranked.take(~is_large), own[~is_large] << _PAIR_BITS)
            for bucket in np.unique(own[is_large]).tolist():
                yield from self._in_tiles(ranked.take(own == bucket), bucket, large[bucket])

    def _in_tiles(self, ranked: Ranked, bucket: int, size: int) -> Iterator[_Placed]:
        count = -(-size // self._tile_hashes)
        own = buckets_of(ranked.signatures, count)
        for pair, (low, high) in enumerate(itertools.combinations(range(count), 2)):
            part = ranked.take((own == low) | (own == high))
            yield _placed(part, np.full(len(part), (bucket << _PAIR_BITS) + pair))


def _placed(ranked: Ranked, places: np.ndarray) -> _Placed:
    return _Placed(ranked.signatures, ranked.fails, ranked.pixels, ranked.uids, places)


class _Compare(beam.DoFn):
    def __init__(self, limits: NearDuplicateSettings, buckets: int) -> None:
        self._limits, self._buckets = limits, buckets

    def process(self, group: tuple[int, Iterable[_Placed]]) -> Iterator[Ranked]:
        place, parts = group
        placed = _Placed.joined(parts)
        ranked = Ranked(placed.signatures, placed.fails, placed.pixels, placed.uids)
        values = bands(hashes_of(ranked.signatures))[(place >> _PAIR_BITS) // self._buckets]
        neighbours = better_neighbours(ranked, values, self._limits)
        found = neighbours >= 0
        if found.any():
            yield dataclasses.replace(ranked.take(neighbours[found]), signatures=ranked.signatures[found])
