"""Where everything lies under an output folder."""

from __future__ import annotations

import dataclasses

from pipeline import files
from pipeline.recipe import CROSS_MODALITY, SINGLE_MODALITY


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of a run's files. `shard` is always a shard's escaped name, which cannot leave the folder."""

    output: str

    def single_modality(self, shard: str) -> str:
        """Features of a shard's captions and images."""
        return files.join(self.output, "annotations", "single_modality", f"{shard}.parquet")

    def pool_wide(self, shard: str) -> str:
        """What only the whole pool can tell of a shard's samples: caption frequency, near-duplicates."""
        return files.join(self.output, "annotations", "pool_wide", f"{shard}.parquet")

    def cross_modality(self, shard: str) -> str:
        """Model scores and embeddings of what stage 1 kept of a shard."""
        return files.join(self.output, "annotations", "cross_modality", f"{shard}.parquet")

    def dead_letters(self, step: str, shard: str) -> str:
        """What could not be judged in `step` of a shard; absent where nothing failed."""
        return files.join(self.output, "dead_letters", f"{step}-{shard}.jsonl")

    def decisions(self, shard: str) -> str:
        """One row per uid of a shard."""
        return files.join(self.output, "decisions", f"part-{shard}.parquet")

    def progress(self, stage: str, shard: str) -> str:
        """How many samples of a shard a stage has done so far."""
        return files.join(self.progress_folder, stage, f"{shard}.count")

    @property
    def progress_folder(self) -> str:
        """Goes when the run ends."""
        return files.join(self.output, ".progress")

    def in_hand(self, stage: str, shard: str) -> str:
        """A mark that is there while a stage works on a shard, and stays where that never came to an end."""
        return files.join(self.in_hand_folder, stage, f"{shard}.mark")

    @property
    def in_hand_folder(self) -> str:
        """Goes when the run ends well."""
        return files.join(self.output, ".in_hand")

    @property
    def alignment_work(self) -> str:
        """Arrays that the steps of stage 3 hand on; goes when that stage ends."""
        return files.join(self.output, ".distribution_alignment")

    @property
    def centroids(self) -> str:
        """float32 (k, d), L2-normalised."""
        return files.join(self.output, "centroids.npy")

    @property
    def clusters(self) -> str:
        """One row per cluster."""
        return files.join(self.output, "clusters.parquet")

    @property
    def clusters_figure(self) -> str:
        """The clusters before and after, to look at."""
        return files.join(self.output, "clusters.svg")

    @property
    def subset(self) -> str:
        """DataComp's subset file: one row per copy."""
        return files.join(self.output, "subset.npy")

    @property
    def funnel(self) -> str:
        """In, dropped and kept per rule."""
        return files.join(self.output, "funnel.json")

    @property
    def manifest(self) -> str:
        """What the outputs were made with."""
        return files.join(self.output, "manifest.json")

    @property
    def run(self) -> str:
        """Times and counts of work."""
        return files.join(self.output, "run.json")


TABLE_OF = {SINGLE_MODALITY: Layout.single_modality, CROSS_MODALITY: Layout.cross_modality}
"""The table that each per-shard stage leaves."""
