"""A pool of 2,000 pairs in all layouts that are read, and of some that cannot be judged: each is counted by uid."""

from __future__ import annotations

import json
import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.output_folder.accounting import reconcile, reconcile_shard
from pipeline.sources.grouping import Reading
from pipeline.sources.pool import list_shards
from pipeline.sources.webdataset import read_samples
from tests.helpers import Members, jpeg, tar_bytes, uid
from transforms.core.recipe import PoolSettings
from transforms.core.records import DeadLetter, Sample
from transforms.single_modality.image_shape import original_size_px

STORED = (16, 16)
JPEG = jpeg(*STORED)
POOL = PoolSettings(keep_columns=["url"])


class Pair(NamedTuple):
    """The expected sample of a pair. `uid` is None if the pool gives no usable one."""

    key: str
    uid: str | None
    caption: str
    size: tuple[int, int] = STORED
    url: str | None = None
    is_noted: bool = False


def image(number: int) -> bytes:
    return JPEG + number.to_bytes(4, "big")  # what follows a JPEG's end is not read


def file(name: str, **metadata: Any) -> tuple[str, bytes]:
    return name, json.dumps(metadata).encode()


Layout = Callable[[int, str], tuple[Members, list[Pair]]]
"""Makes the members of a pair and its expected sample, from a number and a key."""


def border(n: int, key: str) -> tuple[Members, list[Pair]]:
    sizes = {"width": 16, "height": 16, "original_width": 900 + n, "original_height": 200}
    members = [(f"{key}.jpg", image(n)), (f"{key}.txt", f"c{n}".encode()), file(f"{key}.json", uid=uid(n), **sizes)]
    return members, [Pair(key, uid(n), f"c{n}", (900 + n, 200))]


def of_a_table(n: int, key: str) -> tuple[Members, list[Pair]]:
    """Sizes as text and floats, ids as UUIDs."""
    given = str(uuid.UUID(int=n)).upper()
    more = {"original_width": float(900 + n), "original_height": "200", "url": f"u{n}", "tags": [n]}
    members = [(f"{key}.txt", f"c{n}".encode()), file(f"{key}.json", uid=given, **more), (f"{key}.PNG", image(n))]
    return members, [Pair(key, uid(n), f"c{n}", (900 + n, 200), f"u{n}")]


def caption_in_json(n: int, key: str) -> tuple[Members, list[Pair]]:
    size = {"original_width": -1, "original_height": 5}
    members = [file(f"{key}.json", uid=n, caption=f"c{n}", **size), (f"{key}.jpeg", image(n))]
    return members, [Pair(key, uid(n), f"c{n}", is_noted=True)]


def other_names(n: int, key: str) -> tuple[Members, list[Pair]]:
    suffixes = [("image.jpg", "caption.txt"), ("jpg", "caption"), ("webp", "cap"), ("img.png", "text.txt")][n % 4]
    members = [(f"{key}.{suffixes[0]}", image(n)), (f"{key}.{suffixes[1]}", f"c{n}".encode())]
    return members, [Pair(key, None, f"c{n}")]


def dates(n: int, key: str) -> tuple[Members, list[Pair]]:
    members, (pair,) = border(n, f"22.05.{key}")
    return [*members, (f"22.05.{key}.seg.png", b"x")], [pair]


def several_captions(n: int, key: str) -> tuple[Members, list[Pair]]:
    members = [(f"{key}.jpg", image(n)), file(f"{key}.json", uid=uid(n), captions=[f"c{n}", f"d{n}", f"c{n}"])]
    return members, [Pair(f"{key}#{i}", None, f"{letter}{n}") for i, letter in enumerate("cd")]


def unusable_uid(n: int, key: str) -> tuple[Members, list[Pair]]:
    members, (pair,) = border(n, key)
    return [*members[:2], file(f"{key}.json", uid=f"row {n}")], [pair._replace(uid=None, size=STORED, is_noted=True)]


def of_a_parquet(n: int, key: str) -> tuple[Members, list[Pair]]:
    return [(f"{key}.jpg", image(n))], [Pair(key, uid(n), f"c{n}", url=f"u{n}")]


LAYOUTS = [border, of_a_table, caption_in_json, other_names, dates, several_captions, unusable_uid, of_a_parquet]
ORDERS: list[Callable[[Members, random.Random], Members]] = [
    lambda members, _: members,
    lambda members, _: sorted(members, key=lambda one: (one[0].rpartition(".")[2], one[0])),
    lambda members, rng: rng.sample(members, len(members)),
]
UNJUDGED: list[tuple[str, Members]] = [
    ("missing_caption", [("x0.jpg", b"x"), file("x0.json", uid="x")]),
    ("missing_image", [("x1.txt", b"c"), ("x1.heic", b"x")]),
    ("undecodable_json", [("x2.jpg", b"x"), ("x2.txt", b"c"), ("x2.json", b"{")]),
    ("duplicate_member", [("x3.jpg", b"x"), ("x3.png", b"x"), ("x3.txt", b"c")]),
]


def shards() -> Iterator[tuple[str, Members, list[Pair]]]:
    """Yield 24 tars: each layout in each order, with a few samples that cannot be judged."""
    number = 1
    for name, layout in ((layout.__name__, layout) for layout in LAYOUTS):
        for index, order in enumerate(ORDERS):
            members: Members = []
            pairs: list[Pair] = []
            while len(pairs) < 84:
                files, found = layout(number, f"{number:06d}")
                members, pairs, number = [*members, *files], [*pairs, *found], number + 1
            unjudged = [one for _, files in UNJUDGED for one in files]
            rng = random.Random(number)
            yield f"{name}/{index}", [*order(members, rng), *unjudged], pairs


def test_every_pair_of_every_layout_is_accounted_for(tmp_path: Path) -> None:
    expected = {}
    for name, members, pairs in shards():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(members))
        expected[name.replace("/", "%2F")] = pairs
        if name.startswith("of_a_parquet"):
            rows = [{"key": one.key, "uid": one.uid, "caption": one.caption, "url": one.url} for one in pairs]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert sum(map(len, expected.values())) >= 2000

    uids: Counter[str] = Counter()
    for shard in list_shards(str(tmp_path)):
        reading = Reading()
        found = list(read_samples(shard, POOL, "stage", reading))
        samples = [one for one in found if isinstance(one, Sample)]
        letters = [one for one in found if isinstance(one, DeadLetter)]
        reconcile_shard(shard, "stage", reading.keys, [sample.annotation.row for sample in samples], letters)
        assert Counter(letter.reason for letter in letters) == Counter(reason for reason, _ in UNJUDGED)
        wanted = {pair.key: pair for pair in expected.pop(shard.name)}
        reconcile(shard.name, list(wanted), [sample.annotation.key for sample in samples])
        for sample in samples:
            pair, found_size = wanted[sample.annotation.key], original_size_px(sample.metadata, STORED)
            kept = json.loads(sample.annotation.kept_fields or "{}").get("url")
            is_noted = bool(sample.annotation.pool_notes) or found_size is None
            own = sample.annotation.uid if pair.uid else None
            read = Pair(pair.key, own, sample.annotation.caption, found_size or STORED, kept, is_noted)
            assert read == pair
            uids[sample.annotation.uid] += 1
        uids.update(letter.uid for letter in letters)
    assert not expected
    assert set(uids.values()) == {1} and "" not in uids
