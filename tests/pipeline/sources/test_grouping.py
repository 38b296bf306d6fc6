"""Members of a sample are found wherever they are in the tar, and each pair is counted once."""

from __future__ import annotations

import functools
import itertools
import json
import random
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.sources import grouping
from pipeline.sources.webdataset import read_members, read_samples
from tests.helpers import BOUNDS, Members, jpeg, sample_members, tar_bytes, uid
from transforms.core.recipe import PoolSettings
from transforms.core.records import DeadLetter, Sample, Shard


def read(folder: Path, members: Members | bytes, pool: PoolSettings = BOUNDS) -> list[Sample | DeadLetter]:
    path, reading = folder / "00000.tar", grouping.Reading()
    path.write_bytes(members if isinstance(members, bytes) else tar_bytes(members))
    found = list(read_samples(Shard("00000", str(path), "f"), pool, "stage", reading))
    due = [item.annotation.key if isinstance(item, Sample) else item.key for item in found]
    assert sorted(reading.keys) == sorted(key for key in due if key)  # counted as found
    return found


def told(found: Iterable[Sample | DeadLetter]) -> list[str]:
    return [item.annotation.key if isinstance(item, Sample) else f"!{item.reason}:{item.key}" for item in found]


def pairs(count: int, **more: Any) -> Members:
    return [
        file
        for n in range(count)
        for file in sample_members(f"k{n}", f"caption {n}", seed=n, metadata={"uid": uid(n), **more})
    ]


def told_of(found: Iterable[Sample | DeadLetter]) -> set[tuple[str, str, str, bytes]]:
    samples = [item for item in found if isinstance(item, Sample)]
    return {(s.annotation.uid, s.annotation.key, s.annotation.caption, s.image_bytes) for s in samples}


def by_extension(file: tuple[str, bytes]) -> tuple[str, str]:
    return file[0].rpartition(".")[2], file[0]


def shuffled(members: Members, seed: int) -> Members:
    return random.Random(seed).sample(members, len(members))


Order = Callable[[Members], Members]

ORDERS: dict[str, Order] = {
    "as it was written": lambda members: members,
    "by extension": lambda members: sorted(members, key=by_extension),
    "by extension, backwards": lambda members: sorted(members, key=by_extension, reverse=True),
    "json appended": lambda members: sorted(members, key=lambda file: file[0].endswith("json")),
    **{f"shuffled {seed}": functools.partial(shuffled, seed=seed) for seed in range(5)},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("has_json", [True, False])
def test_six_pairs_are_six_samples_in_any_order_of_their_members(tmp_path: Path, order: str, has_json: bool) -> None:
    members = [file for file in pairs(6) if has_json or not file[0].endswith("json")]
    expected = told_of(read(tmp_path, members))
    assert len(expected) == 6
    found = read(tmp_path, ORDERS[order](members))
    assert told_of(found) == expected
    places = [name for name, _ in ORDERS[order](members) if name.endswith("jpg")]
    assert told(found) == [name.removesuffix(".jpg") for name in places]  # in the order of the images


def test_streaming_and_listing_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    pool = PoolSettings(max_image_bytes=2000)
    kinds = ["jpg", "txt", "json", "heic", "png", "seg.png", "caption.txt", "cap", "md"]
    for _ in range(60):
        members = []
        for key in rng.choices(["a", "b", "c", "c.d", "e.f", "g"], k=rng.randrange(1, 7)):
            names = rng.choice([["jpg", "txt", "json"], rng.choices(kinds, k=rng.randrange(1, 5))])
            members += [(f"{key}.{name}", rng.choice([b"{}", b"x" * 3000])) for name in names]
        found = read(tmp_path, members, pool)
        with monkeypatch.context() as patch:
            patch.setattr(grouping, "_is_plain", lambda entries: False)
            assert read(tmp_path, members, pool) == found


def test_offsets_are_those_of_the_contents(tmp_path: Path) -> None:
    for order in ORDERS.values():
        content = tar_bytes(order(pairs(4)))
        (tmp_path / "a.tar").write_bytes(content)
        for members in read_members(str(tmp_path / "a.tar"), BOUNDS):
            for file in (members.image, members.caption, members.metadata):
                assert file is not None
                assert content[file.offset :].startswith(file.content)


# Keys with dots ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_json", [True, False])
def test_a_dot_is_part_of_a_key(tmp_path: Path, has_json: bool) -> None:
    names = ["22.05", "22.10", "23.01", "0.5x", "22", "a.b/c.d.e"]
    members = [file for name in names for file in sample_members(name)[: 2 + has_json]]
    for order in ORDERS.values():
        assert sorted(told(read(tmp_path, order(members)))) == sorted(names)


def test_a_further_file_of_a_sample_is_no_sample(tmp_path: Path) -> None:
    further = [("k0.seg.png", b"x"), ("k0.seg.v2.png", b"x"), ("k1.alt.json", b"{}"), ("k2.de.txt", b"ein Hund")]
    for order in ORDERS.values():
        found = read(tmp_path, order([*pairs(3), *further]))
        assert sorted(told(found)) == ["k0", "k1", "k2"]
        assert told_of(found) == told_of(read(tmp_path, pairs(3)))


def test_a_pair_with_a_longer_key_is_a_sample(tmp_path: Path) -> None:
    assert told(read(tmp_path, [*sample_members("k"), *sample_members("k.v2")])) == ["k", "k.v2"]


def test_a_sample_that_lacks_a_file_is_told_with_the_files_that_it_has(tmp_path: Path) -> None:
    (letter, other) = read(tmp_path, [("k.512.jpg", b"x"), ("k.json", b"{}"), ("k.txt", b"c"), ("22.05.jpg", b"x")])
    assert isinstance(letter, DeadLetter) and isinstance(other, DeadLetter)
    if letter.key != "k":
        letter, other = other, letter
    assert (letter.reason, letter.key) == ("missing_image", "k")
    assert letter.message.endswith("the key has k.json, k.txt, k.512.jpg")
    assert (other.reason, other.key) == ("missing_caption", "22.05")
    assert other.message.endswith("the key has 22.05.jpg")


# Members that come again ------------------------------------------------------------------------------------------


def test_a_key_that_comes_again_is_judged_once(tmp_path: Path) -> None:
    first, again = sample_members("k", "first", seed=1), sample_members("k", "again", seed=2)
    between = sample_members("l")
    for parts in (slice(0, 3), slice(0, 2)):
        found = read(tmp_path, [*first[parts], *between[parts], *again[parts]])
        assert told(found) == ["k", "l", "!duplicate_key:k"]
        assert isinstance(found[0], Sample)
        assert (found[0].annotation.caption, found[0].image_bytes) == ("first", jpeg(seed=1))


def test_the_first_file_of_a_kind_in_the_recipe_is_used(tmp_path: Path) -> None:
    members = [("k.cap", b"cap"), ("k.image.jpg", b"other"), ("k.jpg", b"x"), ("k.txt", b"txt")]
    for order in itertools.permutations(members):
        (sample,) = read(tmp_path, list(order))
        assert isinstance(sample, Sample)
        assert (sample.annotation.caption, sample.image_bytes) == ("txt", b"x")


# Bounds and damage ------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    members = [(f"k{n}.{kind}", b"x" * 2**20 if kind == "jpg" else b"c") for kind in ("jpg", "txt") for n in range(40)]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(members))
    tracemalloc.start()
    count = sum(1 for _ in read_samples(Shard("a", str(path), "f"), BOUNDS, "stage"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40
    assert peak < 8 * 2**20


def test_texts_beyond_the_memory_of_the_recipe_are_read_again(tmp_path: Path) -> None:
    members = sorted([*pairs(6, padding="x" * 3000)], key=by_extension)
    pool = PoolSettings(max_regroup_bytes=24_000)
    assert told_of(read(tmp_path, members, pool)) == told_of(read(tmp_path, members))


def test_a_list_of_members_beyond_the_memory_of_the_recipe_has_one_reason(tmp_path: Path) -> None:
    found = read(tmp_path, sorted(pairs(30), key=by_extension), PoolSettings(max_regroup_bytes=40_000))
    *others, last = found
    assert isinstance(last, DeadLetter)
    assert (last.reason, last.key) == ("tar_too_large", "")
    assert "tar --sort=name" in last.message and "pool.max_regroup_bytes" in last.message
    assert {item.reason for item in others if isinstance(item, DeadLetter)} == {"broken_tar"}
    assert not told_of(others)


def test_a_scattered_tar_that_breaks_off(tmp_path: Path) -> None:
    members = sorted(pairs(4), key=by_extension)
    content = tar_bytes(members)
    cut = content.index(b"caption 2") + 3
    found = read(tmp_path, content[:cut])
    assert [one for one in told(found) if not one.startswith("!broken_tar")] == ["k0", "k1"]
    letters = [item for item in found if isinstance(item, DeadLetter)]
    assert [letter.key for letter in letters] == ["k2", "k3", ""]
    assert letters[0].message.endswith("more of this sample may be there; the key has k2.jpg, k2.json")


def test_a_tar_by_extension_that_breaks_off_among_its_images(tmp_path: Path) -> None:
    content = tar_bytes(ORDERS["by extension"](pairs(4)))
    cut = content.index(jpeg(seed=3)) + 100
    assert told(read(tmp_path, content[:cut])) == ["!broken_tar:k0", "!broken_tar:k1", "!broken_tar:k2", "!broken_tar:"]


def test_a_sample_without_a_json_at_the_damage_is_not_judged(tmp_path: Path) -> None:
    members = [file for file in pairs(3) if not file[0].endswith("json")]
    content = tar_bytes(members)
    assert told(read(tmp_path, content[: content.index(b"caption 2") + 3])) == ["k0", "k1", "!broken_tar:"]


def test_a_tar_that_becomes_shorter_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([file for file in pairs(2) if not file[0].endswith("json")]))
    found = iter(read_samples(Shard("a", str(path), "f"), BOUNDS, "stage"))
    assert isinstance(next(found), Sample)
    path.write_bytes(path.read_bytes()[:2048])
    assert told(found) == ["!vanished:k1"]


def test_captions_of_a_json_stay_with_their_image(tmp_path: Path) -> None:
    members = [
        file
        for n in range(5)
        for file in [(f"{n}.jpg", jpeg(seed=n)), (f"{n}.json", json.dumps({"caption": f"c{n}"}).encode())]
    ]
    for order in ORDERS.values():
        found = read(tmp_path, order(members))
        assert {(s.annotation.key, s.annotation.caption) for s in found if isinstance(s, Sample)} == {
            (str(n), f"c{n}") for n in range(5)
        }
