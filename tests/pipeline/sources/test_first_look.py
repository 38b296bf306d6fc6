"""A pool whose members are named otherwise stops before the run begins; one that has dead letters does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.output_folder import tables
from pipeline.output_folder.dead_pool import DeadPool
from pipeline.output_folder.layout import Layout
from pipeline.sources.first_look import look_first
from tests.helpers import Members, jpeg, sample_members, settings, write_pool
from transforms.core.recipe import PoolSettings
from transforms.core.records import Shard


def without_caption(*keys: str) -> Members:
    return [member for key in keys for member in [(f"{key}.jpg", jpeg()), (f"{key}.json", b"{}")]]


def look(shards: list[Shard], output: Path, share: float = 0.9) -> None:
    look_first(shards, PoolSettings(max_dead_share=share), Layout(str(output)))


def test_nearly_all_dead_for_one_reason(tmp_path: Path) -> None:
    dead = without_caption(*(f"k{n:02d}" for n in range(19)))
    shards = write_pool(tmp_path / "pool", {"0.tar": [*dead, *sample_members("z")]})
    with pytest.raises(DeadPool, match=r"first shards: 19 of 20 samples are .* missing_caption .*k00.*caption_mem"):
        look(shards, tmp_path / "out")
    look(shards, tmp_path / "out", share=0.95)
    look(shards, tmp_path / "out", share=1.0)


def test_two_reasons_and_later_shards_decide_nothing(tmp_path: Path) -> None:
    other = [(f"b{n}.txt", b"a dog") for n in range(4)]
    shards = write_pool(tmp_path / "pool", {"0.tar": [*without_caption("a0", "a1", "a2", "a3"), *other]})
    look(shards, tmp_path / "out")
    good, bad = sample_members("k"), without_caption("k")
    shards = write_pool(tmp_path / "many", {f"{n}.tar": good if n < 4 else bad for n in range(30)})
    look(shards, tmp_path / "out")


def test_tars_that_are_none_are_a_reason_and_missing_ones_are_not(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    (good,) = write_pool(pool, {"0.tar": sample_members("k")})
    missing = [Shard(str(n), f"{pool}/{n}.tar", "dead", "missing_shard") for n in range(1, 40)]
    look([good, *missing], tmp_path / "out")
    (pool / "0.tar").write_bytes(b"<html>" * 400)
    with pytest.raises(DeadPool, match="1 of 1"):
        look([good, *missing], tmp_path / "out")


def test_nothing_is_opened_where_tables_are(tmp_path: Path) -> None:
    shards = write_pool(tmp_path / "pool", {"0.tar": without_caption("k")})
    layout = Layout(str(tmp_path / "out"))
    tables.write_table(layout.single_modality("0"), [], tables.single_modality_schema())
    look(shards, tmp_path / "out")


def test_the_command_fails_with_the_reason_and_leaves_nothing(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", {"0.tar": without_caption("k0", "k1")})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings()))
    options = ["--input", str(tmp_path / "pool"), "--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, ["run", str(tmp_path / "r.yaml"), *options])
    assert result.exit_code == 1
    message = json.loads(result.stdout)["message"]
    assert "missing_caption" in message and "max_dead_share" in message
    assert not (tmp_path / "out").exists()
