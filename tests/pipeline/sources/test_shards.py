"""Tests of reading shards as batches: every sample once, in tar order, with the last batch marked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to

from pipeline.output_folder.pending import ShardTable
from pipeline.sources import shards as shards_module
from pipeline.sources.pool import list_shards
from pipeline.sources.shards import ReadShards
from tests.helpers import BOUNDS, Members, annotation, encode, picture, sample_members, uid, write_pool
from transforms.core.recipe import PoolSettings
from transforms.core.records import Annotation, DeadLetter, SampleBatch, Shard
from transforms.storage import files


@dataclasses.dataclass
class FakeCache:
    """A `PendingReads` and `TableBuilder` whose answers the test sets."""

    stage: str = "a_stage"
    finished: frozenset[str] = frozenset()
    wants: dict[str, Annotation] | None = None

    def is_complete(self, shard: Shard) -> bool:
        return shard.name in self.finished

    def wanted(self, shard: Shard) -> dict[str, Annotation] | None:
        return self.wants

    def table(
        self, shard: Shard, rows: list[dict[str, Any]], letters: list[DeadLetter], halvings: Mapping[str, int]
    ) -> ShardTable:
        return ShardTable(rows, letters, {"shard": shard.fingerprint}, halvings)


def read(
    cache: FakeCache, shards: list[Shard], batch_size: int = 2, draft: int | None = None, bounds: PoolSettings = BOUNDS
) -> tuple[list[SampleBatch], list[Shard]]:
    """Run the DoFn that the transform wraps; return its batches and the finished shards."""
    transform = ReadShards(cache, bounds, batch_size, draft)
    batches, finished = [], []
    for shard in shards:
        for out in transform._read.process(shard):
            if isinstance(out, beam.pvalue.TaggedOutput):
                assert out.tag == ReadShards.FINISHED
                finished.append(out.value)
            else:
                batches.append(out)
    return batches, finished


def names(batch: SampleBatch) -> list[str]:
    return [sample.annotation.key for sample in batch]


def samples(*keys: str) -> Members:
    return [member for key in keys for member in sample_members(key)]


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, [0]), (1, [1]), (2, [2]), (3, [2, 1]), (4, [2, 2]), (5, [2, 2, 1]), (6, [2, 2, 2])]
)
def test_all_batches_but_the_last_are_full(tmp_path: Path, count: int, sizes: list[int]) -> None:
    keys = [f"k{9 - n}" for n in range(count)]
    shards = write_pool(tmp_path, {"a.tar": samples(*keys)})
    batches, finished = read(FakeCache(), shards)
    assert finished == []
    assert [len(batch) for batch in batches] == sizes
    assert [batch.index for batch in batches] == list(range(len(sizes)))
    assert [batch.last for batch in batches] == [False] * (len(sizes) - 1) + [True]
    assert [key for batch in batches for key in names(batch)] == keys
    assert {batch.shard for batch in batches} == set(shards)


def test_batches_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in a batch depends on the tar alone: a batch ends with the sample that reaches the limit."""
    sizes = [(40, 30), (40, 30), (90, 80), (40, 30), (40, 30), (40, 30)]
    pictures = [encode(picture(*size), "BMP") for size in sizes]
    members = [one for n, bmp in enumerate(pictures) for one in ((f"k{n}.bmp", bmp), (f"k{n}.txt", b"c"))]
    monkeypatch.setattr(shards_module, "MAX_BATCH_BYTES", 16_000)  # a small picture takes 7,254 with its file
    for read_ahead_bytes in (1, 2**30):
        monkeypatch.setattr(shards_module, "MAX_READ_AHEAD_BYTES", read_ahead_bytes)
        batches, _ = read(FakeCache(), write_pool(tmp_path, {"a.tar": members}), batch_size=9)
        assert [names(batch) for batch in batches] == [["k0", "k1", "k2"], ["k3", "k4", "k5"]]
        assert [batch.last for batch in batches] == [False, True]


def test_a_batch_belongs_to_one_shard(tmp_path: Path) -> None:
    shards = write_pool(tmp_path, {"a.tar": samples("a0", "a1", "a2"), "b.tar": samples("b0")})
    batches, _ = read(FakeCache(), shards)
    assert [(batch.shard.name, batch.index, batch.last, names(batch)) for batch in batches] == [
        ("a", 0, False, ["a0", "a1"]), ("a", 1, True, ["a2"]), ("b", 0, True, ["b0"])
    ]  # fmt: skip


def test_samples_are_decoded(tmp_path: Path) -> None:
    big = encode(picture(900, 700), "JPEG")
    shards = write_pool(tmp_path, {"a.tar": [("k.jpg", big), ("k.txt", b"c"), ("k.json", b'{"a": 1, "width": 9}')]})
    for draft, shape in ((None, (700, 900, 3)), (320, (350, 450, 3))):
        ((batch,), _) = read(FakeCache(), shards, draft=draft)
        (sample,) = batch
        assert sample.pixels is not None
        assert sample.pixels.shape == shape
        assert (sample.annotation.width_px, sample.annotation.height_px) == (900, 700)
        assert sample.image_bytes == big
        assert sample.metadata == {"width": 9}


def broken(key: str) -> Members:
    return [(f"{key}.jpg", b"\xff\xd8 no picture"), (f"{key}.txt", b"c")]


def test_dead_letters_travel_in_batches_and_do_not_count_towards_their_size(tmp_path: Path) -> None:
    members = [*broken("x0"), *samples("k0"), *broken("x1"), ("x2.txt", b"c"), *samples("k1", "k2"), *broken("x3")]
    batches, _ = read(FakeCache(), write_pool(tmp_path, {"a.tar": members}))
    assert [names(batch) for batch in batches] == [["k0", "k1"], ["k2"]]
    letters = [letter for batch in batches for letter in batch.dead_letters]
    assert [(letter.key, letter.reason) for letter in letters] == [
        ("x0", "undecodable_image"), ("x1", "undecodable_image"), ("x2", "missing_image"), ("x3", "undecodable_image")
    ]  # fmt: skip
    assert all(letter.stage == "a_stage" and len(letter.uid) == 32 for letter in letters)


def test_shard_without_valid_samples_still_has_a_last_batch(tmp_path: Path) -> None:
    write_pool(tmp_path, {"a.tar": broken("x0"), "b.tar": []})
    (tmp_path / "c.tar").write_bytes(b"not a tar")
    batches, _ = read(FakeCache(), list_shards(str(tmp_path)))
    assert [(b.shard.name, b.index, b.last, len(b), [x.reason for x in b.dead_letters]) for b in batches] == [
        ("a", 0, True, 0, ["undecodable_image"]), ("b", 0, True, 0, []), ("c", 0, True, 0, ["broken_tar"])
    ]  # fmt: skip


def test_what_is_no_readable_tar_is_a_dead_letter_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").symlink_to("nowhere")
    batches, _ = read(FakeCache(), list_shards(str(tmp_path)))
    assert [(b.shard.name, b.last, len(b), [(x.key, x.reason, x.stage) for x in b.dead_letters]) for b in batches] == [
        ("a", True, 0, [("", "not_a_file", "a_stage")]), ("b", True, 0, [("", "dangling_link", "a_stage")])
    ]  # fmt: skip


def test_image_above_the_pixel_limit(tmp_path: Path) -> None:
    shards = write_pool(tmp_path, {"a.tar": samples("k")})
    ((batch,), _) = read(FakeCache(), shards, bounds=PoolSettings(max_image_pixels=96 * 64 - 1))
    assert [letter.reason for letter in batch.dead_letters] == ["image_too_large"]


def test_finished_shard_is_reported_and_not_opened(tmp_path: Path) -> None:
    gone = Shard("gone", str(tmp_path / "gone.tar"), "f")
    (here,) = write_pool(tmp_path, {"here.tar": samples("k")})
    batches, finished = read(FakeCache(finished=frozenset({"gone"})), [gone, here])
    assert finished == [gone]
    assert [batch.shard for batch in batches] == [here]


def test_only_wanted_samples_are_read_and_keep_their_annotations(tmp_path: Path) -> None:
    shards = write_pool(tmp_path, {"a.tar": [*samples("k0"), *broken("k1"), *samples("k2", "k3")]})
    wants = {key: annotation(uid=uid(n), shard="a", key=key, caption="as stage 1 read it", language="de")
             for n, key in enumerate(("k3", "k0"))}  # fmt: skip
    ((batch,), _) = read(FakeCache(wants=wants), shards)
    assert names(batch) == ["k0", "k3"]  # in tar order
    assert batch.dead_letters == ()  # stage 1 has reported k1
    for sample in batch:
        assert sample.annotation == wants[sample.annotation.key].with_columns(width_px=96, height_px=64)
        assert sample.pixels is not None


def test_tar_is_not_opened_if_no_sample_is_wanted(tmp_path: Path) -> None:
    gone = Shard("gone", str(tmp_path / "gone.tar"), "f")
    ((batch,), finished) = read(FakeCache(wants={}), [gone])
    assert finished == []
    assert (batch.shard, batch.index, batch.last, len(batch), batch.dead_letters) == (gone, 0, True, 0, ())


def test_wanted_sample_that_is_missing_or_damaged_is_a_dead_letter(tmp_path: Path) -> None:
    members = [*samples("k0"), *broken("k1"), ("k2.jpg", b"x"), *samples("k4")]
    (shard,) = write_pool(tmp_path, {"a.tar": members})
    wants = {f"k{n}": annotation(uid=uid(n), shard="a", key=f"k{n}") for n in range(5)}
    batches, _ = read(FakeCache(wants=wants), [shard])
    assert [key for batch in batches for key in names(batch)] == ["k0", "k4"]
    letters = [letter for batch in batches for letter in batch.dead_letters]
    assert {(letter.key, letter.uid, letter.reason, letter.stage, letter.shard) for letter in letters} == {
        ("k1", uid(1), "undecodable_image", "a_stage", "a"),
        ("k2", uid(2), "missing_caption", "a_stage", "a"),
        ("k3", uid(3), "vanished", "a_stage", "a"),
    }


@pytest.mark.usefixtures("waits")
def test_missing_tar_fails_the_run_without_dead_letters(tmp_path: Path) -> None:
    gone = Shard("gone", str(tmp_path / "gone.tar"), "f")
    wants = {f"k{n}": annotation(uid=uid(n), shard="gone", key=f"k{n}") for n in range(3)}
    with pytest.raises(OSError, match=r"gone\.tar"):
        read(FakeCache(wants=wants), [gone])


def test_repeated_key_is_read_once(tmp_path: Path) -> None:
    (shard,) = write_pool(tmp_path, {"a.tar": samples("k0", "k1", "k0")})
    ((batch,), _) = read(FakeCache(wants={"k0": annotation(uid=uid(1), shard="a", key="k0")}), [shard])
    assert names(batch) == ["k0"]
    assert batch.dead_letters == ()


@pytest.mark.parametrize("wants", [None, {f"k{n}": annotation(uid=uid(n), shard="a", key=f"k{n}") for n in range(3)}])
@pytest.mark.parametrize("change", [lambda tar: tar.unlink(), lambda tar: os.utime(tar, (0, 0))])
def test_tar_that_changes_during_reading_fails_the_run(
    tmp_path: Path, wants: dict[str, Annotation] | None, change: Callable[[Path], None]
) -> None:
    (shard,) = write_pool(tmp_path, {"a.tar": samples("k0", "k1", "k2")})
    batches = ReadShards(FakeCache(wants=wants), BOUNDS, 1)._read.process(shard)
    assert next(batches).last is False
    change(tmp_path / "a.tar")
    with pytest.raises(files.ReadFailed, match=r"a\.tar: changed or was deleted .* repeat the same command to resume"):
        list(batches)


def summary(batch: Any) -> tuple[str, int, bool, int, tuple[DeadLetter, ...]]:
    return batch.shard.name, batch.index, batch.last, len(batch), batch.dead_letters


def test_in_a_pipeline(tmp_path: Path) -> None:
    shards = write_pool(tmp_path, {"a.tar": samples("a0", "a1", "a2"), "b.tar": samples("b0"), "c.tar": []})
    with beam.Pipeline("FnApiRunner") as p:
        cache = FakeCache(finished=frozenset({"b"}))
        read_ = p | beam.Create(shards) | "Read" >> ReadShards(cache, BOUNDS, 2)
        found = read_[ReadShards.BATCHES] | "Summary" >> beam.Map(summary)
        assert_that(found, equal_to([("a", 0, False, 2, ()), ("a", 1, True, 1, ()), ("c", 0, True, 0, ())]), "batches")
        assert_that(read_[ReadShards.FINISHED], equal_to([shards[1]]), "finished")
