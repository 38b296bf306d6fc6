"""Tests of killed runs: after a restart, the outputs are identical to those of an undisturbed run."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.chaos import TWO_WORKERS, Case, Moment, Reference, Run, kill_at, moments, tree, undisturbed
from transforms.storage import files

SEED = int(os.environ.get("CHAOS_SEED", "0"))
KILLS_MANY = {"one process": 24, "two worker processes": 9}


@dataclasses.dataclass
class KillCounts:
    """The results of the killed runs."""

    kills: int = 0
    finished: int = 0
    while_writing: int = 0
    stages: set[int] = dataclasses.field(default_factory=set)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.while_writing} while a file was being written) in stages "
            f"{sorted(stage + 1 for stage in self.stages)}; {self.finished} runs finished after them, all with the "
            "bytes of the undisturbed one: 0 samples lost, 0 counted twice"
        )


def kill_and_finish(case: Case, folder: Path, reference: Reference, planned: list[Moment], seed: int) -> KillCounts:
    """Kill runs at the given moments, one to four times before each may finish, and compare their outputs."""
    rng, counts, planned = random.Random(seed), KillCounts(), list(planned)
    while planned:
        output = folder / f"out{counts.finished}"
        row, planned = planned[: (length := rng.randint(1, 4))], planned[length:]
        for moment in row:
            run = Run(case, output)
            killed = kill_at(run, moment, reference.seconds)
            asides = [path for path in output.rglob("*") if files.is_aside(str(path))]
            print(f"seed {seed}: {moment}: {'killed' if killed else 'had ended'}, {len(asides)} aside", flush=True)
            if killed:
                counts.kills, counts.while_writing = counts.kills + 1, counts.while_writing + bool(asides)
                counts.stages.add(run.stage)
        last = Run(case, output)
        assert last.finish() == 0, last.said
        assert tree(output) == reference.tree
        counts.finished += 1
    return counts


def test_undisturbed_run_covers_every_outcome(reference: Reference) -> None:
    funnel = json.loads((reference.output / "funnel.json").read_text())
    assert funnel["in"] > 50
    assert funnel["survivors"] > 20
    assert set(funnel["dead_letters"]) >= {"broken_tar", "repeated_uid", "undecodable_image", "missing_image"}
    names = {part for name in reference.tree for part in name.split("/")}
    assert names >= {"annotations", "decisions", "subset.npy", "funnel.json", "clusters.parquet", "clusters.svg",
                     "centroids.npy", "dead_letters", "manifest.json"}  # fmt: skip
    rows = [row for part in (reference.output / "decisions").iterdir() for row in pq.read_table(part).to_pylist()]
    assert len({row["uid"] for row in rows}) == len(rows) == funnel["in"] - sum(funnel["dead_letters"].values())


@pytest.mark.slow
def test_run_killed_in_every_stage_has_the_outputs_of_an_undisturbed_run(
    case: Case, reference: Reference, tmp_path: Path
) -> None:
    planned = [Moment(0, "asides", 4), Moment(1, "asides", 2), Moment(2, "share", 0.5)]
    counts = kill_and_finish(case, tmp_path, reference, planned, SEED)
    assert counts.kills >= 2


@pytest.mark.chaos
@pytest.mark.parametrize("how", KILLS_MANY)
def test_many_kills(
    case: Case, reference: Reference, tmp_path: Path, how: str, record_property: Callable[[str, object], None]
) -> None:
    if how == "two worker processes":
        case = dataclasses.replace(case, beam_options=TWO_WORKERS)
    timed = dataclasses.replace(undisturbed(case, tmp_path / "reference"), tree=reference.tree)
    counts = kill_and_finish(case, tmp_path, timed, moments(SEED, KILLS_MANY[how]), SEED)
    record_property("table", f"chaos, {how}, seed {SEED}: {counts}")
    assert counts.kills >= KILLS_MANY[how] * 3 // 4
    assert counts.stages == {0, 1, 2}
