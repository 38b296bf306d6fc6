"""The pool-wide rules, run in a pipeline."""

from __future__ import annotations

import collections
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that, equal_to

from tests.helpers import uid
from transforms.core.records import DeadLetter
from transforms.single_modality.captions import CaptionFrequencySettings
from transforms.single_modality.duplicate_groups import NOT_SCORED
from transforms.single_modality.near_duplicate import NearDuplicateSettings
from transforms.single_modality.pool_wide import CaptionFrequency, NearDuplicate, PoolRows, UniqueUids

BUCKETS = 3


class Row(NamedTuple):
    """One row of `PoolRows`, in plain values."""

    uid: str
    shard: str
    key: str
    caption: str
    hash: str
    pixels: int
    fails: bool
    content: int = 0
    image_count: int = 0
    duplicate_of: str | None = None
    group: str | None = None
    rank: int = NOT_SCORED


def row(number: int, caption: str = "c", hash_: str = "0" * 16, pixels: int = 100, fails: bool = False) -> Row:
    return Row(uid(number), "s", f"k{number}", caption, hash_, pixels, fails, number)


def key_of(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def parts(rows: list[Row], size: int = 3) -> list[PoolRows]:
    """The rows as parts of `size`."""
    columns = (list(zip(*rows[start : start + size], strict=True)) for start in range(0, len(rows), size))
    return [
        PoolRows(
            np.array(uids, "S32"), np.array(shards, "S"), np.array(keys, object),
            np.array([key_of(caption) for caption in captions], "S32"),
            np.array([int(hash_, 16) for hash_ in hashes], np.uint64), np.full(len(hashes), bytes(48), "S48"),
            np.array(pixels), np.array(fails),
            np.array(contents, np.uint64), np.array(counts), np.array([of or "" for of in duplicate_of], "S32"),
            np.array([of or "" for of in groups], "S32"), np.array(ranks, np.int32),
        )
        for uids, shards, keys, captions, hashes, pixels, fails, contents, counts, duplicate_of, groups, ranks
        in columns
    ]  # fmt: skip


def rows_of(part: PoolRows) -> Iterator[Row]:
    """The rows of a part; their captions by key."""
    for values in zip(*(column.tolist() for _, column in part.columns()), strict=True):
        own, shard, key, caption, hash_, _, pixels, fails, content, count, of, group, rank = values
        yield Row(own.decode(), shard.decode(), key, caption.decode(), f"{hash_:016x}", pixels, fails, content, count,
                  of.decode() or None, group.decode() or None, rank)  # fmt: skip


def by_key(rows: list[Row]) -> list[Row]:
    return [r._replace(caption=key_of(r.caption)) for r in rows]


def decided(r: Row) -> Row:
    """The row without the columns that no later pass reads."""
    return r._replace(caption="", hash="", pixels=0)


def run(rows: list[Row], transform: Callable[[beam.Pipeline], beam.PTransform], expected: list[Row]) -> None:
    with beam.Pipeline("FnApiRunner") as p:
        found = p | "Rows" >> beam.Create(parts(rows)) | transform(p) | beam.FlatMap(rows_of)
        assert_that(found | "Decided" >> beam.Map(decided), equal_to([decided(r) for r in expected]))


def frequency(settings: CaptionFrequencySettings, pool_samples: int) -> Callable[[beam.Pipeline], beam.PTransform]:
    return lambda p: CaptionFrequency(settings, p | "Pool samples" >> beam.Create([pool_samples]), BUCKETS)


# Uids -------------------------------------------------------------------------------------------------------------


def unique(rows: list[Row], stay: list[Row], repeated: list[Row]) -> None:
    def place(letter: DeadLetter) -> tuple[str, str, str, str, str]:
        return letter.shard, letter.key, letter.uid, letter.reason, letter.stage

    with beam.Pipeline("FnApiRunner") as p:
        found = p | beam.Create(parts(rows)) | UniqueUids(BUCKETS)
        assert_that(found[UniqueUids.UNIQUE] | beam.FlatMap(rows_of), equal_to(by_key(stay)), "stay")
        expected = [(r.shard, r.key, r.uid, "repeated_uid", "single_modality") for r in repeated]
        letters = found[UniqueUids.REPEATED]
        assert_that(letters | "Place" >> beam.Map(place), equal_to(expected), "repeated")


def test_unique_uids_are_kept() -> None:
    rows = [row(n) for n in range(20)]
    unique(rows, rows, [])


def test_no_rows() -> None:
    unique([], [], [])


def test_first_of_repeated_uids_is_kept_in_any_order() -> None:
    rows = [
        row(1)._replace(shard="b", key="a"), row(1)._replace(shard="a", key="z"), row(1)._replace(shard="a", key="y"),
        row(1)._replace(shard="c", key="0"), row(2),
    ]  # fmt: skip
    for order in (rows, rows[::-1]):
        unique(order, [rows[2], rows[4]], [rows[0], rows[1], rows[3]])


def test_a_uid_of_two_different_pairs_is_nobody_s_whatever_the_order() -> None:
    """Two equal pairs and another one: whose tar comes first alphabetically must not decide."""
    same = [row(1)._replace(shard="a"), row(1)._replace(shard="c")]
    other = row(1)._replace(shard="b", content=77)
    for order in itertools.permutations([*same, other, row(2)]):
        unique(list(order), [row(2)], [*same, other])


def messages(rows: list[Row], expected: list[str]) -> None:
    for order in (rows, rows[::-1]):
        with beam.Pipeline("FnApiRunner") as p:
            found = p | beam.Create(parts(order, 1)) | UniqueUids(BUCKETS)
            assert_that(found[UniqueUids.REPEATED] | beam.Map(lambda letter: letter.message), equal_to(expected))


def test_the_letter_says_which_one_stays() -> None:
    messages([row(1), row(1)._replace(key="k9", shard="t")], ["the uid also names k1 of shard s, which stays"])


def test_the_letter_of_a_conflict_names_the_other_pair() -> None:
    rows = [row(1), row(1)._replace(key="k9", shard="t", content=7), row(1)._replace(key="k8", shard="t", content=9)]
    tail = "another pair; give each pair a uid of its own"
    messages(
        rows,
        [f"the uid also names {of}, {tail}" for of in ("k8 of shard t", "k1 of shard s", "k1 of shard s")],
    )


# Caption frequency ------------------------------------------------------------------------------------------------


def test_captions_are_counted_with_distinct_images() -> None:
    rows = [row(n, "often", f"{n:016x}") for n in range(4)]
    rows += [row(10 + n, "reposted", "f" * 16) for n in range(9)]  # one picture, repeated
    rows += [row(20, "once", "0" * 16)]
    counts = {"often": 4, "reposted": 1, "once": 1}
    fails = {"often": True, "reposted": False, "once": False}
    expected = [r._replace(image_count=counts[r.caption], fails=fails[r.caption]) for r in rows]
    run(rows, frequency(CaptionFrequencySettings(min_images=3), 14), expected)


@pytest.mark.parametrize(("images", "pool", "fails"), [(10, 100, False), (11, 100, True), (12, 12_000_000, False),
                                                       (12, 11_999_999, True)])  # fmt: skip
def test_both_sides_of_the_bound(images: int, pool: int, fails: bool) -> None:
    rows = [row(n, "c", f"{n:016x}") for n in range(images)]
    expected = [r._replace(image_count=images, fails=fails) for r in rows]
    run(rows, frequency(CaptionFrequencySettings(), pool), expected)


def test_earlier_failures_remain() -> None:
    failed = row(1, fails=True)
    run([failed], frequency(CaptionFrequencySettings(), 1), [failed._replace(image_count=1)])


def test_images_are_counted_once_per_caption_whatever_the_order() -> None:
    rng = random.Random(0)
    rows = [row(n, f"c{rng.randrange(8)}", f"{rng.randrange(6):016x}") for n in range(400)]
    counts = collections.Counter(caption for caption, _ in {(r.caption, r.hash) for r in rows})
    settings = CaptionFrequencySettings(min_images=10)
    for order in (rows, rows[::-1]):
        run(order, frequency(settings, 1), [r._replace(image_count=counts[r.caption]) for r in rows])


# Near-duplicates --------------------------------------------------------------------------------------------------


def near(max_hamming: int = 3, further_members: int = 4) -> Callable[[beam.Pipeline], beam.PTransform]:
    settings = NearDuplicateSettings(max_hamming=max_hamming, further_members=further_members)
    return lambda _: NearDuplicate(settings, BUCKETS)


def marked(rows: list[Row], duplicates: dict[int, int], ranks: dict[int, int] | None = None) -> list[Row]:
    """The rows with their keepers, the group that follows from these, and `ranks`. By default the members of a group
    rank as they come, and those that fail another rule have no rank."""
    by_uid = {uid(number): uid(of) for number, of in duplicates.items()}
    if ranks is None:
        ranks = {}
        for keeper in dict.fromkeys(duplicates.values()):
            members = [keeper, *(number for number, of in duplicates.items() if of == keeper)]
            passing = [n for n in members if not next(r for r in rows if r.uid == uid(n)).fails]
            ranks |= {number: place for place, number in enumerate(passing) if number not in ranks}
    groups = by_uid | {keeper: keeper for keeper in by_uid.values() if keeper not in by_uid}
    return [
        r._replace(duplicate_of=by_uid.get(r.uid), group=groups.get(r.uid), rank=ranks.get(int(r.uid, 16), NOT_SCORED))
        for r in rows
    ]


def test_every_row_gets_its_own_verdict() -> None:
    rows = [
        row(1, hash_="00" * 8, pixels=50), row(2, hash_="00" * 8, pixels=90), row(3, hash_="00" * 8, pixels=90),
        row(4, hash_="00" * 7 + "07", pixels=70), row(5, hash_="00" * 7 + "0f", pixels=10), row(6, hash_="ff" * 8),
    ]  # fmt: skip
    # 5 lies within 3 bits of 4 alone (1 bit), and 4 within 3 bits of 2, which is the best of its hash. 4 has rank 2 in
    # the group of 2, and 0 as the keeper of 5.
    duplicates = {1: 2, 3: 2, 4: 2, 5: 4}
    run(rows, kept(near()), marked(rows, duplicates, {2: 0, 3: 1, 4: 0, 1: 3, 5: 1}))
    run(rows, kept(near(further_members=1)), marked(rows, duplicates, {2: 0, 3: 1, 4: 0, 5: 1}))
    run(rows, kept(near(further_members=0)), marked(rows, duplicates, {2: 0}))


def kept(transform: Callable[[beam.Pipeline], beam.PTransform]) -> Callable[[beam.Pipeline], beam.PTransform]:
    """The transform, and of a row that comes twice the better rank, as `WritePoolWide` takes it."""

    class Kept(beam.PTransform):
        def expand(self, rows: beam.PCollection) -> beam.PCollection:
            found = rows | transform(rows.pipeline) | beam.FlatMap(rows_of)
            by_uid = found | beam.Map(lambda r: (r.uid, r)) | beam.GroupByKey()
            return by_uid | beam.MapTuple(lambda _, same: parts([min(same, key=lambda r: r.rank % 99)])[0])

    return lambda _: Kept()


def test_members_of_equal_bytes_and_caption_are_scored_once() -> None:
    rows = [row(1, pixels=9), row(2)._replace(content=5), row(3)._replace(content=5), row(4)._replace(content=1)]
    rows = [r._replace(pixels=9 - n) for n, r in enumerate(rows)]
    run(rows, near(), marked(rows, {2: 1, 3: 1, 4: 1}, {1: 0, 2: 1}))
    run(rows[::-1], near(further_members=1), marked(rows, {2: 1, 3: 1, 4: 1}, {1: 0, 2: 1}))


def test_both_sides_of_max_hamming() -> None:
    rows = [row(1, hash_="00" * 8), row(2, hash_="00" * 7 + "07"), row(3, hash_="f0" + "00" * 7)]
    run(rows, near(3), marked(rows, {2: 1}))
    run(rows, near(2), marked(rows, {}))
    run(rows, near(4), marked(rows, {2: 1, 3: 1}, {1: 0, 2: 1, 3: 2}))
    run(rows, near(0), marked(rows, {}))


def test_the_keeper_is_one_that_passes_the_other_rules() -> None:
    rows = [row(1, pixels=9000, fails=True), row(2, pixels=10), row(3, pixels=20, fails=True)]
    run(rows, near(), marked(rows, {1: 2, 3: 2}))


def test_sample_that_passes_is_never_dropped_for_one_that_fails() -> None:
    rng = random.Random(0)
    hashes = [f"{rng.getrandbits(4):016x}" for _ in range(60)]
    rows = [row(n, hash_=h, pixels=rng.randrange(5), fails=rng.random() < 0.5) for n, h in enumerate(hashes)]
    fails = {r.uid: r.fails for r in rows}

    def check(found: list[Row]) -> None:
        assert {r.uid for r in found} == {r.uid for r in rows}
        for each in found:
            if each.duplicate_of is not None and not each.fails:
                assert not fails[each.duplicate_of]
        assert any(r.duplicate_of is None and not r.fails for r in found)

    with beam.Pipeline("FnApiRunner") as p:
        found = p | beam.Create(parts(rows)) | NearDuplicate(NearDuplicateSettings(), BUCKETS)
        assert_that(found | beam.FlatMap(rows_of), check)


def test_a_rule_that_the_pool_decides_counts_for_the_rank() -> None:
    """The larger picture's caption is too frequent, so the smaller one stays."""
    rows = [row(n, "stock", f"{n:015x}0", pixels=900) for n in range(1, 4)] + [row(9, "own", "0" * 14 + "10", pixels=1)]

    class Both(beam.PTransform):
        def expand(self, rows_: beam.PCollection) -> beam.PCollection:
            pool = rows_.pipeline | "Pool samples" >> beam.Create([4])
            counted = rows_ | CaptionFrequency(CaptionFrequencySettings(min_images=2), pool, BUCKETS)
            return counted | NearDuplicate(NearDuplicateSettings(max_hamming=0), BUCKETS)

    def summary(found: list[Row]) -> None:
        verdicts: dict[str, Any] = {r.uid: r.duplicate_of for r in found}
        assert verdicts == {uid(1): uid(9), uid(2): None, uid(3): None, uid(9): None}

    with beam.Pipeline("FnApiRunner") as p:
        assert_that(p | beam.Create(parts(rows)) | Both() | beam.FlatMap(rows_of), summary)
