"""Where a pair has its caption, its uid and its further fields, and which of them the recipe names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.sources.webdataset import read_samples
from tests.helpers import BOUNDS, Members, jpeg, sample_members, tar_bytes
from transforms.core.recipe import PoolSettings
from transforms.core.records import DeadLetter, Sample, Shard


def read(folder: Path, members: Members, pool: PoolSettings = BOUNDS) -> list[Sample | DeadLetter]:
    path = folder / "00000.tar"
    path.write_bytes(tar_bytes(members))
    return list(read_samples(Shard("00000", str(path), "f"), pool, "stage"))


def fields(key: str, **metadata: Any) -> Members:
    """Return an image and a json, without a text file."""
    return [(f"{key}.jpg", jpeg()), (f"{key}.json", json.dumps(metadata).encode())]


def told(found: list[Sample | DeadLetter]) -> list[tuple[str, str]]:
    return [
        (item.annotation.key, item.annotation.caption) if isinstance(item, Sample) else (item.key, f"!{item.reason}")
        for item in found
    ]


@pytest.mark.parametrize("field", ["caption", "text", "alt_text"])
def test_caption_in_the_json(tmp_path: Path, field: str) -> None:
    assert told(read(tmp_path, fields("k", **{field: "a dog"}))) == [("k", "a dog")]
    both = [*fields("k", **{field: "a dog"}), ("k.txt", b"a cat")]
    assert told(read(tmp_path, both)) == [("k", "a cat")]  # the file is what a trainer reads


@pytest.mark.parametrize("given", [None, 7, [], [None, 7], {"en": "a dog"}, False])
def test_what_is_no_caption_in_the_json(tmp_path: Path, given: Any) -> None:
    found = read(tmp_path, fields("k", caption=given))
    assert told(found) == [("k", "!missing_caption")]
    assert isinstance(found[0], DeadLetter)
    assert "(caption, captions, text, texts, alt_text); the key has k.jpg, k.json" in found[0].message
    assert told(read(tmp_path, fields("k", caption=given, text="a dog"))) == [("k", "a dog")]


def test_caption_field_of_the_recipe(tmp_path: Path) -> None:
    pool = PoolSettings(caption_fields=["alt", "title"])
    members = [*fields("a", title="t", caption="c"), *fields("b", title="t", alt="x"), *fields("c", caption="c")]
    assert told(read(tmp_path, members, pool)) == [("a", "t"), ("b", "x"), ("c", "!missing_caption")]


@pytest.mark.parametrize("name", ["k.caption", "k.cap", "k.caption.txt", "k.TEXT", "k.text.txt"])
def test_caption_under_another_name(tmp_path: Path, name: str) -> None:
    assert told(read(tmp_path, [("k.image.jpg", b"x"), (name, b"a dog")])) == [("k", "a dog")]


def test_several_captions_are_samples_of_their_own(tmp_path: Path) -> None:
    captions = ["a dog", "a red dog", None, "a dog", "ein Hund"]
    for metadata in ({"uid": "ab" * 16}, {}):
        found = read(tmp_path, [*fields("k", captions=captions, **metadata), *fields("l", captions=["one"], uid=7)])
        assert told(found) == [("k#0", "a dog"), ("k#1", "a red dog"), ("k#2", "ein Hund"), ("l", "one")]
        uids = [item.annotation.uid for item in found if isinstance(item, Sample)]
        assert len(set(uids)) == 4 and all(re.fullmatch("[0-9a-f]{32}", one) for one in uids)
        assert uids[3] == f"{7:032x}"
        turned = read(tmp_path, fields("k", captions=captions[::-1], **metadata))  # a uid is the caption's, wherever
        assert {s.annotation.uid for s in turned if isinstance(s, Sample)} == set(uids[:3])


def test_the_first_of_several_captions(tmp_path: Path) -> None:
    pool = PoolSettings(several_captions="first")
    (sample,) = read(tmp_path, fields("k", captions=["a dog", "a red dog"], uid="ab" * 16), pool)
    assert isinstance(sample, Sample)
    assert (sample.annotation.key, sample.annotation.caption, sample.annotation.uid) == ("k", "a dog", "ab" * 16)


def test_bounds_of_captions_in_the_json(tmp_path: Path) -> None:
    pool = PoolSettings(max_caption_bytes=9, max_captions=3)
    found = read(tmp_path, fields("k", captions=["a dog", "ein Häschen", "\ud800"]), pool)
    assert told(found) == [("k#0", "a dog"), ("k#1", "!caption_too_large"), ("k#2", "!undecodable_caption")]
    assert told(read(tmp_path, fields("k", captions=list("abcd")), pool)) == [("k", "!too_many_captions")]
    assert told(read(tmp_path, fields("k", caption="\ud800"))) == [("k", "!undecodable_caption")]


def test_a_key_like_that_of_a_caption(tmp_path: Path) -> None:
    found = read(tmp_path, [*fields("k", captions=["a", "b"]), *fields("k#1", caption="c")])
    assert told(found) == [("k#0", "a"), ("k#1", "b"), ("k#1", "!duplicate_key")]


@pytest.mark.parametrize(
    ("given", "uid", "is_noted"),
    [
        ("6F9619FF-8B86-D011-B42D-00C04FC964FF", "6f9619ff8b86d011b42d00c04fc964ff", False),
        (5, f"{5:032x}", False), ("5", f"{5:032x}", False), (0, "0" * 32, False), (12345.0, f"{12345:032x}", False),
        (2**128 - 1, "f" * 32, False), (-1, "f" * 32, False), (-(2**63), "f" * 16 + "8" + "0" * 15, False),
        ("1" * 32, "1" * 32, False),
        (None, None, False), ("ab", None, True), ("g" * 32, None, True), ("a" * 33, None, True), (2**128, None, True),
        ("6F9619FF8B86-D011-B42D-00C04FC964FF", None, True), ("١" * 32, None, True), (["a" * 32], None, True),
        (0.5, None, True), (1e300, None, True), (True, None, True), ("", None, True), ("9" * 5000, None, True),
    ],
)  # fmt: skip
def test_uid_of_the_pool(tmp_path: Path, given: Any, uid: str | None, is_noted: bool) -> None:
    (sample,) = read(tmp_path, sample_members("k", metadata={"uid": given}))
    assert isinstance(sample, Sample)
    assert sample.annotation.uid == uid if uid else re.fullmatch("[0-9a-f]{32}", sample.annotation.uid)
    assert sample.annotation.pool_notes == ("uid_replaced" if is_noted else None)


def test_uid_field_of_the_recipe(tmp_path: Path) -> None:
    pool = PoolSettings(uid_fields=["id", "uid"])
    found = read(tmp_path, [*fields("a", caption="c", uid=1, id=2), *fields("b", caption="c", uid=3)], pool)
    assert [item.annotation.uid for item in found if isinstance(item, Sample)] == [f"{2:032x}", f"{3:032x}"]


def test_two_pools_without_uids_share_none_but_for_the_same_pair(tmp_path: Path) -> None:
    pairs = {"one": ("a dog", 1), "other caption": ("a cat", 1), "other image": ("a dog", 2), "again": ("a dog", 1)}
    uids = {}
    for pool, (caption, seed) in pairs.items():
        (tmp_path / pool).mkdir()
        found = read(tmp_path / pool, [*sample_members("0", caption, seed), *sample_members("1", caption, seed)])
        uids[pool] = [item.annotation.uid for item in found if isinstance(item, Sample)]
    assert uids["one"] == uids["again"]  # the same shard of the same pairs
    assert len({uid for of_pool in uids.values() for uid in of_pool}) == 6  # a pair that is twice in a pool is two


def test_only_what_is_needed_of_the_json_is_kept(tmp_path: Path) -> None:
    metadata = {"uid": "ab" * 16, "url": "u", "exif": {"a": [1] * 99}, "width": 5, "face_bboxes": [], "height": None}
    (sample,) = read(tmp_path, sample_members("k", metadata=metadata))
    assert isinstance(sample, Sample)
    assert sample.metadata == {"uid": "ab" * 16, "width": 5, "face_bboxes": []}
    assert sample.annotation.kept_fields is None


def test_kept_fields(tmp_path: Path) -> None:
    pool = PoolSettings(keep_columns=["url", "similarity", "tags", "gone"])
    metadata = {"url": "https://e.org/\ud800", "similarity": 0.25, "tags": ["a", "ü"], "other": 1}
    (sample,) = read(tmp_path, sample_members("k", metadata=metadata), pool)
    assert isinstance(sample, Sample)
    found = json.loads(sample.annotation.kept_fields)
    assert found == {"url": "https://e.org/\\ud800", "similarity": "0.25", "tags": '["a", "\\u00fc"]'}
    (sample,) = read(tmp_path, sample_members("k", metadata={"url": "x" * 2**17}), pool)
    assert isinstance(sample, Sample)
    assert len(json.loads(sample.annotation.kept_fields)["url"]) == 10_000


def test_number_of_values_in_a_json_is_bounded(tmp_path: Path) -> None:
    def outcome(content: str) -> str:
        members = [("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", content.encode())]
        return told(read(tmp_path, members, PoolSettings(max_json_values=10)))[0][1]

    assert outcome(json.dumps({"a": [0] * 9})) == "c"
    contents: list[dict[str, Any]] = [{"a": [0] * 10}, {str(n): 0 for n in range(11)}, {"a": [{}] * 6}]
    for content in contents:
        assert outcome(json.dumps(content)) == "!json_too_many_values"
    assert outcome(json.dumps({"a": ",,,,,,,,,,,,,,[[[[[[[[[[\\\"{{{,,,,"})) == "c"
