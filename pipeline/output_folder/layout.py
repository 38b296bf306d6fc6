"""The paths of all files under an output folder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

from transforms.core.recipe import CROSS_MODALITY, SINGLE_MODALITY
from transforms.storage import files, local_copies

POOL_WIDE = "pool_wide"
OWNER = ".owner"
"""The name of the file with the token of the run that owns the folder (`pipeline.output_folder.owner`)."""
DONE = " done"
"""Suffix of the count of a shard whose table is written (`Layout.progress`)."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The paths of a run's files. `shard` is always the escaped name of a shard, so no path leaves the folder.

    Outputs of stage 3 are under `results`, the folder of one version. If `results` is empty they are under `output`,
    where links lead to the newest version (`pipeline.output_folder.versions`). Pool-wide tables may be written under
    `pool_wide_folder` first, until it is known whether they are needed. `token` is that of a run that may outlive the
    process that started it, else empty.
    """

    output: str
    results: str = ""
    pool_wide_folder: str = ""
    token: str = ""

    def single_modality(self, shard: str) -> str:
        """Features of the captions and images of a shard."""
        return files.join(self.output, "annotations", "single_modality", f"{shard}.parquet")

    def pool_wide(self, shard: str) -> str:
        """Pool-wide columns of a shard's samples: caption frequency, near-duplicates."""
        return files.join(self.pool_wide_folder or self.output, "annotations", POOL_WIDE, f"{shard}.parquet")

    def cross_modality(self, shard: str) -> str:
        """Model scores and embeddings of the samples of a shard that stage 1 kept."""
        return files.join(self.output, "annotations", "cross_modality", f"{shard}.parquet")

    def dead_letters(self, step: str, shard: str) -> str:
        """Dead letters of a shard in `step`; absent if there are none."""
        folder = self.pool_wide_folder if step == POOL_WIDE and self.pool_wide_folder else self.output
        return files.join(folder, "dead_letters", f"{step}-{shard}.jsonl")

    def decisions(self, shard: str) -> str:
        """One row per uid of a shard."""
        return files.join(self._results, "decisions", f"part-{shard}.parquet")

    def progress(self, stage: str, shard: str) -> str:
        """The number of samples of a shard that a stage has processed so far."""
        return files.join(self.progress_folder, stage, f"{shard}.count")

    @property
    def progress_folder(self) -> str:
        """Deleted when the run ends. Always on this machine: it is written for every batch, and only runs with local
        workers show it. Other runners have counters."""
        if files.in_cloud_storage(self.output):
            return str(local_copies.cache_folder() / "progress" / hashlib.sha256(self.output.encode()).hexdigest()[:32])
        return files.join(self.output, ".progress")

    @property
    def alignment_work(self) -> str:
        """Arrays that the steps of stage 3 exchange. Deleted when that stage ends."""
        return self._of_run(self.alignment_folder)

    @property
    def alignment_folder(self) -> str:
        """`alignment_work`, or its parent if the run has a token."""
        return files.join(self.output, ".distribution_alignment")

    @property
    def owner(self) -> str:
        """The token of the run that owns the folder; absent if that run has none."""
        return files.join(self.output, OWNER)

    @property
    def centroids(self) -> str:
        """Centroids of the clusters: float32 (k, d), L2-normalised."""
        return files.join(self._results, "centroids.npy")

    @property
    def clusters(self) -> str:
        """Table with one row per cluster."""
        return files.join(self._results, "clusters.parquet")

    @property
    def clusters_figure(self) -> str:
        """Figure of the cluster sizes before and after."""
        return files.join(self._results, "clusters.svg")

    @property
    def subset(self) -> str:
        """The subset file in DataComp's format: one row per copy."""
        return files.join(self._results, "subset.npy")

    @property
    def funnel(self) -> str:
        """Samples in, dropped and kept per rule."""
        return files.join(self._results, "funnel.json")

    @property
    def manifest(self) -> str:
        """Recipe, models and versions that the results were computed with."""
        return files.join(self._results, "manifest.json")

    @property
    def newest_manifest(self) -> str:
        """The manifest of the newest run, written at its start: its results may not exist yet."""
        return files.join(self.output, "annotations", "manifest.json")

    @property
    def shards(self) -> str:
        """The listing of the pool, as the newest run found it."""
        return files.join(self.output, "annotations", "shards.json")

    @property
    def missing(self) -> str:
        """The number of samples that lack a score, as decimal text."""
        return files.join(self.select_work, "missing")

    @property
    def select_work(self) -> str:
        """Intermediate files of `select`. Deleted when it ends."""
        return self._of_run(self.select_folder)

    @property
    def select_folder(self) -> str:
        """`select_work`, or its parent if the run has a token."""
        return files.join(self.output, ".select")

    @property
    def run(self) -> str:
        """Times and counts of the newest run."""
        return files.join(self.output, "run.json")

    def shards_with(self, path_of: Callable[[Layout, str], str]) -> set[str]:
        """The names of the shards whose file `path_of` exists, found with one listing of its folder."""
        folder, _, ending = path_of(self, "").rpartition("/")
        return {name.removesuffix(ending) for name in files.names_in(folder) if name.endswith(ending)}

    @property
    def _results(self) -> str:
        return self.results or self.output

    def _of_run(self, folder: str) -> str:
        return files.join(folder, self.token) if self.token else folder


TABLE_OF = {SINGLE_MODALITY: Layout.single_modality, CROSS_MODALITY: Layout.cross_modality}
"""The table that each per-shard stage writes."""
