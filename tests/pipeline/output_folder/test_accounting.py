"""Accounting: the run fails unless the samples read, img2dataset's statistics and the tables agree."""

from __future__ import annotations

from pathlib import Path

import apache_beam as beam
import pytest

from pipeline.output_folder import tables
from pipeline.output_folder.accounting import ReconcilePool, ShardAccount, Unaccounted, account_of
from pipeline.output_folder.dead_pool import DeadPool
from pipeline.output_folder.img2dataset_stats import STATS_MISMATCH
from pipeline.output_folder.layout import Layout
from pipeline.sources.grouping import Reading
from pipeline.sources.webdataset import read_samples
from tests.helpers import BOUNDS, Members, annotation, sample_members, uid, write_pool
from transforms.core.records import DeadLetter, Shard
from transforms.storage import files


def samples(*keys: str) -> Members:
    return [member for key in keys for member in sample_members(key)]


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """A shard of three samples."""
    return write_pool(tmp_path / "pool", {"a.tar": samples("k0", "k1", "k2")})[0]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(str(tmp_path / "out"))


def finish(layout: Layout, *keys: str, letters: tuple[str, ...] = (), due: int = 3) -> None:
    rows = [tables.annotation_row(annotation(uid=uid(n), shard="a", key=key)) for n, key in enumerate(keys)]
    dead = [DeadLetter("a", key, uid(9), "single_modality", "broken" if key else "broken_tar", "m") for key in letters]
    tables.write_dead_letters(layout.dead_letters("single_modality", "a"), dead)
    tables.write_table(layout.single_modality("a"), rows, tables.single_modality_schema(), due=due)


def test_consistent_shard(shard: Shard, layout: Layout) -> None:
    finish(layout, "k0", "k1", letters=("k2",))
    assert account_of(shard, layout) == ShardAccount([], [], 2, {"broken": (1, "m")})


def test_rows_removed_from_the_output_are_detected(shard: Shard, layout: Layout) -> None:
    finish(layout, "k0", "k1", letters=("k2",))
    files.delete_if_there(layout.dead_letters("single_modality", "a"))
    (fault,) = account_of(shard, layout).faults
    assert "3 samples were read, 2 are accounted for" in fault
    assert shard.path in fault and layout.single_modality("a") in fault
    finish(layout, "k0", "k1", "k2", letters=("k3",))
    (fault,) = account_of(shard, layout).faults
    assert "3 samples were read, 4 are accounted for" in fault
    finish(layout, "k0", "k1", letters=("",), due=3)  # the tar is truncated within its third sample
    assert account_of(shard, layout).faults == []


def reconcile(shards: list[Shard], layout: Layout, max_dead_share: float = 1.0) -> None:
    with beam.Pipeline("FnApiRunner") as pipeline:
        _ = pipeline | beam.Create(shards) | "Reconcile" >> ReconcilePool(layout, max_dead_share)


def test_all_shards_that_do_not_add_up_are_named_at_once(tmp_path: Path) -> None:
    shards = write_pool(tmp_path / "pool", {f"{n}.tar": [] for n in range(8)})
    layout = Layout(str(tmp_path / "out"))
    for n, shard in enumerate(shards):
        tables.write_table(layout.single_modality(shard.name), [], tables.single_modality_schema(), due=min(1, n))
    with pytest.raises(Unaccounted, match=r"shards that do not add up: 7: .*1\.tar.*5\.tar.*; and 2 more"):
        reconcile(shards, layout)


def test_other_numbers_than_img2dataset_s_are_warned_of(
    shard: Shard, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    finish(layout, "k0", "k1", "k2")
    message = "a.tar: holds 3 samples, img2dataset's a_stats.json says 4"
    letter = DeadLetter("a", "", "", "single_modality", STATS_MISMATCH, message)
    tables.write_dead_letters(layout.dead_letters("single_modality", "a"), [letter])
    reconcile([shard], layout)
    assert "1 shards differ from their stats: " + message in caplog.text


def test_a_pool_that_dies_for_one_reason_fails(shard: Shard, layout: Layout) -> None:
    finish(layout, "k0", letters=("k1", "k2"))
    reconcile([shard], layout, max_dead_share=0.67)
    with pytest.raises(DeadPool, match=r"the pool: 2 of 3 samples are dead letters for one reason, broken \(.*m\)"):
        reconcile([shard], layout, max_dead_share=0.66)


def test_reader_counts_keys_independently(tmp_path: Path) -> None:
    interleaved = [(f"{key}.{kind}", b"x") for kind in ("jpg", "txt", "jpg") for key in "ab"]
    members = [*samples("k0"), ("notes.md", b"x"), *samples("k1"), ("alone.json", b"{}"), *interleaved]
    (shard,) = write_pool(tmp_path, {"a.tar": members})
    reading = Reading()
    found = list(read_samples(shard, BOUNDS, "single_modality", reading))
    assert reading.keys == ["k0", "k1", "alone", "a", "b", "a", "b"]  # two images of a are two samples
    assert len(found) == len(reading.keys)
    assert reading.size_bytes == Path(shard.path).stat().st_size + 4  # of images of one byte that are read again
