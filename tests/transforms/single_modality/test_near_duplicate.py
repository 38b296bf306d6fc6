"""Near-duplicates against an oracle that compares every pair."""

from __future__ import annotations

import io
import itertools
import random

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that
from PIL import Image

from tests.helpers import encode, picture, uid
from transforms.single_modality.hash_neighbours import (
    NearDuplicates,
    Ranked,
    bands,
    best_of_hashes,
    better_neighbours,
)
from transforms.single_modality.near_duplicate import keeps
from transforms.single_modality.perceptual_hash import perceptual_hash

Rank = tuple[bool, int, str]
"""The order among duplicates, best first."""
Item = tuple[int, Rank]


def rank(fails: bool, pixels: int, uid_: str) -> Rank:
    return fails, -pixels, uid_


def columns(items: list[Item]) -> Ranked:
    return Ranked(
        np.array([hash_ for hash_, _ in items], np.uint64),
        np.array([fails for _, (fails, _, _) in items], bool),
        np.array([-pixels for _, (_, pixels, _) in items], np.int64),
        np.array([own for _, (_, _, own) in items], "S32"),
    )


def items_of(ranked: Ranked) -> list[Item]:
    values = zip(*(column.tolist() for _, column in ranked.columns()), strict=True)
    return [(hash_, rank(fails, pixels, own.decode())) for hash_, fails, pixels, own in values]


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def oracle(items: list[Item], max_hamming: int) -> dict[int, Rank]:
    """Return the best image within reach of each distinct hash, by comparing every pair."""
    best: dict[int, Rank] = {}
    for hash_, own in items:
        best[hash_] = min(own, best.get(hash_, own))
    return {
        hash_: min(r for other, r in best.items() if (hash_ ^ other).bit_count() <= max_hamming) for hash_ in best
    }


def scattered(rng: random.Random, count: int) -> list[int]:
    return [rng.getrandbits(64) for _ in range(count)]


def clustered(rng: random.Random, count: int, max_flips: int) -> list[int]:
    """Return hashes within a few bits of a few centres, spread over all bands, so that chains and ties occur."""
    centres = scattered(rng, max(1, count // 12))
    hashes = []
    for _ in range(count):
        value = rng.choice(centres)
        for bit in rng.sample(range(64), rng.randrange(max_flips + 1)):
            value ^= 1 << bit
        hashes.append(value)
    return hashes


def one_band_full(rng: random.Random, count: int) -> list[int]:
    """Return hashes with the same lower half, so that one bucket holds all of them and must be split."""
    return [rng.choice([0, 1, 3, rng.getrandbits(32)]) << 32 ^ 0xABCD for _ in range(count)]


def ranked(rng: random.Random, hashes: list[int]) -> list[Item]:
    return [(h, rank(rng.random() < 0.3, rng.randrange(3), uid(n))) for n, h in enumerate(hashes)]


def check(items: list[Item], max_hamming: int, tile_hashes: int, buckets: int = 2) -> None:
    expected = oracle(items, max_hamming)

    def as_expected(parts: list[Ranked]) -> None:
        told = columns([item for part in parts for item in items_of(part)])
        assert dict(items_of(best_of_hashes(told))) == expected

    with beam.Pipeline("FnApiRunner") as p:
        parts = [columns(items[start : start + 7]) for start in range(0, len(items), 7)]
        assert_that(p | beam.Create(parts) | NearDuplicates(max_hamming, buckets, tile_hashes), as_expected)


@pytest.mark.parametrize("max_hamming", range(8))
def test_against_every_pair(max_hamming: int) -> None:
    rng = random.Random(max_hamming)
    hashes = scattered(rng, 20) + clustered(rng, 70, max_hamming + 2) + one_band_full(rng, 40)
    items = ranked(rng, hashes + [0] * 8 + [2**64 - 1] * 3)
    assert oracle(items, max_hamming) != oracle(items, 0) or max_hamming == 0
    check(items, max_hamming, tile_hashes=10)


# A bucket of n tiles is n(n + 1)/2 elements, so the smallest tiles get the fewest hashes.
TILED = [(1, 12), (3, 30), (8192, 40)]


@pytest.mark.parametrize(("tile_hashes", "count"), [*TILED, pytest.param(1, 40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("buckets", [1, 5])
def test_tiles_and_buckets_change_nothing(tile_hashes: int, count: int, buckets: int) -> None:
    rng = random.Random(9)
    items = ranked(rng, one_band_full(rng, count) + clustered(rng, count, 4))
    assert oracle(items, 3) != oracle(items, 0)
    check(items, 3, tile_hashes, buckets)


def test_order_changes_nothing() -> None:
    rng = random.Random(10)
    items = ranked(rng, clustered(rng, 80, 4))
    rng.shuffle(items)
    check(items, 3, 4)


@pytest.mark.parametrize("items", [[], [(0xFF, rank(False, 5, uid(1)))]])
def test_few(items: list[Item]) -> None:
    check(items, 3, 2)


def neighbours(items: list[Item], max_hamming: int, groups: list[int] | None = None) -> list[int]:
    of = np.array(groups if groups is not None else [0] * len(items), np.uint64)
    return better_neighbours(columns(items), of, max_hamming).tolist()


def test_a_bucket_may_be_empty() -> None:
    assert neighbours([], 3) == []


def test_only_rows_of_one_group_are_compared_and_the_best_is_found() -> None:
    items = [(number, rank(False, pixels, uid(number))) for number, pixels in enumerate((1, 5, 4, 9, 8, 2))]
    assert neighbours(items, 64, groups=[7, 7, 7, 2, 2, 2]) == [1, -1, 1, -1, 3, 3]
    assert neighbours(items, 64) == [3, 3, 3, -1, 3, 3]


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_against_every_pair(seed: int) -> None:
    rng = random.Random(seed)
    items = ranked(rng, list(dict.fromkeys(clustered(rng, 120, 4))))
    groups = [rng.randrange(4) for _ in items]
    expected = []
    for (hash_, own), group in zip(items, groups, strict=True):
        better = [
            (r, row) for row, ((other, r), its) in enumerate(zip(items, groups, strict=True))
            if its == group and r < own and (hash_ ^ other).bit_count() <= 3
        ]  # fmt: skip
        expected.append(min(better)[1] if better else -1)
    assert neighbours(items, 3, groups) == expected
    assert any(row >= 0 for row in expected)


def values(hash_: int, max_hamming: int) -> list[tuple[int, int]]:
    """Each band with its value."""
    return list(enumerate(int(value[0]) for value in bands(np.array([hash_], np.uint64), max_hamming)))


def test_both_sides_of_the_distance() -> None:
    base, better = 0x0123456789ABCDEF, rank(False, 10, uid(0))
    for max_hamming in range(8):
        for flips in (max_hamming, max_hamming + 1):
            # Distant and adjacent bits, so that every band is needed.
            for mask in (sum(1 << (63 * i // 8) for i in range(flips)), (1 << flips) - 1):
                found = neighbours([(base ^ mask, rank(False, 5, uid(1))), (base, better)], max_hamming)
                assert found == [1 if flips <= max_hamming else -1, -1]
                meet = set(values(base ^ mask, max_hamming)) & set(values(base, max_hamming))
                assert meet or flips > max_hamming


@pytest.mark.parametrize("max_hamming", range(8))
def test_bands_miss_no_pair_within_reach(max_hamming: int) -> None:
    rng = random.Random(max_hamming)
    for _ in range(300):
        one = rng.getrandbits(64)
        other = one
        for bit in rng.sample(range(64), max_hamming):
            other ^= 1 << bit
        own = values(one, max_hamming)
        assert len(own) == max_hamming + 1
        assert set(own) & set(values(other, max_hamming))


def test_a_hash_is_its_bands() -> None:
    for max_hamming in range(8):
        assert sum(value.bit_count() for _, value in values(0x0123456789ABCDEF, max_hamming)) == 32


def test_only_better_images_count() -> None:
    assert neighbours([(0, rank(False, 5, uid(1))), (1, rank(False, 4, uid(2)))], 3) == [-1, 0]


def test_rank_prefers_what_passes_the_other_rules_then_pixels_then_the_smaller_uid() -> None:
    ordered = [
        rank(False, 100, uid(1)), rank(False, 100, uid(2)), rank(False, 99, uid(0)), rank(True, 10_000, uid(0)),
        rank(True, 10_000, uid(3)), rank(True, 5, uid(0)),
    ]  # fmt: skip
    assert all(better < worse for better, worse in itertools.pairwise(ordered))
    for order in itertools.permutations(range(len(ordered))):
        of_one_hash = columns([(7, ordered[place]) for place in order])
        assert items_of(best_of_hashes(of_one_hash)) == [(7, ordered[0])]
        assert [order[row] for row in of_one_hash.order(of_one_hash.hashes)] == list(range(len(ordered)))


def test_a_better_picture_that_fails_another_rule_loses() -> None:
    items = [(0x0F, rank(True, 4000 * 3000, uid(1))), (0x0E, rank(False, 300 * 200, uid(2)))]
    assert oracle(items, 3) == {0x0F: items[1][1], 0x0E: items[1][1]}
    check(items, 3, tile_hashes=2)


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


def test_different_pictures_have_distant_hashes() -> None:
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
