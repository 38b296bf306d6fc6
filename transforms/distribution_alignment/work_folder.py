"""The work folder of stage 3: arrays that one step writes and later steps read, instead of a shuffle or side input.

The folder is deleted when the stage is done.
"""

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
    """The paths of the arrays. A retry writes the same content again, so nothing is cleared after a crash."""

    folder: str

    def candidates(self, shard: str) -> str:
        """The `Candidates` of a shard."""
        return files.join(self.folder, "candidates", f"{shard}.npz")

    def members(self, shard: str) -> str:
        """The `MEMBER_COLUMNS` of a shard's candidates, sorted by cluster and then best first."""
        return files.join(self.folder, "members", f"{shard}.npz")

    def embeddings(self, shard: str) -> str:
        """The embeddings of `members`, in the same order, as raw float16 values, so that slices can be read."""
        return files.join(self.folder, "members", f"{shard}.f2")

    @property
    def coarse_centroids(self) -> str:
        """The centroids of the first level of k-means, float32 (c, d)."""
        return files.join(self.folder, "coarse.npy")

    def fine_centroids(self, coarse: int) -> str:
        """The centroids of the clusters within a coarse cluster, float32 (f, d)."""
        return files.join(self.folder, "fine", f"{coarse}.npy")

    @property
    def ranges(self) -> str:
        """The tile boundaries of large clusters (see `tiles.Ranges`)."""
        return files.join(self.folder, "ranges.npz")

    def tile(self, cluster: int, tile: int) -> str:
        """The `Candidates` of one tile of a large cluster, best first."""
        return files.join(self.folder, "tiles", f"{cluster}-{tile}.npz")

    def subset(self, prefix: str) -> str:
        """The sorted rows of subset.npy whose uids start with `prefix`."""
        return files.join(self.folder, "subset", prefix)


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays to the .npz at `path` atomically."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    with files.write_aside(path) as file:
        file.write(content.getbuffer())


def read_arrays(path: str, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays with these names in the .npz at `path`."""
    with files.open_binary(path) as file, np.load(io.BytesIO(file.read()), allow_pickle=False) as arrays:
        return [arrays[name] for name in names]


def write_candidates(path: str, candidates: Candidates) -> None:
    """Write `candidates` to `path` atomically."""
    write_arrays(path, dict(candidates.columns()))


def read_candidates(path: str) -> Candidates:
    """The candidates at `path`."""
    names = [field.name for field in dataclasses.fields(Candidates)]
    return Candidates(*read_arrays(path, names))


class EmbeddingSlice(NamedTuple):
    """Rows `start` to `stop` (exclusive) of a local file of embeddings with `dimensions` dimensions."""

    path: str
    start: int
    stop: int
    dimensions: int

    def read(self) -> np.ndarray:
        """The rows, float16 (stop - start, d)."""
        row_bytes = 2 * self.dimensions
        with open(self.path, "rb") as file:
            file.seek(self.start * row_bytes)
            content = file.read((self.stop - self.start) * row_bytes)
        return np.frombuffer(content, "<f2").reshape(-1, self.dimensions)
