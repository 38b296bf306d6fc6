"""subset.npy, the input of DataComp's resharder."""

from __future__ import annotations

import random
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest

from pipeline.output_folder.layout import Layout
from pipeline.sinks.subset import WriteSubset, subset_rows
from tests.helpers import uid
from tests.transforms.distribution_alignment.alignment_graph import placements_of
from transforms.distribution_alignment.records import Placement
from transforms.distribution_alignment.work_folder import WorkFolder

EXTREMES = [uid(0), uid(1), uid(2**63), uid(2**64 - 1), uid(2**64), uid(2**127), uid(2**128 - 1)]


def placement(uid_: str, copies: int) -> Placement:
    return Placement(uid_, "s", 0, "", float(copies), copies)


def write(folder: Path, placements: list[Placement]) -> np.ndarray:
    with beam.Pipeline("FnApiRunner") as p:
        _ = (
            p
            | beam.Create([placements_of(placements[::2]), placements_of(placements[1::2])])
            | WriteSubset(Layout(str(folder)), WorkFolder(str(folder.with_name("work"))))
        )
    assert [path.name for path in folder.iterdir()] == ["subset.npy"]
    rows: np.ndarray = np.load(folder / "subset.npy", allow_pickle=False)
    return rows


def as_uids(rows: np.ndarray) -> list[str]:
    return [f"{int(high):016x}{int(low):016x}" for high, low in rows]


def test_rows_encode_uids() -> None:
    rows = subset_rows([(u, 1) for u in EXTREMES])
    assert rows.dtype == np.dtype("u8,u8")
    assert as_uids(rows) == EXTREMES


@pytest.mark.parametrize("copies", [{}, {uid(5): 0}, {uid(5): 0, uid(6): 0}])
def test_nothing_to_write(copies: dict[str, int]) -> None:
    rows = subset_rows(copies.items())
    assert rows.dtype == np.dtype("u8,u8")
    assert rows.shape == (0,)


def test_a_row_for_every_copy_sorted() -> None:
    rows = subset_rows([(uid(2**64), 2), (uid(7), 0), (uid(3), 3), (uid(2**128 - 1), 1)])
    assert as_uids(rows) == [uid(3)] * 3 + [uid(2**64)] * 2 + [uid(2**128 - 1)]


def test_the_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    copies = {uid(rng.getrandbits(128)): rng.randrange(4) for _ in range(500)} | dict.fromkeys(EXTREMES, 2)
    placements = [placement(u, n) for u, n in copies.items()]
    rows = write(tmp_path / "a", placements)
    assert rows.dtype == np.dtype("u8,u8")
    assert rows.shape == (sum(copies.values()),)
    assert np.array_equal(rows, np.sort(rows))
    assert as_uids(rows) == [u for u in sorted(copies) for _ in range(copies[u])]
    write(tmp_path / "b", placements[::-1])
    assert (tmp_path / "a" / "subset.npy").read_bytes() == (tmp_path / "b" / "subset.npy").read_bytes()


def test_file_equals_the_one_that_numpy_writes(tmp_path: Path) -> None:
    rows = write(tmp_path / "a", [placement(u, 1) for u in EXTREMES])
    np.save(tmp_path / "numpy.npy", rows)
    assert (tmp_path / "numpy.npy").read_bytes() == (tmp_path / "a" / "subset.npy").read_bytes()


@pytest.mark.parametrize("placements", [[], [placement(uid(1), 0)]])
def test_empty_subset_is_written(tmp_path: Path, placements: list[Placement]) -> None:
    assert write(tmp_path / "a", placements).shape == (0,)
