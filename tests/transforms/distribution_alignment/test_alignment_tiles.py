"""Tiles have consecutive ranks, also with ties."""

from __future__ import annotations

from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.distribution_alignment import tiles
from transforms.distribution_alignment.records import RankKeys, best_first
from transforms.distribution_alignment.tiles import FindRanges, Ranges, read_ranges
from transforms.distribution_alignment.work_folder import WorkFolder


def keys_of(cosines: list[float], seed: int = 0) -> RankKeys:
    order = np.random.default_rng(seed).permutation(len(cosines))
    uids = np.array([f"{number:032x}" for number in order], "S32")
    return RankKeys(np.array(cosines, np.float32), uids)


@given(
    cosines=st.lists(st.sampled_from([0.1, 0.2, np.nextafter(np.float32(0.2), np.float32(1)), 0.3]), min_size=1),
    rows=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_tile_has_consecutive_ranks_and_the_given_size(cosines: list[float], rows: int):
    keys = keys_of(cosines)
    order = best_first(keys.cosines, keys.uids)
    beginnings = keys.take(order[rows::rows])
    ranges = Ranges(np.full(len(beginnings), 5), beginnings.cosines, beginnings.uids)
    found = ranges.tile_of(5, keys.cosines, keys.uids)
    assert found[order].tolist() == [rank // rows for rank in range(len(cosines))]
    assert ranges.tiles(5) == found.max() + 1
    for other in (4, 6):
        assert ranges.tiles(other) == 1
        assert not ranges.tile_of(other, keys.cosines, keys.uids).any()


@pytest.mark.parametrize("parts", [1, 3])
def test_only_ranges_of_large_clusters_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int):
    monkeypatch.setattr(tiles, "TILE_ROWS", 4)
    clusters = {7: keys_of([0.1] * 9), 2: keys_of([0.1, 0.2, 0.3, 0.4]), 3: keys_of([0.4, 0.3, 0.2, 0.1, 0.0])}
    pieces = [
        (cluster, keys.take(slice(part, None, parts))) for cluster, keys in clusters.items() for part in range(parts)
    ]
    work = WorkFolder(str(tmp_path))
    with beam.Pipeline("FnApiRunner") as pipeline:
        given_keys = pipeline | beam.Create(pieces).with_output_types(tuple[int, RankKeys])
        _ = given_keys | FindRanges(work)
    ranges = read_ranges(work.ranges)
    assert ranges.clusters.tolist() == [3, 7, 7]
    assert ranges.cosines.tolist() == pytest.approx([0.0, 0.1, 0.1])
    assert [int(uid, 16) for uid in ranges.uids[1:]] == [4, 8]
    assert [ranges.tiles(cluster) for cluster in (2, 3, 7)] == [1, 2, 3]
