"""Which member of a group of near-duplicates stands: the pure functions, in every order."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import numpy as np
import pytest

from tests.helpers import annotation, uid
from transforms.single_modality.duplicate_groups import (
    Changes,
    Contenders,
    FinalDuplicates,
    Members,
    best_of_groups,
    displaced_by,
    standing,
)
from transforms.single_modality.near_duplicate import as_contender


class Member(NamedTuple):
    """One member, in plain values. `keeper` is the better image near it, None for the keeper of the group."""

    number: int
    keeper: int | None
    survives: bool = True
    pixels: int = 100
    image: int = 0
    cosine: float = 0.3
    scored: bool = True
    heads: bool = False  # others are near-duplicates of it, though it is one itself


def members_of(rows: list[Member]) -> Members:
    visits = [(row, uid(row.number), True) for row in rows if row.heads and row.survives]
    own = [(row, uid(row.number if row.keeper is None else row.keeper), False) for row in rows]
    every = own + visits
    return Members(
        np.array([group for _, group, _ in every], "S32"),
        np.array([uid(row.number) for row, _, _ in every], "S32"),
        np.array(["s" for _ in every], "S"),
        np.array(["" if row.keeper is None else uid(row.keeper) for row, _, _ in every], "S32"),
        np.array([visit for _, _, visit in every], bool),
        np.array([row.scored for row, _, _ in every], bool),
        np.array([row.survives and row.scored for row, _, _ in every], bool),
        np.array([row.pixels for row, _, _ in every], np.int64),
        np.array([row.image or row.number for row, _, _ in every], np.uint64),
        np.array([row.cosine for row, _, _ in every], np.float32),
    )


def verdicts(rows: list[Member]) -> dict[int, int | None]:
    """The final `duplicate_of` of each member."""
    members = members_of(rows)
    final = displaced_by(members, standing(members))
    own = zip(members.uids.tolist(), members.visits.tolist(), final.tolist(), strict=True)
    return {int(of, 16): int(keeper, 16) if keeper else None for of, visits, keeper in own if not visits}


def in_every_order(rows: list[Member], expected: dict[int, int | None]) -> None:
    for order in itertools.permutations(rows):
        assert verdicts(list(order)) == expected


# Three members: 1 is the keeper (the most pixels), then 2, then 3.
def three(*survive: int) -> list[Member]:
    return [Member(n, None if n == 1 else 1, n in survive, pixels=100 - n) for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("survive", "expected"),
    [
        ((1, 2, 3), {1: None, 2: 1, 3: 1}),
        ((1,), {1: None, 2: 1, 3: 1}),  # they go as duplicates, whatever else they fail
        ((2, 3), {1: None, 2: None, 3: 2}),  # the keeper goes by the rule that it fails, not as a duplicate
        ((2,), {1: None, 2: None, 3: 2}),
        ((3,), {1: None, 2: None, 3: None}),  # 1 and 2 go by the rule that they fail
        ((1, 3), {1: None, 2: 1, 3: 1}),
        ((), {1: None, 2: None, 3: None}),
    ],
)
def test_the_best_survivor_of_three_stands_in_every_order(
    survive: tuple[int, ...], expected: dict[int, int | None]
) -> None:
    in_every_order(three(*survive), expected)


def test_which_number_is_best_does_not_matter() -> None:
    """The uid decides nothing where pixels differ: each of three is the keeper once, and the true pair once."""
    for keeper, true, other in itertools.permutations((1, 2, 3)):
        rows = [
            Member(keeper, None, survives=False, pixels=900),
            Member(true, keeper, pixels=500),
            Member(other, keeper, survives=False, pixels=100),
        ]
        in_every_order(rows, {keeper: None, true: None, other: true})


def test_members_that_were_not_scored_stay_duplicates() -> None:
    rows = [Member(1, None, survives=False), Member(2, 1, scored=False), Member(3, 1)]
    in_every_order(rows, {1: None, 2: 3, 3: None})
    in_every_order([*rows[:2], rows[2]._replace(survives=False)], {1: None, 2: 1, 3: None})


def test_of_equal_bytes_the_caption_with_the_higher_cosine_stands() -> None:
    rows = [Member(n, None if n == 1 else 1, image=7, cosine=cosine) for n, cosine in ((1, 0.2), (2, 0.31), (3, 0.3))]
    in_every_order(rows, {1: 2, 2: None, 3: 2})
    in_every_order([row._replace(cosine=0.3) for row in rows], {1: None, 2: 1, 3: 1})


def test_a_better_image_stands_whatever_the_cosine() -> None:
    rows = [Member(1, None, pixels=900), Member(2, 1, image=7, cosine=0.9), Member(3, 1, image=7, cosine=0.5)]
    in_every_order(rows, {1: None, 2: 1, 3: 1})
    in_every_order([rows[0]._replace(survives=False), *rows[1:]], {1: None, 2: None, 3: 2})


@pytest.mark.parametrize(
    ("survive", "expected"),
    [
        ((1, 2, 3), {1: None, 2: 1, 3: 2}),  # 3 lies near 2 alone: a better image near it passes all other rules
        ((2, 3), {1: None, 2: None, 3: 2}),
        ((1, 3), {1: None, 2: 1, 3: None}),
        ((3,), {1: None, 2: None, 3: None}),
        ((1, 2), {1: None, 2: 1, 3: 2}),
        ((2,), {1: None, 2: None, 3: 2}),
    ],
)
def test_a_chain(survive: tuple[int, ...], expected: dict[int, int | None]) -> None:
    chain = [Member(1, None, pixels=99), Member(2, 1, pixels=98, heads=True), Member(3, 2, pixels=97)]
    in_every_order([row._replace(survives=row.number in survive) for row in chain], expected)


@pytest.mark.parametrize("seed", range(30))
def test_no_tree_of_groups_loses_its_pair(seed: int) -> None:
    """Whatever survives, each tree of groups keeps one, and each survivor that goes has a better one in its place."""
    rng = random.Random(seed)
    keepers: dict[int, int | None] = {n: rng.choice([None, *range(max(1, n - 4), n)]) for n in range(1, 40)}
    heads = {keeper for keeper in keepers.values() if keeper}
    rows = [
        Member(n, keeper, rng.random() < 0.4, pixels=1000 - n, heads=n in heads and keeper is not None)
        for n, keeper in keepers.items()
    ]
    final = verdicts(rows)

    def root(n: int) -> int:
        keeper = keepers[n]
        return n if keeper is None else root(keeper)

    survivors = {row.number for row in rows if row.survives}
    kept = {n for n in survivors if final[n] is None}
    assert {root(n) for n in survivors} == {root(n) for n in kept}
    for n in survivors - kept:
        better = final[n]
        assert better in survivors and better < n
    rng.shuffle(rows)
    assert verdicts(rows) == final


# Who is scored ----------------------------------------------------------------------------------------------------


def contenders(rows: list[tuple[int, int, int, int]]) -> Contenders:
    groups, uids, pixels, contents = zip(*rows, strict=True)
    return Contenders(
        np.array([uid(n) for n in groups], "S32"), np.array([uid(n) for n in uids], "S32"),
        np.array(pixels, np.int64), np.array(contents, np.uint64),
    )  # fmt: skip


def test_the_best_of_each_group_are_scored_in_every_order() -> None:
    rows = [(1, 1, 90, 11), (1, 2, 80, 12), (1, 3, 80, 13), (1, 4, 80, 13), (9, 9, 50, 12)]
    for order in itertools.permutations(rows):
        best, ranks = best_of_groups(contenders(list(order)), 3)
        found = [int(of, 16) for of in best.uids.tolist()]
        # 4 has the bytes and the caption of 3, so it needs no score of its own.
        assert dict(zip(found, ranks.tolist(), strict=True)) == {1: 0, 2: 1, 3: 2, 9: 0}
        best, _ = best_of_groups(contenders(list(order)), 1)
        assert [int(of, 16) for of in best.uids.tolist()] == [1, 9]


def test_what_is_joined_in_parts_is_the_same() -> None:
    rng = random.Random(0)
    rows = [(rng.randrange(4), n, rng.randrange(3), rng.randrange(30)) for n in range(60)]
    expected, ranks = best_of_groups(contenders(rows), 4)
    best, _ = best_of_groups(contenders(rows[:20]), 4)
    for part in (rows[20:25], rows[25:]):
        best, found = best_of_groups(Contenders.joined([best, contenders(part)]), 4)
    assert (best.uids.tolist(), found.tolist()) == (expected.uids.tolist(), ranks.tolist())


def test_a_contender_is_judged_by_the_other_rules() -> None:
    scored = annotation(duplicate_of=uid(1), near_duplicate_group=uid(1), near_duplicate_rank=1)
    assert as_contender(scored).duplicate_of is None
    for other in (annotation(), annotation(duplicate_of=uid(1), near_duplicate_group=uid(1))):
        assert as_contender(other) == other


def test_changes_are_applied_to_their_samples_alone() -> None:
    changes = Changes(np.array([uid(1), uid(2)], "S32"), np.array(["s", "s"], "S"), np.array(["", uid(7)], "S32"))
    final = FinalDuplicates([changes])
    assert final(annotation(uid=uid(1), duplicate_of=uid(9))).duplicate_of is None
    assert final(annotation(uid=uid(2))).duplicate_of == uid(7)
    assert final(annotation(uid=uid(3), duplicate_of=uid(9))).duplicate_of == uid(9)
