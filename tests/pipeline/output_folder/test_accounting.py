"""What was read, what img2dataset says it wrote, and what the tables hold are the same, or the run fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest

from pipeline.output_folder import tables
from pipeline.output_folder.accounting import ReconcilePool, Unaccounted, differences
from pipeline.output_folder.layout import Layout
from pipeline.sources.webdataset import Reading, read_samples
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


def stats(shard: Shard, content: Any) -> Path:
    """img2dataset's file beside the tar."""
    path = Path(shard.path.removesuffix(".tar") + "_stats.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_shard_that_adds_up(shard: Shard, layout: Layout) -> None:
    finish(layout, "k0", "k1", letters=("k2",))
    assert list(differences(shard, layout)) == []
    stats(shard, {"count": 5, "successes": 3, "failed_to_download": 2, "status_dict": {"success": 3}})
    assert list(differences(shard, layout)) == []


def test_what_was_taken_out_of_the_output_since_is_seen(shard: Shard, layout: Layout) -> None:
    finish(layout, "k0", "k1", letters=("k2",))
    files.delete_if_there(layout.dead_letters("single_modality", "a"))
    (fault,) = differences(shard, layout)
    assert "3 samples were read, 2 are accounted for" in fault
    assert shard.path in fault and layout.single_modality("a") in fault
    finish(layout, "k0", "k1", "k2", letters=("k3",))
    (fault,) = differences(shard, layout)
    assert "3 samples were read, 4 are accounted for" in fault


@pytest.mark.parametrize("successes", [0, 2, 4])
def test_a_difference_to_img2dataset_s_stats_is_an_error(shard: Shard, layout: Layout, successes: int) -> None:
    finish(layout, "k0", "k1", letters=("k2",))
    path = stats(shard, {"successes": successes})
    (fault,) = differences(shard, layout)
    assert fault.startswith(f"{shard.path}: holds 3 samples, img2dataset's {path} says {successes}; ")


def test_what_a_dead_letter_explains_is_none(shard: Shard, layout: Layout) -> None:
    finish(layout, "k0", "k1", letters=("",), due=3)  # the tar breaks off within its third sample
    assert list(differences(shard, layout)) == []
    stats(shard, {"successes": 5})
    assert list(differences(shard, layout)) == []
    stats(shard, {"successes": 1})  # but it holds more than it should
    assert len(list(differences(shard, layout))) == 1
    finish(layout, "k0", "k1", letters=("k0",), due=3)  # k0 stands in it twice
    stats(shard, {"successes": 2})
    assert list(differences(shard, layout)) == []


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "[]", "null", '{"successes": "3"}', "{}", "x" * 2**21])
def test_stats_that_are_none_are_told_and_hurt_nothing(
    shard: Shard, layout: Layout, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    finish(layout, "k0", "k1", "k2")
    path = stats(shard, content)
    assert list(differences(shard, layout)) == []
    assert str(path) in caplog.text


def test_all_shards_that_differ_are_named_at_once(tmp_path: Path) -> None:
    shards = write_pool(tmp_path / "pool", {f"{n}.tar": [] for n in range(8)})
    layout = Layout(str(tmp_path / "out"))
    for shard in shards:
        tables.write_table(layout.single_modality(shard.name), [], tables.single_modality_schema(), due=0)

    def reconcile() -> None:
        with beam.Pipeline("FnApiRunner") as pipeline:
            _ = pipeline | beam.Create(shards) | "Reconcile" >> ReconcilePool(layout)

    reconcile()
    for shard in shards[:7]:
        stats(shard, {"successes": 1})
    with pytest.raises(Unaccounted, match=r"shards that do not add up: 7: .*0\.tar.*4\.tar.*; and 2 more"):
        reconcile()


def test_the_reader_counts_keys_on_its_own(tmp_path: Path) -> None:
    interleaved = [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.txt", b"x"), ("b.txt", b"x")]
    members = [*samples("k0"), ("notes.md", b"x"), *samples("k1"), ("alone.json", b"{}"), *interleaved]
    (shard,) = write_pool(tmp_path, {"a.tar": members})
    reading = Reading()
    found = list(read_samples(shard, BOUNDS, "single_modality", reading))
    assert reading.keys == ["k0", "k1", "alone", "a", "b", "a", "b"]
    assert len(found) == len(reading.keys)
    assert reading.size_bytes == Path(shard.path).stat().st_size
