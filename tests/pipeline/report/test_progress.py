"""Tests of the progress of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.report.progress import Counts, Progress, describe
from transforms.core.records import Shard

STAGE = "single_modality"
SHARDS = [Shard(f"{n:05d}", f"/p/{n:05d}.tar", "f") for n in range(4)]


@pytest.mark.parametrize(
    ("counts", "shards", "seconds", "line"),
    [
        (Counts(0, 0, 0), 4, 0.0, "single_modality: 0/4 shards, 0 samples, 0/s, 0 s"),
        (Counts(0, 50, 0), 4, 5.0, "single_modality: 0/4 shards, 50 samples, 10/s, 5 s"),
        (Counts(1, 1500, 1000), 4, 10.0, "single_modality: 1/4 shards, 1,500 samples, 150/s, 10 s, about 17 s left"),
        (Counts(4, 4000, 4000), 4, 40.0, "single_modality: 4/4 shards, 4,000 samples, 100/s, 40 s"),
        (Counts(0, 0, 0), 0, 0.1, "single_modality: 0/0 shards, 0 samples, 0/s, 0 s"),
        # The unfinished shards are larger than the finished one: the time left is not negative.
        (Counts(1, 900, 100), 4, 10.0, "single_modality: 1/4 shards, 900 samples, 90/s, 10 s, about 0 s left"),
        (Counts(1, 0, 0), 4, 10.0, "single_modality: 1/4 shards, 0 samples, 0/s, 10 s"),
    ],
)
def test_line_of_a_per_shard_stage(counts: Counts, shards: int, seconds: float, line: str) -> None:
    assert describe(STAGE, counts, shards, seconds) == line


def test_line_of_a_stage_over_all_rows() -> None:
    assert describe("distribution_alignment", Counts(0, 0, 0), 4, 12.4) == "distribution_alignment: 12 s"


def work(layout: Layout, shard: Shard, samples: int, finished: bool) -> None:
    path = Path(layout.progress(STAGE, shard.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(samples))
    if finished:
        finished_before(layout, shard)


def finished_before(layout: Layout, shard: Shard) -> None:
    tables.write_table(layout.single_modality(shard.name), [], tables.single_modality_schema())


def test_plain_lines(tmp_path: Path) -> None:
    out, layout = io.StringIO(), Layout(str(tmp_path))
    with Progress(Console(file=out, width=200)).stage(STAGE, layout, SHARDS):
        for shard in SHARDS:
            work(layout, shard, 30, True)
    assert out.getvalue().startswith("single_modality: 4/4 shards, 120 samples, ")
    assert "\x1b" not in out.getvalue()


def test_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Console(file=io.StringIO()), as_json=True).stage(STAGE, Layout(str(tmp_path)), SHARDS):
        pass
    (line,) = capsys.readouterr().out.splitlines()
    event = json.loads(line)
    assert (event["event"], event["stage"]) == ("stage_done", STAGE)
    assert "0/4 shards" in event["message"]


def test_earlier_work_is_not_counted(tmp_path: Path) -> None:
    out, layout = io.StringIO(), Layout(str(tmp_path))
    finished_before(layout, SHARDS[0])
    with Progress(Console(file=out, width=200)).stage(STAGE, layout, SHARDS):
        work(layout, SHARDS[1], 30, True)
    before, line = out.getvalue().splitlines()
    assert "1 of 4 shards have a table already" in before
    assert line.startswith("single_modality: 1/3 shards, 30 samples, ")


def test_reprocessed_shard_is_counted(tmp_path: Path) -> None:
    out, layout = io.StringIO(), Layout(str(tmp_path))
    for shard in SHARDS:
        finished_before(layout, shard)
    with Progress(Console(file=out, width=200)).stage(STAGE, layout, SHARDS):
        work(layout, SHARDS[1], 30, True)
        work(layout, SHARDS[2], 20, True)
        Path(layout.progress(STAGE, SHARDS[2].name)).write_text("20 done")
    assert out.getvalue().splitlines()[1].startswith("single_modality: 1/2 shards, 50 samples, ")


def test_partially_written_counts_are_ignored(tmp_path: Path) -> None:
    out, layout = io.StringIO(), Layout(str(tmp_path))
    with Progress(Console(file=out, width=200)).stage(STAGE, layout, SHARDS):
        work(layout, SHARDS[0], 30, False)
        Path(layout.progress(STAGE, SHARDS[1].name)).write_text("")
    assert "0/4 shards, 30 samples" in out.getvalue()


def test_failed_stage_is_not_reported_as_done(tmp_path: Path) -> None:
    def failing() -> None:
        with Progress(Console(file=out)).stage(STAGE, Layout(str(tmp_path)), SHARDS):
            raise RuntimeError("boom")

    out = io.StringIO()
    with pytest.raises(RuntimeError, match="boom"):
        failing()
    assert out.getvalue() == ""
