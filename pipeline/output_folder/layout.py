"""Where everything lies under an output folder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

from transforms.core.recipe import CROSS_MODALITY, SINGLE_MODALITY
from transforms.storage import files, local_copies

POOL_WIDE = "pool_wide"
DONE = " done"
"""Stands behind the count of a shard whose table is written (`Layout.progress`)."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of a run's files. `shard` is always a shard's escaped name, which cannot leave the folder.

    What stage 3 leaves lies under `results`, the folder of one version; where that is empty, under `output`, where
    links lead to the newest one (`pipeline.output_folder.versions`). Pool-wide tables may be written
    under `pool_wide_folder` first, until it is known whether they are needed.
    """

    output: str
    results: str = ""
    pool_wide_folder: str = ""

    def single_modality(self, shard: str) -> str:
        """Features of a shard's captions and images."""
        return files.join(self.output, "annotations", "single_modality", f"{shard}.parquet")

    def pool_wide(self, shard: str) -> str:
        """What only the whole pool can tell of a shard's samples: caption frequency, near-duplicates."""
        return files.join(self.pool_wide_folder or self.output, "annotations", POOL_WIDE, f"{shard}.parquet")

    def cross_modality(self, shard: str) -> str:
        """Model scores and embeddings of what stage 1 kept of a shard."""
        return files.join(self.output, "annotations", "cross_modality", f"{shard}.parquet")

    def dead_letters(self, step: str, shard: str) -> str:
        """What could not be judged in `step` of a shard; absent where nothing failed."""
        folder = self.pool_wide_folder if step == POOL_WIDE and self.pool_wide_folder else self.output
        return files.join(folder, "dead_letters", f"{step}-{shard}.jsonl")

    def decisions(self, shard: str) -> str:
        """One row per uid of a shard."""
        return files.join(self._results, "decisions", f"part-{shard}.parquet")

    def progress(self, stage: str, shard: str) -> str:
        """How many samples of a shard a stage has done so far."""
        return files.join(self.progress_folder, stage, f"{shard}.count")

    @property
    def progress_folder(self) -> str:
        """Goes when the run ends. On this machine wherever the output is: it is written for each batch, and only shown
        by a run whose workers are here; elsewhere the runner has counters."""
        if files.in_cloud_storage(self.output):
            return str(local_copies.cache_folder() / "progress" / hashlib.sha256(self.output.encode()).hexdigest()[:32])
        return files.join(self.output, ".progress")

    def in_progress(self, stage: str, shard: str) -> str:
        """A mark that is there while a stage works on a shard, and stays where that never came to an end."""
        return files.join(self.in_progress_folder, stage, f"{shard}.mark")

    @property
    def in_progress_folder(self) -> str:
        """Goes when the run ends well."""
        return files.join(self.output, ".in_progress")

    @property
    def alignment_work(self) -> str:
        """Arrays that the steps of stage 3 hand on; goes when that stage ends."""
        return files.join(self.output, ".distribution_alignment")

    @property
    def centroids(self) -> str:
        """float32 (k, d), L2-normalised."""
        return files.join(self._results, "centroids.npy")

    @property
    def clusters(self) -> str:
        """One row per cluster."""
        return files.join(self._results, "clusters.parquet")

    @property
    def clusters_figure(self) -> str:
        """The clusters before and after, to look at."""
        return files.join(self._results, "clusters.svg")

    @property
    def subset(self) -> str:
        """DataComp's subset file: one row per copy."""
        return files.join(self._results, "subset.npy")

    @property
    def funnel(self) -> str:
        """In, dropped and kept per rule."""
        return files.join(self._results, "funnel.json")

    @property
    def manifest(self) -> str:
        """What the results were made with."""
        return files.join(self._results, "manifest.json")

    @property
    def newest_manifest(self) -> str:
        """What the newest run works with, from its start on: its results need not be there yet."""
        return files.join(self.output, "annotations", "manifest.json")

    @property
    def shards(self) -> str:
        """The shards of the pool as the newest run found them."""
        return files.join(self.output, "annotations", "shards.json")

    @property
    def missing(self) -> str:
        """How many samples lack a score, in digits."""
        return files.join(self.select_work, "missing")

    @property
    def select_work(self) -> str:
        """What `select` finds out before it may write; goes when it ends."""
        return files.join(self.output, ".select")

    @property
    def run(self) -> str:
        """Times and counts of work."""
        return files.join(self.output, "run.json")

    def shards_with(self, path_of: Callable[[Layout, str], str]) -> set[str]:
        """The shards that have a file where `path_of` says: one listing of a folder, however many they are."""
        folder, _, ending = path_of(self, "").rpartition("/")
        return {name.removesuffix(ending) for name in files.names_in(folder) if name.endswith(ending)}

    @property
    def _results(self) -> str:
        return self.results or self.output


TABLE_OF = {SINGLE_MODALITY: Layout.single_modality, CROSS_MODALITY: Layout.cross_modality}
"""The table that each per-shard stage leaves."""
