"""The formulas of a plan, computed by hand."""

from __future__ import annotations

import pytest

from pipeline.estimate.formulas import (
    assignment_flops,
    custom_memory_gib,
    dedup_flops,
    distinct,
    kmeans_flops,
    memory_family,
    serial_kmeans_flops,
)


def test_distinct() -> None:
    assert distinct(1, 10) == pytest.approx(1)
    assert distinct(2, 4) == pytest.approx(1.75)  # 4 · (1 − 9/16)
    assert distinct(1000, 1) == pytest.approx(1)
    assert distinct(0.5, 1) == 0.5
    assert distinct(0, 7) == 0


def test_operations_of_stage_3() -> None:
    assert assignment_flops(1000, 10, 4) == 80_000
    assert dedup_flops(1000, 10, 4) == 400_000  # 10 clusters of 100² / 2 pairs, 8 operations each
    # one level: 5 rounds, all 1,000 rows with all 10 centroids
    assert kmeans_flops(1000, 10, 1, 256, 5, 4) == 2 * 5 * 4 * 1000 * 10
    # two levels, 3 rows per cluster: 12 rows with 4 coarse centroids, 48 rows with the 4 fine ones of their cluster
    assert kmeans_flops(1000, 16, 4, 3, 5, 4) == 2 * 5 * 4 * (12 * 4 + 48 * 4)
    assert serial_kmeans_flops(1000, 16, 4, 3, 5, 4) == 2 * 5 * 4 * 12 * 4
    assert serial_kmeans_flops(1000, 10, 1, 256, 5, 4) == kmeans_flops(1000, 10, 1, 256, 5, 4)


def test_memory_of_machine_types() -> None:
    assert memory_family("n2-standard-8") == "memory/n2-standard"
    assert memory_family("a2-highgpu-1g") == "memory/a2-highgpu"
    assert custom_memory_gib("n2-custom-8-16384") == 16
    assert custom_memory_gib("n2-standard-8") is None
