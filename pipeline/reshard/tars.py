"""Writes the training subset as webdataset tars: each sample `copies` times, with its copies far apart."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import apache_beam as beam

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.reshard.copy_placement import CopyPlacement, ShardRange, split_by_shard
from pipeline.reshard.offsets import OFFSETS, find_offsets
from pipeline.reshard.subset import Subset, SubsetChecksum
from transforms.core.recipe import PoolSettings
from transforms.core.records import Shard
from transforms.storage import files

_SHOWN_FAULTS = 5


class SubsetMismatch(RuntimeError):
    """decisions/ and subset.npy do not describe the same subset."""


class PoolChanged(RuntimeError):
    """Some tars could not be written, because samples have changed in the pool since the run."""


class _SampleChanged(Exception):
    """A sample has changed in the pool since the run."""

    def __init__(self, shard: Shard, key: str, fault: str) -> None:
        super().__init__(f"shard {shard.name}, key {key!a}: {fault}")


@dataclasses.dataclass(frozen=True)
class ReshardedFolder:
    """The file names in the output folder of a reshard."""

    output: str
    tars: int

    def tar(self, index: int) -> str:
        """Return the path of the webdataset tar number `index`."""
        return files.join(self.output, self.tar_name(index))

    def tar_name(self, index: int) -> str:
        """Return the file name of a tar. All names have equal length, so that they sort in order of their numbers."""
        return f"{index:0{max(5, len(str(self.tars - 1)))}d}.tar"

    @property
    def sizes(self) -> str:
        """The number of rows by tar name, in the file that open_clip expects. Written after all tars are complete."""
        return files.join(self.output, "sizes.json")

    def offsets(self, shard: str) -> str:
        """Return the path of the table of offsets of a shard."""
        return files.join(self.offsets_folder, f"{shard}.parquet")

    @property
    def offsets_folder(self) -> str:
        """The folder of the tables of offsets. Deleted once all tars are written."""
        return files.join(self.output, ".places")

    @property
    def manifest(self) -> str:
        """The inputs of the tars."""
        return files.join(self.output, "reshard.json")


@dataclasses.dataclass(frozen=True)
class _CountedShard:
    """A shard, its number of samples in the subset, and the checksum of their rows."""

    shard: Shard
    samples: int
    checksum: SubsetChecksum


@dataclasses.dataclass(frozen=True)
class _PlannedTar:
    """The contents of one output tar, as ranges of samples of shards."""

    index: int
    parts: tuple[tuple[Shard, ShardRange], ...]


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The checksum of an output tar, or, if it could not be written, the fault of its first changed sample."""

    index: int
    checksum: SubsetChecksum
    fault: str | None = None


class _Row(NamedTuple):
    """One row of an output tar: a copy of a sample, and the sample's row of OFFSETS."""

    position: int
    sample: int
    copy: int
    shard: Shard
    source: dict[str, Any]


class WriteResharded(beam.PTransform):
    """PCollection[Shard] -> the path of sizes.json, once all output tars exist.

    The shards are those of decisions/. The path of a shard that is no longer in the pool is empty. Each input tar is
    streamed once to find the offsets of the selected samples. Each output tar is then written independently, reading
    only its own samples, once per copy. A worker holds one sample and the table rows of one tar in memory, and no image
    crosses a shuffle. Existing output tars are not written again.

    Raises SubsetMismatch if decisions/ and subset.npy do not describe the same subset. If a sample is no longer in the
    pool, or its image or caption has changed, only the output tars that contain it are not written; PoolChanged is
    raised after all others are written.
    """

    def __init__(
        self, layout: Layout, bounds: PoolSettings, subset: Subset, placement: CopyPlacement, folder: ReshardedFolder
    ) -> None:
        super().__init__()
        self._layout, self._bounds, self._subset = layout, bounds, subset
        self._placement, self._folder = placement, folder

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        return (
            shards
            | "Find places" >> beam.Map(_find_offsets, self._layout, self._bounds, self._folder)
            | "All shards" >> beam.combiners.ToList()
            | "Plan tars" >> beam.FlatMap(_plan, self._placement, self._subset)
            | "Spread tars" >> beam.Reshuffle()
            | "Write tar" >> beam.ParDo(_WriteTar(self._placement, self._folder))
            | "All tars" >> beam.combiners.ToList()
            | "Check and write sizes" >> beam.Map(_finish, self._subset, self._folder)
        )


def _find_offsets(shard: Shard, layout: Layout, bounds: PoolSettings, folder: ReshardedFolder) -> _CountedShard:
    shard = Shard(*shard)
    path = folder.offsets(shard.name)
    if tables.is_complete(path, {"shard": shard.fingerprint}):
        rows = tables.read_table(path, ["uid", "copies"])
    else:
        rows = find_offsets(shard, layout, bounds)
        tables.write_table(path, rows, OFFSETS, cache_key={"shard": shard.fingerprint})
    return _CountedShard(shard, len(rows), SubsetChecksum.of((row["uid"], row["copies"]) for row in rows))


def _plan(counted: list[_CountedShard], placement: CopyPlacement, subset: Subset) -> Iterator[_PlannedTar]:
    counted = sorted(counted, key=lambda one: one.shard.name)
    samples = [one.samples for one in counted]
    checksum = sum((one.checksum for one in counted), SubsetChecksum())
    if (sum(samples), checksum) != (subset.samples, subset.checksum):
        raise SubsetMismatch(
            f"decisions/ holds {sum(samples)} samples with {checksum.rows} copies, subset.npy holds {subset.samples} "
            f"with {subset.checksum.rows}, or different ones; both must come from the same finished run: run again"
        )
    for tar in range(placement.tars):
        parts = split_by_shard(placement.ranges(tar), samples)
        yield _PlannedTar(tar, tuple((counted[part.shard].shard, part) for part in parts))


class _WriteTar(beam.DoFn):
    def __init__(self, placement: CopyPlacement, folder: ReshardedFolder) -> None:
        self._placement, self._folder = placement, folder

    def process(self, planned: _PlannedTar) -> Iterator[_Outcome]:
        path, rows = self._folder.tar(planned.index), sorted(self._rows(planned), key=_by_position)
        try:
            if not files.exists(path):
                _write(path, rows)
        except _SampleChanged as error:
            yield _Outcome(planned.index, SubsetChecksum(), str(error))
        else:
            yield _Outcome(planned.index, SubsetChecksum.of((row.source["uid"], 1) for row in rows))

    def _rows(self, planned: _PlannedTar) -> Iterator[_Row]:
        for shard, part in planned.parts:
            sources = tables.read_table(self._folder.offsets(shard.name))
            for sample in range(part.start, part.stop):
                source = sources[sample - part.first]
                if source["copies"] > part.copy:
                    yield _Row(self._placement.position(sample, part.copy), sample, part.copy, shard, source)


def _by_position(row: _Row) -> tuple[int, int]:
    return row.position, row.sample  # unique


def _write(path: str, rows: list[_Row]) -> None:
    """Write one output tar atomically. Raises _SampleChanged."""
    for row in rows:
        if row.source["fault"]:
            raise _SampleChanged(row.shard, row.source["key"], row.source["fault"])
    with (
        files.write_aside(path) as file,
        # USTAR has no extended headers. Names made of uids and the sizes of samples always fit into it.
        tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
        contextlib.closing(_OpenShards()) as shards,
    ):
        for row in rows:
            for extension, content in shards.read(row):
                info = tarfile.TarInfo(f"{row.source['uid']}-{row.copy}.{extension}")  # mtime and owner default to 0
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


class _OpenShards:
    """Reads samples at their offsets.

    Rows with the same copy number are in pool order, so one open tar per copy number is enough.
    """

    def __init__(self) -> None:
        self._open: dict[int, tuple[Shard, Any]] = {}

    def read(self, row: _Row) -> Iterator[tuple[str, bytes]]:
        """Yield (extension, content) of each file. Raises _SampleChanged if it has changed since the offsets pass."""
        opened = self._open.get(row.copy)
        if opened is None or opened[0] != row.shard:
            if opened is not None:
                opened[1].close()
            opened = self._open[row.copy] = row.shard, files.open_binary(row.shard.path)
        for file in row.source["files"]:
            if file["content"] is not None:
                yield file["extension"], file["content"]
                continue
            opened[1].seek(file["offset"])
            content = opened[1].read(file["size_bytes"])
            if hashlib.sha256(content).hexdigest() != file["sha256"]:
                fault = f"the {file['extension']} has changed while this command was running"
                raise _SampleChanged(row.shard, row.source["key"], fault)
            yield file["extension"], content

    def close(self) -> None:
        """Close all tars."""
        for _, file in self._open.values():
            file.close()


def _finish(outcomes: list[_Outcome], subset: Subset, folder: ReshardedFolder) -> str:
    outcomes = sorted(outcomes, key=lambda outcome: outcome.index)
    faults = [f"{folder.tar_name(outcome.index)}: {outcome.fault}" for outcome in outcomes if outcome.fault]
    if faults:
        raise PoolChanged(
            f"{len(faults)} of {len(outcomes)} tars could not be written, because the pool has changed since the run "
            f"({'; '.join(faults[:_SHOWN_FAULTS])}); restore the pool and reshard again, which keeps the existing "
            "tars, or run over the changed pool and reshard into another folder"
        )
    checksum = sum((outcome.checksum for outcome in outcomes), SubsetChecksum())
    if checksum != subset.checksum:
        raise SubsetMismatch(
            f"the tars hold {checksum.rows} rows, subset.npy holds {subset.checksum.rows}, or rows of different samples"
        )
    if not files.exists(folder.sizes):
        files.write_json(folder.sizes, {folder.tar_name(one.index): one.checksum.rows for one in outcomes})
    return folder.sizes
