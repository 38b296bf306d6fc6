"""Near-duplicates against an oracle that compares every pair."""

from __future__ import annotations

import io
import itertools
import random

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that, equal_to
from PIL import Image

from tests.helpers import encode, picture, uid
from transforms.single_modality.near_duplicate import (
    NearDuplicates,
    Rank,
    bands,
    better_neighbours,
    duplicate_of,
    keeps,
    perceptual_hash,
    rank,
)

Item = tuple[str, Rank]


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def oracle(items: list[Item], max_hamming: int) -> list[tuple[str, tuple[Rank, Rank | None]]]:
    """Every pair of distinct hashes, compared."""
    best: dict[str, Rank] = {}
    for hash_, own in items:
        best[hash_] = min(own, best.get(hash_, own))
    found = []
    for hash_, own in best.items():
        better = [r for other, r in best.items() if distance(hash_, other) <= max_hamming and r < own]
        found.append((hash_, (own, min(better, default=None))))
    return found


def scattered(rng: random.Random, count: int) -> list[int]:
    return [rng.getrandbits(64) for _ in range(count)]


def clustered(rng: random.Random, count: int, max_flips: int) -> list[int]:
    """Hashes a few bits around a few centres, spread over all bands; so that chains and ties occur."""
    centres = scattered(rng, max(1, count // 12))
    hashes = []
    for _ in range(count):
        value = rng.choice(centres)
        for bit in rng.sample(range(64), rng.randrange(max_flips + 1)):
            value ^= 1 << bit
        hashes.append(value)
    return hashes


def one_band_full(rng: random.Random, count: int) -> list[int]:
    """Hashes that all share the lower half, so that one bucket holds them all and must be split."""
    return [rng.choice([0, 1, 3, rng.getrandbits(32)]) << 32 ^ 0xABCD for _ in range(count)]


def ranked(rng: random.Random, hashes: list[int]) -> list[Item]:
    return [(f"{h:016x}", rank(rng.random() < 0.3, rng.randrange(3), uid(n))) for n, h in enumerate(hashes)]


def check(items: list[Item], max_hamming: int, tile_hashes: int) -> None:
    with beam.Pipeline("FnApiRunner") as p:
        found = p | beam.Create(items) | NearDuplicates(max_hamming, tile_hashes)
        assert_that(found, equal_to(oracle(items, max_hamming)))


@pytest.mark.parametrize("max_hamming", range(8))
def test_against_every_pair(max_hamming: int) -> None:
    rng = random.Random(max_hamming)
    hashes = scattered(rng, 20) + clustered(rng, 70, max_hamming + 2) + one_band_full(rng, 40)
    items = ranked(rng, hashes + [0] * 8 + [2**64 - 1] * 3)
    assert any(neighbour for _, (_, neighbour) in oracle(items, max_hamming)) or max_hamming == 0
    check(items, max_hamming, tile_hashes=5)


@pytest.mark.parametrize("tile_hashes", [1, 3, 8192])
def test_tiles_change_nothing(tile_hashes: int) -> None:
    rng = random.Random(9)
    check(ranked(rng, one_band_full(rng, 40) + clustered(rng, 40, 4)), 3, tile_hashes)


def test_order_changes_nothing() -> None:
    rng = random.Random(10)
    items = ranked(rng, clustered(rng, 80, 4))
    rng.shuffle(items)
    check(items, 3, 4)


@pytest.mark.parametrize("items", [[], [("00000000000000ff", rank(False, 5, uid(1)))]])
def test_few(items: list[Item]) -> None:
    check(items, 3, 2)


def test_a_tile_may_be_empty() -> None:
    assert better_neighbours([("00", rank(False, 5, uid(1)))], [], 3) == {}
    assert better_neighbours([], [("00", rank(False, 5, uid(1)))], 3) == {}


def test_both_sides_of_the_distance() -> None:
    base, better = 0x0123456789ABCDEF, rank(False, 10, uid(0))
    for max_hamming in range(8):
        for flips in (max_hamming, max_hamming + 1):
            # Bits far apart and bits side by side: every band must do its part.
            for mask in (sum(1 << (63 * i // 8) for i in range(flips)), (1 << flips) - 1):
                other = base ^ mask
                worse = (f"{other:016x}", rank(False, 5, uid(1)))
                found = better_neighbours([worse], [(f"{base:016x}", better)], max_hamming)
                assert bool(found) == (flips <= max_hamming)
                meet = set(bands(f"{other:016x}", max_hamming)) & set(bands(f"{base:016x}", max_hamming))
                assert meet or flips > max_hamming


@pytest.mark.parametrize("max_hamming", range(8))
def test_bands_miss_no_pair_within_reach(max_hamming: int) -> None:
    rng = random.Random(max_hamming)
    for _ in range(300):
        one = rng.getrandbits(64)
        other = one
        for bit in rng.sample(range(64), max_hamming):
            other ^= 1 << bit
        keys = bands(f"{one:016x}", max_hamming)
        assert len(keys) == len(set(keys)) == max_hamming + 1
        assert set(keys) & set(bands(f"{other:016x}", max_hamming))


def test_bands_of_different_places_never_meet() -> None:
    assert len(set(bands("0" * 16, 3)) | set(bands("1000200030004", 3))) >= 4
    assert not set(bands("0000ffff0000ffff", 3)) & set(bands("ffff0000ffff0000", 3))


def test_the_smallest_bucket_of_a_hash_is_its_own() -> None:
    """A neighbour that is no better does not count, and neither does the image itself."""
    own = rank(False, 5, uid(1))
    assert better_neighbours([("00", own)], [("00", own), ("01", rank(False, 4, uid(2)))], 3) == {}


def test_rank_prefers_what_passes_the_other_rules_then_pixels_then_the_smaller_uid() -> None:
    ordered = [
        rank(False, 100, uid(1)), rank(False, 100, uid(2)), rank(False, 99, uid(0)), rank(True, 10_000, uid(0)),
        rank(True, 10_000, uid(3)), rank(True, 5, uid(0)),
    ]  # fmt: skip
    assert all(better < worse for better, worse in itertools.pairwise(ordered))


def test_a_better_picture_that_fails_another_rule_loses() -> None:
    big, small = rank(True, 4000 * 3000, uid(1)), rank(False, 300 * 200, uid(2))
    with beam.Pipeline("FnApiRunner") as p:
        found = p | beam.Create([("0f", big), ("0e", small)]) | NearDuplicates(3)
        assert_that(found, equal_to([("0f", (big, small)), ("0e", (small, None))]))


def test_of_identical_hashes_all_but_the_best_go() -> None:
    best, other = rank(False, 9, uid(1)), rank(False, 9, uid(2))
    assert duplicate_of(uid(1), best, None) is None
    assert duplicate_of(uid(2), best, None) == uid(1)
    assert duplicate_of(uid(1), best, other) is None  # a neighbour that is worse
    better = rank(False, 10, uid(3))
    assert duplicate_of(uid(1), best, better) == duplicate_of(uid(2), best, better) == uid(3)


def test_verdict() -> None:
    assert keeps(None)
    assert not keeps(uid(1))


# The hash ---------------------------------------------------------------------------------------------------------


def hash_of(image: Image.Image) -> str:
    return perceptual_hash(np.asarray(image.convert("RGB")))


def saved_as(image: Image.Image, format_: str, **options: int) -> Image.Image:
    return Image.open(io.BytesIO(encode(image, format_, **options)))


@pytest.mark.parametrize("seed", range(6))
def test_the_hash_survives_encoding_and_scaling(seed: int) -> None:
    image = picture(640, 480, seed)
    own = hash_of(image)
    copies = [
        saved_as(image, "JPEG", quality=40), saved_as(image, "WEBP", quality=40), saved_as(image, "PNG"),
        image.resize((320, 240), Image.Resampling.BICUBIC), image.resize((1280, 960)), image.resize((640, 470)),
        saved_as(image.resize((400, 300)), "JPEG", quality=60),
    ]  # fmt: skip
    assert max(distance(own, hash_of(copy)) for copy in copies) <= 3
    assert hash_of(saved_as(image, "PNG")) == own


def test_different_pictures_lie_far_apart() -> None:
    hashes = [hash_of(picture(320, 240, seed)) for seed in range(30)]
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 10


def test_a_mirrored_picture_is_another() -> None:
    image = picture(320, 240)
    assert distance(hash_of(image), hash_of(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 10


def test_flat_pictures_share_one_hash() -> None:
    hashes = {hash_of(Image.new("RGB", size, colour)) for size in ((1, 1), (640, 480), (7, 900))
              for colour in ("black", "white", "grey", (200, 30, 40), (1, 1, 1))}  # fmt: skip
    assert max(distance(a, b) for a in hashes for b in hashes) <= 1
    assert len({hash_of(Image.new("RGB", (50, 50), (n, n, n))) for n in range(1, 256)}) == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2), (33, 31)])
def test_any_shape_has_a_hash(size: tuple[int, int]) -> None:
    own = hash_of(picture(*size))
    assert len(own) == 16
    assert int(own, 16) < 2**64
