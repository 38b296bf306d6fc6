"""Near-duplicate images: within Hamming distance `max_hamming` of a better-ranked image's perceptual hash.

Exact at any size: identical hashes collapse through a combiner, bands find the neighbours, and a band's bucket that is
too large for one worker is split into tiles that together still compare every pair.

    64-bit hash, max_hamming 3:   | band 0 | band 1 | band 2 | band 3 |
    two hashes that differ in at most 3 bits agree in at least one of 4 bands (pigeonhole)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np
from PIL import Image

HASH_BITS = 64
TILE_HASHES = 8192  # a tile compares this many hashes with as many others: 64 MiB at a time at most
_SIDE = 32
_LOW = 8
_ROWS = np.arange(_LOW)[:, None]
_DCT = np.cos(np.pi * (2 * np.arange(_SIDE)[None, :] + 1) * _ROWS / (2 * _SIDE))


def perceptual_hash(pixels: np.ndarray) -> str:
    """16 hex digits: the 64-bit DCT hash of RGB uint8 pixels (height, width, 3).

    Grey, 32 x 32, its 8 x 8 lowest DCT-II frequencies, a bit each: above their median (our choice; the well-known
    pHash). Rounded before comparing, so that a flat image gets one hash and not the rounding noise of zeros.
    """
    grey = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    low = np.round(_DCT @ np.asarray(grey, dtype=np.float64) @ _DCT.T, 3)
    bits = np.packbits((low > np.median(low)).reshape(-1))
    return bits.tobytes().hex()


# Order among duplicates, best first; a plain tuple, because those encode fast.
Rank = tuple[bool, int, str]


def rank(fails_other_rule: bool, pixels: int, uid: str) -> Rank:
    """Passes every other stage-1 rule, then more pixels, then smaller uid, so that no pair is lost because its keeper
    failed another rule (our choice)."""
    return fails_other_rule, -pixels, uid


def better_neighbours(
    left: list[tuple[str, Rank]], right: list[tuple[str, Rank]], max_hamming: int
) -> dict[str, Rank]:
    """For each hash of `left`, the best rank better than its own among the hashes of `right` within `max_hamming`;
    hashes without one are left out."""
    if not right:  # a tile may be empty
        return {}
    right = sorted(right, key=_rank_of)
    right_bits = _bits([hash_ for hash_, _ in right])
    best: dict[str, Rank] = {}
    for start in range(0, len(left), 512):
        rows = left[start : start + 512]
        close = np.bitwise_count(_bits([h for h, _ in rows])[:, None] ^ right_bits[None, :]) <= max_hamming
        # `right` is sorted best first, so the first close one is the best one.
        for (hash_, own), first, any_ in zip(rows, close.argmax(axis=1), close.any(axis=1), strict=True):
            if any_ and right[first][1] < own:
                best[hash_] = right[first][1]
    return best


def _rank_of(item: tuple[str, Rank]) -> Rank:
    return item[1]


def _bits(hashes: list[str]) -> np.ndarray:
    return np.array([int(h, 16) for h in hashes], dtype=np.uint64)


def bands(hash_: str, max_hamming: int) -> list[str]:
    """The keys under which a hash meets every hash within `max_hamming`: its max_hamming + 1 bands."""
    bits, count = int(hash_, 16), max_hamming + 1
    edges = [HASH_BITS * i // count for i in range(count + 1)]
    return [
        f"{i}:{bits >> low & ((1 << (high - low)) - 1):x}" for i, (low, high) in enumerate(itertools.pairwise(edges))
    ]


def keeps(duplicate_of: str | None) -> bool:
    """Whether no better-ranked near-duplicate exists. Source: paper (the rule); how is our choice."""
    return duplicate_of is None


class NearDuplicates(beam.PTransform):
    """PCollection[(hash, Rank)] -> PCollection[(hash, (Rank, Rank | None))]: per distinct hash the rank of its best
    image, and of the best image better than it within `max_hamming`. A pure function of the set of inputs."""

    def __init__(self, max_hamming: int, tile_hashes: int = TILE_HASHES) -> None:
        super().__init__()
        self._max_hamming = max_hamming
        self._tile_hashes = tile_hashes

    def expand(self, ranked: beam.PCollection) -> beam.PCollection:
        best = ranked | "Best of identical hashes" >> beam.CombinePerKey(min)
        bucketed = best | "Bands" >> beam.ParDo(_Bands(self._max_hamming))
        large = (
            bucketed
            | "Band of hash" >> beam.Keys()
            | "Count bucket" >> beam.combiners.Count.PerElement()
            | "Large buckets" >> beam.Filter(_exceeds, self._tile_hashes)
        )
        neighbours = (
            bucketed
            | "Split large buckets" >> beam.ParDo(_Tiles(self._tile_hashes), beam.pvalue.AsDict(large))
            | "Bucket" >> beam.GroupByKey()
            | "Compare" >> beam.ParDo(_Compare(self._max_hamming))
            | "Best neighbour" >> beam.CombinePerKey(min)
        )
        return (
            {"best": best, "neighbour": neighbours}
            | "Join neighbours" >> beam.CoGroupByKey()
            | "One row per hash" >> beam.Map(_best_and_neighbour)
        )


def _exceeds(counted: tuple[str, int], limit: int) -> bool:
    return counted[1] > limit


class _Bands(beam.DoFn):
    def __init__(self, max_hamming: int) -> None:
        self._max_hamming = max_hamming

    def process(self, item: tuple[str, Rank]) -> Iterator[tuple[str, tuple[str, Rank]]]:
        for band in bands(item[0], self._max_hamming):
            yield band, item


class _Tiles(beam.DoFn):
    """Sends a hash of a large bucket to every pair of tiles that its own tile is part of."""

    def __init__(self, tile_hashes: int) -> None:
        self._tile_hashes = tile_hashes

    def process(
        self, element: tuple[str, tuple[str, Rank]], large: dict[str, int]
    ) -> Iterator[tuple[str, tuple[int, str, Rank]]]:
        band, (hash_, own_rank) = element
        count = -(-large.get(band, 1) // self._tile_hashes)
        # Bits of the hash would be shared within a band; a multiplicative mix spreads them over the tiles.
        own = (int(hash_, 16) * 0x9E3779B97F4A7C15 % 2**64 >> 32) % count
        for other in range(count):
            low, high = sorted((own, other))
            yield f"{band}/{low}-{high}", (own, hash_, own_rank)


class _Compare(beam.DoFn):
    def __init__(self, max_hamming: int) -> None:
        self._max_hamming = max_hamming

    def process(
        self, bucket: tuple[str, Iterable[tuple[int, str, Rank]]]
    ) -> Iterator[tuple[str, Rank]]:
        name, items = bucket
        low, high = (int(tile) for tile in name.rpartition("/")[2].split("-"))
        sides: dict[int, list[tuple[str, Rank]]] = {low: [], high: []}
        for tile, hash_, own_rank in items:
            sides[tile].append((hash_, own_rank))
        for one, other in {(low, high), (high, low)}:
            yield from better_neighbours(sides[one], sides[other], self._max_hamming).items()


def _best_and_neighbour(
    joined: tuple[str, dict[str, list[Rank]]],
) -> tuple[str, tuple[Rank, Rank | None]]:
    hash_, groups = joined
    (best,) = groups["best"]
    return hash_, (best, next(iter(groups["neighbour"]), None))


def duplicate_of(uid: str, best: Rank, neighbour: Rank | None) -> str | None:
    """The uid that an image gives way to: the best within reach of its hash, unless that is the image itself."""
    winner = min(best, neighbour) if neighbour else best
    return None if winner[2] == uid else winner[2]
