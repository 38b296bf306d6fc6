"""The numbers that img2dataset reports, compared with what a shard holds: reported, or by a setting skipped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.output_folder import tables
from pipeline.output_folder.img2dataset_stats import STATS_MISMATCH, mismatch_letters, successes
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.manifest import identities
from pipeline.output_folder.pending import FeatureCache
from tests.helpers import annotation, settings, uid
from transforms.core.recipe import parse_recipe
from transforms.core.records import DeadLetter, Shard

STAGE = "single_modality"


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    (tmp_path / "a.tar").write_bytes(b"")
    return Shard("a", str(tmp_path / "a.tar"), "f")


def stats(shard: Shard, content: Any) -> Path:
    """Write img2dataset's statistics next to the tar."""
    path = Path(shard.path.removesuffix(".tar") + "_stats.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def row(number: int) -> dict[str, Any]:
    return tables.annotation_row(annotation(uid=uid(number), shard="a", key=f"k{number}"))


def letter(key: str, reason: str = "broken") -> DeadLetter:
    return DeadLetter("a", key, uid(9) if key else "", STAGE, reason, "m")


ROWS, LETTERS = [row(0), row(1)], [letter("k2")]


def test_equal_numbers_leave_no_letter(shard: Shard) -> None:
    assert mismatch_letters(shard, STAGE, ROWS, LETTERS, skip=True) == []
    stats(shard, {"count": 5, "successes": 3, "failed_to_download": 2, "status_dict": {"success": 3}})
    assert mismatch_letters(shard, STAGE, ROWS, LETTERS, skip=True) == []


@pytest.mark.parametrize("reported", [0, 2, 4])
def test_a_difference_is_one_letter_of_the_shard(shard: Shard, reported: int) -> None:
    path = stats(shard, {"successes": reported})
    message = f"{shard.path}: holds 3 samples, img2dataset's {path} says {reported}"
    expected = [DeadLetter("a", "", "", STAGE, STATS_MISMATCH, message)]
    assert mismatch_letters(shard, STAGE, ROWS, LETTERS, skip=False) == expected
    skipped = mismatch_letters(shard, STAGE, ROWS, LETTERS, skip=True)
    assert [(found.key, found.uid, found.message) for found in skipped] == [
        ("k0", uid(0), message), ("k1", uid(1), message)
    ]  # fmt: skip


def test_a_damaged_tar_explains_any_number_and_a_repeated_key_counts_once(shard: Shard) -> None:
    stats(shard, {"successes": 5})
    assert mismatch_letters(shard, STAGE, ROWS, [letter("", "broken_tar")], skip=False) == []
    stats(shard, {"successes": 2})
    assert mismatch_letters(shard, STAGE, ROWS, [letter("k0")], skip=False) == []


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "[]", "null", '{"successes": "3"}', "{}", "x" * 2**21])
def test_stats_that_are_none_are_warned_of_and_hurt_nothing(
    shard: Shard, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = stats(shard, content)
    assert successes(shard.path) is None
    assert str(path) in caplog.text


def test_stats_that_are_a_pipe_are_not_waited_for(
    shard: Shard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transforms.storage.steady_reader.sleep", lambda seconds: None)
    os.mkfifo(shard.path.replace(".tar", "_stats.json"))
    assert successes(shard.path) is None
    assert "is not a stats file" in caplog.text


def test_a_table_is_made_again_when_stats_or_their_setting_change(shard: Shard, tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "out"))

    def work(setting: str) -> FeatureCache:
        recipe = parse_recipe(settings(pool={"stats_mismatch": setting}), "test")
        return FeatureCache(recipe, layout, identities(recipe))

    def write(setting: str) -> FeatureCache:
        made = work(setting)
        table = made.table(shard, [row(0), row(1)], [], {})
        tables.write_dead_letters(layout.dead_letters(STAGE, "a"), table.dead_letters)
        schema = tables.single_modality_schema()
        due = len(table.rows) + len(table.dead_letters)
        tables.write_table(layout.single_modality("a"), table.rows, schema, table.cache_key, {}, due)
        return made

    assert write("report").is_complete(shard) and work("skip").is_complete(shard)
    path = stats(shard, {"successes": 3})
    assert not work("report").is_complete(shard) and not work("skip").is_complete(shard)
    assert write("report").is_complete(shard) and not work("skip").is_complete(shard)
    assert write("skip").is_complete(shard) and not work("report").is_complete(shard)
    assert tables.read_table(layout.single_modality("a"), ["key"]) == []
    path.unlink()
    assert not work("skip").is_complete(shard)
    Path(shard.path).unlink()  # the pool has gone: what was computed stays
    assert work("skip").is_complete(shard)
