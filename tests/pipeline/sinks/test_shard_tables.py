"""The writer at the end of a per-shard stage writes a complete shard in order, or nothing."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to

from pipeline.output_folder import tables
from pipeline.output_folder.accounting import Unaccounted
from pipeline.output_folder.layout import Layout
from pipeline.sinks.shard_tables import UnfusedStage, WriteShardTable
from tests.helpers import uid, whole_sample
from tests.pipeline.sources.test_shards import FakeCache
from transforms.core.records import DeadLetter, SampleBatch, Shard

STAGE = "single_modality"
A, B = Shard("a", "/p/a.tar", "1"), Shard("b", "/p/b.tar", "2")


def cache_key(shard: Shard) -> dict[str, str]:
    return {"shard": shard.fingerprint}


def batch(shard: Shard, index: int, last: bool, *numbers: int, letters: int = 0) -> SampleBatch:
    samples = tuple(whole_sample(uid=uid(n), shard=shard.name, key=f"k{n}") for n in numbers)
    dead = tuple(DeadLetter(shard.name, f"x{index}{n}", uid(99), STAGE, "broken", "m") for n in range(letters))
    return SampleBatch(shard, index, last, samples, dead)


def due(*batches: SampleBatch) -> list[SampleBatch]:
    """Return the batches; the last one of each shard lists the keys that were found."""
    keys: dict[str, list[str]] = defaultdict(list)
    told = []
    for each in batches:
        keys[each.shard.name] += [s.annotation.key for s in each] + [letter.key for letter in each.dead_letters]
        told.append(dataclasses.replace(each, due=tuple(keys.pop(each.shard.name))) if each.last else each)
    return told


def writer(folder: Path) -> WriteShardTable:
    return WriteShardTable(
        Layout(str(folder)), FakeCache(STAGE), Layout.single_modality, tables.single_modality_schema()
    )


def bundle(folder: Path, *batches: SampleBatch) -> list[Shard]:
    write, done = writer(folder), []
    write.start_bundle()
    for each in due(*batches):
        done += list(write.process(each))
    write.finish_bundle()
    return done


def tables_in(folder: Path) -> dict[str, list[str]]:
    paths = (folder / "annotations").rglob("*.parquet") if (folder / "annotations").exists() else []
    return {path.stem: [row["key"] for row in tables.read_table(str(path))] for path in paths}


def test_shard_is_written_after_its_last_batch(tmp_path: Path) -> None:
    write, (first, last) = writer(tmp_path), due(batch(A, 0, False, 1, 2), batch(A, 1, True, 3))
    write.start_bundle()
    assert list(write.process(first)) == []
    assert tables_in(tmp_path) == {}
    assert list(write.process(last)) == [A]
    write.finish_bundle()
    assert tables_in(tmp_path) == {"a": ["k1", "k2", "k3"]}


def test_several_shards_in_a_bundle(tmp_path: Path) -> None:
    done = bundle(tmp_path, batch(B, 0, True, 5), batch(A, 0, False, 1), batch(A, 1, True, 2))
    assert done == [B, A]
    assert tables_in(tmp_path) == {"b": ["k5"], "a": ["k1", "k2"]}


def test_writer_handles_several_bundles(tmp_path: Path) -> None:
    write = writer(tmp_path)
    for shard in (A, B):
        write.start_bundle()
        assert [done for each in due(batch(shard, 0, True, 1)) for done in write.process(each)] == [shard]
        write.finish_bundle()
    assert set(tables_in(tmp_path)) == {"a", "b"}


def test_an_empty_shard_has_a_table(tmp_path: Path) -> None:
    assert bundle(tmp_path, batch(A, 0, True)) == [A]
    assert tables_in(tmp_path) == {"a": []}


def test_table_has_its_cache_key(tmp_path: Path) -> None:
    bundle(tmp_path, batch(A, 0, True, 1))
    path = Layout(str(tmp_path)).single_modality("a")
    assert tables.is_complete(path, cache_key(A))
    assert not tables.is_complete(path, cache_key(B))


def test_dead_letters_are_written_in_order(tmp_path: Path) -> None:
    path = Layout(str(tmp_path)).dead_letters(STAGE, "a")
    bundle(tmp_path, batch(A, 0, False, 1, letters=2), batch(A, 1, True, letters=1))
    assert [letter.key for letter in tables.read_dead_letters(path)] == ["x00", "x01", "x10"]
    bundle(tmp_path, batch(A, 0, True, 1))  # a later run without failures
    assert tables.read_dead_letters(path) == []


def test_dead_letters_are_written_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(tables, "write_table", full)
    with pytest.raises(OSError, match="no space"):
        bundle(tmp_path, batch(A, 0, True, 1, letters=1))
    layout = Layout(str(tmp_path))
    assert len(tables.read_dead_letters(layout.dead_letters(STAGE, "a"))) == 1
    assert not tables.is_complete(layout.single_modality("a"), cache_key(A))


@pytest.mark.parametrize(
    "batches",
    [
        [batch(A, 1, True, 2)],
        [batch(A, 0, False, 1), batch(A, 2, True, 3)],
        [batch(A, 1, False, 2), batch(A, 0, True, 1)],
        [batch(A, 0, False, 1), batch(A, 0, True, 1)],
        [batch(A, 0, False, 1), batch(B, 0, True, 5), batch(A, 1, True, 2)],
        [batch(A, 0, False, 1), batch(B, 1, True, 5)],
        [batch(A, 0, False, 1)],
    ],
    ids=["no first", "a gap", "swapped", "twice", "interleaved", "another shard's", "no last"],
)
def test_batches_out_of_order_write_nothing(tmp_path: Path, batches: list[SampleBatch]) -> None:
    with pytest.raises(UnfusedStage):
        bundle(tmp_path, *batches)
    assert tables_in(tmp_path) == {}


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        (("k1", "k2", "x00", "gone"), r"shard a, stage single_modality: lost 1 keys \(gone\)"),
        (("k1", "x00"), r"counted too often 1 keys \(k2\)"),
        (("k1", "k2", "x00", "k1"), r"lost 1 keys \(k1\)"),
        (("k1", "k3", "x00"), r"lost 1 keys \(k3\) and counted too often 1 keys \(k2\)"),
    ],
)
def test_lost_sample_is_an_error_and_leaves_no_table(
    tmp_path: Path, keys: tuple[str, ...], fault: str
) -> None:
    write = writer(tmp_path)
    write.start_bundle()
    with pytest.raises(Unaccounted, match=fault):
        list(write.process(dataclasses.replace(batch(A, 0, True, 1, 2, letters=1), due=keys)))
    assert tables_in(tmp_path) == {}


def test_dead_letter_of_a_truncated_tar_covers_only_its_last_sample(tmp_path: Path) -> None:
    broken = DeadLetter("a", "", "", STAGE, "broken_tar", "m")
    cut = dataclasses.replace(batch(A, 0, True, 1, 2), dead_letters=(broken,), due=("k1", "k2", "cut"))
    write = writer(tmp_path)
    write.start_bundle()
    assert list(write.process(cut)) == [A]
    write.start_bundle()
    with pytest.raises(Unaccounted, match="lost 1 keys"):
        list(write.process(dataclasses.replace(cut, due=("k1", "gone", "k2", "cut"))))


def test_progress_counts_received_samples(tmp_path: Path) -> None:
    write, path = writer(tmp_path), Path(Layout(str(tmp_path)).progress(STAGE, "a"))
    first, last = due(batch(A, 0, False, 1, 2, letters=1), batch(A, 1, True, 3))
    write.start_bundle()
    list(write.process(first))
    assert path.read_text() == "3"
    list(write.process(last))
    assert path.read_text() == "4 done"


def test_progress_that_cannot_be_written_is_ignored(tmp_path: Path) -> None:
    (tmp_path / ".progress").write_text("a file")
    assert bundle(tmp_path, batch(A, 0, True, 1)) == [A]
    assert tables_in(tmp_path) == {"a": ["k1"]}


def test_unfused_stage_fails(tmp_path: Path) -> None:
    batches = due(*(batch(A, index, index == 19, index) for index in range(20)))

    def run(folder: Path, pieces: list[list[SampleBatch]]) -> None:
        with beam.Pipeline("FnApiRunner") as p:
            whole = p | beam.Create(pieces, reshuffle=False) | "Batches" >> beam.FlatMap(iter)
            done = whole | "Write" >> beam.ParDo(writer(folder))
            assert_that(done, equal_to([A]))

    run(tmp_path / "fused", [batches])
    assert tables_in(tmp_path / "fused") == {"a": [f"k{n}" for n in range(20)]}
    with pytest.raises(Exception, match="runner that fuses it"):
        run(tmp_path / "torn", [batches[10:], batches[:10]])
    assert tables_in(tmp_path / "torn") == {}
