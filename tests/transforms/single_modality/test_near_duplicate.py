"""Near-duplicates against an oracle that compares every pair."""

from __future__ import annotations

import io
import itertools
import random

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that
from PIL import Image, ImageDraw

from tests.helpers import encode, picture, uid
from transforms.single_modality.hash_neighbours import (
    NearDuplicates,
    Ranked,
    bands,
    best_of_signatures,
    better_neighbours,
    hashes_of,
    signatures_of,
)
from transforms.single_modality.near_duplicate import NearDuplicateSettings, keeps
from transforms.single_modality.perceptual_hash import perceptual_hash, small_copy, steps_apart, steps_of, thumbnail

Rank = tuple[bool, int, str]
"""The order among duplicates, best first."""
Signature = tuple[int, bytes]
"""The hash and the thumbnail."""
Item = tuple[Signature, Rank]


def rank(fails: bool, pixels: int, uid_: str) -> Rank:
    return fails, -pixels, uid_


def limits(max_hamming: int, max_cell_steps: int = 1) -> NearDuplicateSettings:
    return NearDuplicateSettings(max_hamming=max_hamming, max_cell_steps=max_cell_steps)


def with_steps(*changes: tuple[int, int]) -> bytes:
    """A thumbnail whose cells are at step 5, besides those whose place and step are given."""
    steps = [5] * 96
    for place, step in changes:
        steps[place] = step
    return bytes(high << 4 | low for high, low in zip(steps[0::2], steps[1::2], strict=True))


PLAIN = with_steps()


def columns(items: list[Item]) -> Ranked:
    return Ranked(
        signatures_of(
            np.array([hash_ for (hash_, _), _ in items], np.uint64),
            np.array([thumb for (_, thumb), _ in items], "S48"),
        ),
        np.array([fails for _, (fails, _, _) in items], bool),
        np.array([-pixels for _, (_, pixels, _) in items], np.int64),
        np.array([bytes.fromhex(own) for _, (_, _, own) in items], "S16"),
    )


def items_of(ranked: Ranked) -> list[Item]:
    found = []
    for row in range(len(ranked)):
        one = ranked.take(slice(row, row + 1))
        own = (int(hashes_of(one.signatures)[0]), one.signatures.tobytes()[8:])
        found.append((own, rank(bool(one.fails[0]), int(one.pixels[0]), one.uids.tobytes().hex())))
    return found


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def is_near(one: Signature, other: Signature, within: NearDuplicateSettings) -> bool:
    """The definition, in plain numbers."""
    differing = one[0] ^ other[0]
    if differing.bit_count() > within.max_hamming or all(differing >> low & 0xFFFF for low in (0, 16, 32, 48)):
        return False
    cells = [[cell for byte in thumb for cell in (byte >> 4, byte & 15)] for _, thumb in (one, other)]
    differences = [a - b for a, b in zip(*cells, strict=True)]
    brighter = max(-1, min(1, round(sum(differences[:64]) / 64)))
    most = max(*(abs(d - brighter) for d in differences[:64]), *(abs(d) for d in differences[64:]))
    return most <= within.max_cell_steps


def oracle(items: list[Item], within: NearDuplicateSettings) -> dict[Signature, Rank]:
    """Return the best image within reach of each distinct signature, by comparing every pair."""
    best: dict[Signature, Rank] = {}
    for own, its in items:
        best[own] = min(its, best.get(own, its))
    return {own: min(r for other, r in best.items() if is_near(own, other, within)) for own in best}


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


THUMBNAILS = [
    PLAIN, with_steps((0, 6)), with_steps((0, 7)), with_steps((90, 6)), with_steps((90, 3)),
    with_steps(*((place, 6) for place in range(64))), with_steps(*((place, 7) for place in range(64))),
]  # fmt: skip


def ranked(rng: random.Random, hashes: list[int]) -> list[Item]:
    thumbs = [rng.choice([PLAIN, PLAIN, *THUMBNAILS]) for _ in hashes]
    own = zip(hashes, thumbs, strict=True)
    return [(each, rank(rng.random() < 0.3, rng.randrange(3), uid(n))) for n, each in enumerate(own)]


def check(items: list[Item], within: NearDuplicateSettings, tile_hashes: int, buckets: int = 2) -> None:
    expected = oracle(items, within)

    def as_expected(parts: list[Ranked]) -> None:
        told = columns([item for part in parts for item in items_of(part)])
        assert dict(items_of(best_of_signatures(told))) == expected

    with beam.Pipeline("FnApiRunner") as p:
        parts = [columns(items[start : start + 7]) for start in range(0, len(items), 7)]
        assert_that(p | beam.Create(parts) | NearDuplicates(within, buckets, tile_hashes), as_expected)


@pytest.mark.parametrize("max_hamming", [0, 1, 3, 4, 8, 16])
def test_against_every_pair(max_hamming: int) -> None:
    rng = random.Random(max_hamming)
    hashes = scattered(rng, 20) + clustered(rng, 70, max_hamming + 2) + one_band_full(rng, 40)
    items = ranked(rng, hashes + [0] * 8 + [2**64 - 1] * 3)
    assert oracle(items, limits(max_hamming)) != oracle(items, limits(0, 0))
    check(items, limits(max_hamming), tile_hashes=10)


@pytest.mark.parametrize("max_cell_steps", [0, 2, 15])
def test_cells_against_every_pair(max_cell_steps: int) -> None:
    rng = random.Random(max_cell_steps)
    items = ranked(rng, clustered(rng, 70, 5) + [0] * 30)
    assert oracle(items, limits(8, max_cell_steps)) != oracle(items, limits(8, 1))
    check(items, limits(8, max_cell_steps), tile_hashes=10)


# A bucket of n tiles is n(n + 1)/2 elements, so the smallest tiles get the fewest hashes.
TILED = [(1, 12), (3, 30), (8192, 40)]


@pytest.mark.parametrize(("tile_hashes", "count"), [*TILED, pytest.param(1, 40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("buckets", [1, 5])
def test_tiles_and_buckets_change_nothing(tile_hashes: int, count: int, buckets: int) -> None:
    rng = random.Random(9)
    items = ranked(rng, one_band_full(rng, count) + clustered(rng, count, 4))
    assert oracle(items, limits(8)) != oracle(items, limits(0, 0))
    check(items, limits(8), tile_hashes, buckets)


def test_order_changes_nothing() -> None:
    rng = random.Random(10)
    items = ranked(rng, clustered(rng, 80, 4))
    rng.shuffle(items)
    check(items, limits(3), 4)


@pytest.mark.parametrize("items", [[], [((0xFF, PLAIN), rank(False, 5, uid(1)))]])
def test_few(items: list[Item]) -> None:
    check(items, limits(3), 2)


def neighbours(items: list[Item], within: NearDuplicateSettings, groups: list[int] | None = None) -> list[int]:
    of = np.array(groups if groups is not None else [0] * len(items), np.uint64)
    return better_neighbours(columns(items), of, within).tolist()


def test_a_bucket_may_be_empty() -> None:
    assert neighbours([], limits(3)) == []


def test_only_rows_of_one_group_are_compared_and_the_best_is_found() -> None:
    items = [((number, PLAIN), rank(False, pixels, uid(number))) for number, pixels in enumerate((1, 5, 4, 9, 8, 2))]
    assert neighbours(items, limits(16), groups=[7, 7, 7, 2, 2, 2]) == [1, -1, 1, -1, 3, 3]
    assert neighbours(items, limits(16)) == [3, 3, 3, -1, 3, 3]


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_against_every_pair(seed: int) -> None:
    """Within a bucket all rows share the band of the bucket, so here all share the highest one."""
    rng = random.Random(seed)
    items = ranked(rng, list(dict.fromkeys(hash_ >> 16 for hash_ in clustered(rng, 120, 4))))
    groups = [rng.randrange(4) for _ in items]
    expected = []
    for (own, its_rank), group in zip(items, groups, strict=True):
        better = [
            (r, row) for row, ((other, r), its) in enumerate(zip(items, groups, strict=True))
            if its == group and r < its_rank and is_near(own, other, limits(3))
        ]  # fmt: skip
        expected.append(min(better)[1] if better else -1)
    assert neighbours(items, limits(3), groups) == expected
    assert any(row >= 0 for row in expected)


def test_both_sides_of_the_distance() -> None:
    base, better = 0x0123456789ABCDEF, rank(False, 10, uid(0))
    for max_hamming in range(8):
        for flips in (max_hamming, max_hamming + 1):
            # Distant and adjacent bits.
            for mask in (sum(1 << (63 * i // 8) for i in range(flips)), (1 << flips) - 1):
                items = [((base ^ mask, PLAIN), rank(False, 5, uid(1))), ((base, PLAIN), better)]
                assert neighbours(items, limits(max_hamming)) == [1 if flips <= max_hamming else -1, -1]


@pytest.mark.parametrize(
    ("other", "apart"),
    [
        (PLAIN, 0), (with_steps((0, 6)), 1), (with_steps((0, 3)), 2), (with_steps((63, 15)), 10),
        (with_steps((64, 6)), 1), (with_steps((95, 1)), 4),
        (with_steps(*((place, 6) for place in range(64))), 0),  # all of it is brighter by a step
        (with_steps(*((place, 7) for place in range(64))), 1), (with_steps(*((place, 15) for place in range(64))), 9),
        (with_steps(*((place, 6) for place in range(64, 96))), 1),  # another colour
        (with_steps((0, 4), *((place, 6) for place in range(1, 64))), 2),
    ],
)  # fmt: skip
def test_steps_apart(other: bytes, apart: int) -> None:
    one, two = (steps_of(np.frombuffer(thumb, np.uint8)[None]) for thumb in (PLAIN, other))
    assert steps_apart(one, two).tolist() == steps_apart(two, one).tolist() == [apart]


@pytest.mark.parametrize("flips", range(4))
def test_bands_miss_no_pair_of_at_most_3_bits(flips: int) -> None:
    rng = random.Random(flips)
    for _ in range(300):
        one = rng.getrandbits(64)
        other = one ^ sum(1 << bit for bit in rng.sample(range(64), flips))
        values = [[int(band[0]) for band in bands(np.array([value], np.uint64))] for value in (one, other)]
        assert len(values[0]) == 4
        assert any(a == b for a, b in zip(*values, strict=True))


def test_a_hash_is_its_bands() -> None:
    values = bands(np.array([0x0123456789ABCDEF], np.uint64))
    assert [int(value[0]) for value in values] == [0xCDEF, 0x89AB, 0x4567, 0x0123]


def test_only_better_images_count() -> None:
    items = [((0, PLAIN), rank(False, 5, uid(1))), ((1, PLAIN), rank(False, 4, uid(2)))]
    assert neighbours(items, limits(3)) == [-1, 0]


def test_a_million_equal_images_are_one() -> None:
    count = 10**6
    uids = np.frombuffer(np.arange(count, dtype=">u8").repeat(2).tobytes(), "S16")
    same = Ranked(np.full(count, b"\1" * 56), np.zeros(count, bool), np.ones(count, np.int64), uids)
    assert len(best_of_signatures(same)) == 1


def test_rank_prefers_what_passes_the_other_rules_then_pixels_then_the_smaller_uid() -> None:
    ordered = [
        rank(False, 100, uid(1)), rank(False, 100, uid(2)), rank(False, 99, uid(0)), rank(True, 10_000, uid(0)),
        rank(True, 10_000, uid(3)), rank(True, 5, uid(0)),
    ]  # fmt: skip
    assert all(better < worse for better, worse in itertools.pairwise(ordered))
    for order in itertools.permutations(range(len(ordered))):
        of_one = columns([((7, PLAIN), ordered[place]) for place in order])
        assert items_of(best_of_signatures(of_one)) == [((7, PLAIN), ordered[0])]
        assert [order[row] for row in of_one.order(of_one.signatures)] == list(range(len(ordered)))


def test_a_better_picture_that_fails_another_rule_loses() -> None:
    items = [((0x0F, PLAIN), rank(True, 4000 * 3000, uid(1))), ((0x0E, PLAIN), rank(False, 300 * 200, uid(2)))]
    assert oracle(items, limits(3)) == {items[0][0]: items[1][1], items[1][0]: items[1][1]}
    check(items, limits(3), tile_hashes=2)


def test_verdict() -> None:
    assert keeps(None)
    assert not keeps(uid(1))


# The hash ---------------------------------------------------------------------------------------------------------


def hash_of(image: Image.Image) -> str:
    return perceptual_hash(small_copy(np.asarray(image.convert("RGB"))))


def apart(one: Image.Image, other: Image.Image) -> int:
    """The steps between the thumbnails of two images."""
    thumbs = (thumbnail(small_copy(np.asarray(image.convert("RGB")))) for image in (one, other))
    return int(steps_apart(*(steps_of(np.frombuffer(thumb, np.uint8)[None]) for thumb in thumbs))[0])


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
    assert max(apart(image, copy) for copy in copies) <= 1


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


def test_a_symmetric_drawing_keeps_its_hash() -> None:
    """Half of its frequencies are 0, and what an encoder makes of them is noise."""
    image = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((64, 64, 191, 191), fill="navy")
    draw.ellipse((100, 100, 155, 155), fill="gold")
    copies = [saved_as(image, "JPEG", quality=quality) for quality in (30, 50, 75)]
    copies += [saved_as(image.resize((100, 100)), "WEBP", quality=50)]
    assert max(distance(hash_of(image), hash_of(copy)) for copy in copies) <= 1


def test_colours_tell_flags_apart() -> None:
    def flag(*colours: str) -> Image.Image:
        image = Image.new("RGB", (300, 200))
        for place, colour in enumerate(colours):
            image.paste(colour, (place * 100, 0, place * 100 + 100, 200))
        return image

    italy, france = flag("green", "white", "red"), flag("navy", "white", "red")
    assert distance(hash_of(italy), hash_of(france)) <= 3
    assert apart(italy, france) > 1
    assert apart(italy, saved_as(italy, "JPEG", quality=50)) <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2), (33, 31)])
def test_any_shape_has_a_hash(size: tuple[int, int]) -> None:
    own = hash_of(picture(*size))
    assert len(own) == 16
    assert int(own, 16) < 2**64
    assert len(thumbnail(small_copy(np.asarray(picture(*size))))) == 48
