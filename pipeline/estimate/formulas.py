"""The formulas of a plan that are more than arithmetic: plain functions of numbers, and constants of the pipeline."""

from __future__ import annotations

import math

# Copies of constants whose modules import Beam; a test compares them.
TILE_ROWS = 8192  # transforms.distribution_alignment.tiles
SUBSET_RANGES = 256  # pipeline.sinks.subset: two hex digits


def distinct(draws: float, kinds: float) -> float:
    """Expected number of distinct kinds in `draws` from `kinds` equally likely ones: kinds · (1 − (1 − 1/kinds)^draws).
    With one kind, fewer than one draw counts as itself."""
    if kinds <= 1 and draws < 1:
        return draws
    log_of_others = math.log1p(-1 / kinds) if kinds > 1 else -math.inf
    return kinds * -math.expm1(draws * log_of_others)


def assignment_flops(candidates: float, clusters: float, dimensions: float) -> float:
    """Operations to compare each candidate with each centroid: 2 · n · k · d."""
    return 2.0 * candidates * clusters * dimensions


def dedup_flops(candidates: float, clusters: float, dimensions: float) -> float:
    """Operations to compare all pairs within each cluster, with clusters of equal size: 2 · d · n²/(2k). An upper
    bound: the pairs that bounds skip are counted."""
    return candidates * candidates / clusters * dimensions


def kmeans_flops(
    candidates: float,
    clusters: float,
    first_level: float,
    samples_per_cluster: float,
    iterations: float,
    dimensions: float,
) -> float:
    """Operations of two-level k-means: 2 · iterations · d · (rows · k), of the first level and of all second-level
    runs. With a `first_level` of 1 there is only one level."""
    rows, first_rows = (min(candidates, samples_per_cluster * count) for count in (clusters, first_level))
    if first_level == 1:
        return 2.0 * iterations * dimensions * rows * clusters
    return 2.0 * iterations * dimensions * (first_rows * first_level + rows * clusters / first_level)


def serial_kmeans_flops(
    candidates: float,
    clusters: float,
    first_level: float,
    samples_per_cluster: float,
    iterations: float,
    dimensions: float,
) -> float:
    """The part of `kmeans_flops` that runs on a single worker: the first level."""
    count = clusters if first_level == 1 else first_level
    return 2.0 * iterations * dimensions * min(candidates, samples_per_cluster * count) * count


def memory_family(machine_type: str) -> str:
    """The figure with the memory per vCPU of a predefined machine type: `memory/n2-standard` of n2-standard-8."""
    series, _, rest = machine_type.partition("-")
    return f"memory/{series}-{rest.partition('-')[0]}"


def custom_memory_gib(machine_type: str) -> float | None:
    """The memory in the name of a custom machine type (n2-custom-8-16384 has 16 GiB); None for a predefined one."""
    return int(machine_type.rpartition("-")[2]) / 1024 if "custom" in machine_type else None
