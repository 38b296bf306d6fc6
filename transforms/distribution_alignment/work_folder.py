"""Stage 3's work folder: arrays that are written once and read by later steps, so that no shuffle and no side input
has to carry them. It goes when the stage is done."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from transforms.distribution_alignment.records import Candidates
from transforms.storage import files

MEMBER_COLUMNS = ("clusters", "uids", "shards", "cosines", "digits")


@dataclasses.dataclass(frozen=True)
class WorkFolder:
    """Where each step's arrays lie. What is written again after a crash is the same, so nothing has to be cleared."""

    folder: str

    def candidates(self, shard: str) -> str:
        """A shard's `Candidates`."""
        return files.join(self.folder, "candidates", f"{shard}.npz")

    def members(self, shard: str) -> str:
        """A shard's candidates in their clusters, by cluster and then best first: `MEMBER_COLUMNS`."""
        return files.join(self.folder, "members", f"{shard}.npz")

    def embeddings(self, shard: str) -> str:
        """The embeddings of `members`, in their order: nothing but float16 values, so that a slice can be read."""
        return files.join(self.folder, "members", f"{shard}.f2")

    @property
    def coarse_centroids(self) -> str:
        """float32 (c, d): the first level of k-means."""
        return files.join(self.folder, "coarse.npy")

    def fine_centroids(self, coarse: int) -> str:
        """float32 (f, d): the clusters within a coarse one."""
        return files.join(self.folder, "fine", f"{coarse}.npy")

    @property
    def ranges(self) -> str:
        """Where the tiles of large clusters begin."""
        return files.join(self.folder, "ranges.npz")

    def tile(self, cluster: int, tile: int) -> str:
        """The `Candidates` of one tile of a large cluster, best first."""
        return files.join(self.folder, "tiles", f"{cluster}-{tile}.npz")

    def subset(self, prefix: str) -> str:
        """The sorted rows of subset.npy whose uids begin with `prefix`."""
        return files.join(self.folder, "subset", prefix)


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays to `path`, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    with files.write_aside(path) as file:
        file.write(content.getbuffer())


def read_arrays(path: str, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays of these names at `path`."""
    with files.open_binary(path) as file, np.load(io.BytesIO(file.read()), allow_pickle=False) as arrays:
        return [arrays[name] for name in names]


def write_candidates(path: str, candidates: Candidates) -> None:
    """Write `candidates` to `path`, whole or not at all."""
    write_arrays(path, dict(candidates.columns()))


def read_candidates(path: str) -> Candidates:
    """The candidates at `path`."""
    names = [field.name for field in dataclasses.fields(Candidates)]
    return Candidates(*read_arrays(path, names))


class EmbeddingSlice(NamedTuple):
    """Rows `start` to `stop` of a local file of embeddings of so many dimensions."""

    path: str
    start: int
    stop: int
    dimensions: int

    def read(self) -> np.ndarray:
        """float16 (stop - start, d)."""
        row_bytes = 2 * self.dimensions
        with open(self.path, "rb") as file:
            file.seek(self.start * row_bytes)
            content = file.read((self.stop - self.start) * row_bytes)
        return np.frombuffer(content, "<f2").reshape(-1, self.dimensions)
