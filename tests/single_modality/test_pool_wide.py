"""What only the whole pool can tell, run through a pipeline."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to

from pipeline import recipe
from pipeline.records import DeadLetter
from tests.helpers import uid
from transforms.single_modality.pool_wide import CaptionFrequency, NearDuplicate, PoolRow, UniqueUids


def row(number: int, caption: str = "c", hash_: str = "0" * 16, pixels: int = 100, fails: bool = False) -> PoolRow:
    return PoolRow(uid(number), "s", f"k{number}", caption, hash_, pixels, fails)


def run(rows: list[PoolRow], transform: Callable[[beam.Pipeline], beam.PTransform], expected: list[PoolRow]) -> None:
    with beam.Pipeline("FnApiRunner") as p:
        found = p | "Rows" >> beam.Create(rows) | transform(p)
        assert_that(found, equal_to(expected))


def frequency(settings: recipe.CaptionFrequency, pool_samples: int) -> Callable[[beam.Pipeline], beam.PTransform]:
    return lambda p: CaptionFrequency(settings, p | "Pool samples" >> beam.Create([pool_samples]))


# Uids -------------------------------------------------------------------------------------------------------------


def unique(rows: list[PoolRow], stay: list[PoolRow], repeated: list[PoolRow]) -> None:
    def place(letter: DeadLetter) -> tuple[str, str, str, str, str]:
        return letter.shard, letter.key, letter.uid, letter.reason, letter.stage

    with beam.Pipeline("FnApiRunner") as p:
        found = p | beam.Create(rows) | UniqueUids()
        assert_that(found[UniqueUids.UNIQUE], equal_to(stay), "stay")
        expected = [(r.shard, r.key, r.uid, "repeated_uid", "single_modality") for r in repeated]
        letters = found[UniqueUids.REPEATED]
        assert_that(letters | "Place" >> beam.Map(place), equal_to(expected), "repeated")


def test_uids_that_stand_once_stay() -> None:
    rows = [row(n) for n in range(20)]
    unique(rows, rows, [])


def test_no_rows() -> None:
    unique([], [], [])


def test_of_repeated_uids_the_first_place_stays_whatever_the_order() -> None:
    rows = [
        row(1)._replace(shard="b", key="a"), row(1)._replace(shard="a", key="z"), row(1)._replace(shard="a", key="y"),
        row(1)._replace(shard="c", key="0"), row(2),
    ]  # fmt: skip
    for order in (rows, rows[::-1]):
        unique(order, [rows[2], rows[4]], [rows[0], rows[1], rows[3]])


def test_the_letter_says_which_one_stays() -> None:
    with beam.Pipeline("FnApiRunner") as p:
        found = p | beam.Create([row(1), row(1)._replace(key="k9", shard="t")]) | UniqueUids()
        messages = found[UniqueUids.REPEATED] | beam.Map(lambda letter: letter.message)
        assert_that(messages, equal_to([f"the uid also names {row(1).key} of shard s, which stays"]))


# Caption frequency ------------------------------------------------------------------------------------------------


def test_captions_are_counted_with_distinct_images() -> None:
    rows = [row(n, "often", f"{n:016x}") for n in range(4)]
    rows += [row(10 + n, "reposted", "f" * 16) for n in range(9)]  # one picture again and again
    rows += [row(20, "once", "0" * 16)]
    counts = {"often": 4, "reposted": 1, "once": 1}
    fails = {"often": True, "reposted": False, "once": False}
    expected = [
        r._replace(caption_image_count=counts[r.caption_key], fails_other_rule=fails[r.caption_key]) for r in rows
    ]
    run(rows, frequency(recipe.CaptionFrequency(min_images=3), 14), expected)


@pytest.mark.parametrize(("images", "pool", "fails"), [(10, 100, False), (11, 100, True), (12, 12_000_000, False),
                                                       (12, 11_999_999, True)])  # fmt: skip
def test_both_sides_of_the_bound(images: int, pool: int, fails: bool) -> None:
    rows = [row(n, "c", f"{n:016x}") for n in range(images)]
    expected = [r._replace(caption_image_count=images, fails_other_rule=fails) for r in rows]
    run(rows, frequency(recipe.CaptionFrequency(), pool), expected)


def test_what_failed_before_still_fails() -> None:
    failed = row(1, fails=True)
    run([failed], frequency(recipe.CaptionFrequency(), 1), [failed._replace(caption_image_count=1)])


# Near-duplicates --------------------------------------------------------------------------------------------------


def near(max_hamming: int = 3) -> Callable[[beam.Pipeline], beam.PTransform]:
    return lambda _: NearDuplicate(recipe.NearDuplicate(max_hamming=max_hamming))


def marked(rows: list[PoolRow], duplicates: dict[int, int]) -> list[PoolRow]:
    by_uid = {uid(number): uid(of) for number, of in duplicates.items()}
    return [r._replace(duplicate_of=by_uid.get(r.uid)) for r in rows]


def test_every_row_gets_its_own_verdict() -> None:
    rows = [
        row(1, hash_="00" * 8, pixels=50), row(2, hash_="00" * 8, pixels=90), row(3, hash_="00" * 8, pixels=90),
        row(4, hash_="00" * 7 + "07", pixels=70), row(5, hash_="00" * 7 + "0f", pixels=10), row(6, hash_="ff" * 8),
    ]  # fmt: skip
    # 5 lies within 3 bits of 4 alone (1 bit), and 4 within 3 bits of 2, which is the best of its hash.
    run(rows, near(), marked(rows, {1: 2, 3: 2, 4: 2, 5: 4}))


def test_both_sides_of_max_hamming() -> None:
    rows = [row(1, hash_="00" * 8), row(2, hash_="00" * 7 + "07"), row(3, hash_="f0" + "00" * 7)]
    run(rows, near(3), marked(rows, {2: 1}))
    run(rows, near(2), marked(rows, {}))
    run(rows, near(4), marked(rows, {2: 1, 3: 1}))
    run(rows, near(0), marked(rows, {}))


def test_the_keeper_is_one_that_passes_the_other_rules() -> None:
    rows = [row(1, pixels=9000, fails=True), row(2, pixels=10), row(3, pixels=20, fails=True)]
    run(rows, near(), marked(rows, {1: 2, 3: 2}))


def test_nothing_that_passes_the_others_gives_way_to_what_fails_one() -> None:
    rng = random.Random(0)
    hashes = [f"{rng.getrandbits(4):016x}" for _ in range(60)]
    rows = [row(n, hash_=h, pixels=rng.randrange(5), fails=rng.random() < 0.5) for n, h in enumerate(hashes)]
    fails = {r.uid: r.fails_other_rule for r in rows}

    def check(found: list[PoolRow]) -> None:
        assert len(found) == len(rows)
        for each in found:
            if each.duplicate_of is not None and not each.fails_other_rule:
                assert not fails[each.duplicate_of]
        assert any(r.duplicate_of is None and not r.fails_other_rule for r in found)

    with beam.Pipeline("FnApiRunner") as p:
        assert_that(p | beam.Create(rows) | NearDuplicate(recipe.NearDuplicate()), check)


def test_a_rule_that_the_pool_decides_counts_for_the_rank() -> None:
    """The larger picture's caption is too frequent, so the smaller one stays."""
    rows = [row(n, "stock", f"{n:015x}0", pixels=900) for n in range(1, 4)] + [row(9, "own", "0" * 14 + "10", pixels=1)]

    class Both(beam.PTransform):
        def expand(self, rows_: beam.PCollection) -> beam.PCollection:
            pool = rows_.pipeline | "Pool samples" >> beam.Create([4])
            counted = rows_ | CaptionFrequency(recipe.CaptionFrequency(min_images=2), pool)
            return counted | NearDuplicate(recipe.NearDuplicate(max_hamming=0))

    def summary(found: list[PoolRow]) -> None:
        verdicts: dict[str, Any] = {r.uid: r.duplicate_of for r in found}
        assert verdicts == {uid(1): uid(9), uid(2): None, uid(3): None, uid(9): None}

    with beam.Pipeline("FnApiRunner") as p:
        assert_that(p | beam.Create(rows) | Both(), summary)
