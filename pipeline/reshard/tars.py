"""The training subset as webdataset tars: every sample as often as `copies` says, its copies far apart."""

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
from pipeline.reshard.copy_placement import Segment, Spread, segments
from pipeline.reshard.offsets import PLACES, find_places
from pipeline.reshard.subset import Subset, SubsetChecksum
from transforms.core.recipe import PoolSettings
from transforms.core.records import Shard
from transforms.storage import files

_SHOWN_FAULTS = 5


class Disagreement(RuntimeError):
    """decisions/ and subset.npy do not say the same."""


class Incomplete(RuntimeError):
    """Output tars whose samples the pool no longer holds as they were judged."""


class _Changed(Exception):
    """A sample that the pool no longer holds as it was judged: where, and what is wrong."""

    def __init__(self, shard: Shard, key: str, fault: str) -> None:
        super().__init__(f"shard {shard.name}, key {key!a}: {fault}")


@dataclasses.dataclass(frozen=True)
class ReshardedFolder:
    """The names of what resharding leaves in its folder."""

    output: str
    tars: int

    def tar(self, index: int) -> str:
        """The webdataset tar at place `index`."""
        return files.join(self.output, self.tar_name(index))

    def tar_name(self, index: int) -> str:
        """Names of equal length, so that their order is the tars' order."""
        return f"{index:0{max(5, len(str(self.tars - 1)))}d}.tar"

    @property
    def sizes(self) -> str:
        """Tar name -> rows, as open_clip looks for it beside the tars; written last, when all are whole."""
        return files.join(self.output, "sizes.json")

    def places(self, shard: str) -> str:
        """Where the chosen samples of a shard lie in its tar."""
        return files.join(self.places_folder, f"{shard}.parquet")

    @property
    def places_folder(self) -> str:
        """Goes when all tars are written."""
        return files.join(self.output, ".places")

    @property
    def manifest(self) -> str:
        """What the tars were made from."""
        return files.join(self.output, "reshard.json")


@dataclasses.dataclass(frozen=True)
class _CountedShard:
    """A shard, the samples of it that stand in the subset, and their rows."""

    shard: Shard
    samples: int
    tally: SubsetChecksum


@dataclasses.dataclass(frozen=True)
class _PlannedTar:
    """All that one output tar is made from: which samples of which shards, in a few lines."""

    index: int
    parts: tuple[tuple[Shard, Segment], ...]


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What became of one output tar: its rows, or the first sample that it could not have."""

    index: int
    tally: SubsetChecksum
    fault: str | None = None


class _Row(NamedTuple):
    """One row of an output tar: a copy of a sample, and the row of PLACES that says where it lies."""

    position: int
    sample: int
    copy: int
    shard: Shard
    place: dict[str, Any]


class WriteResharded(beam.PTransform):
    """PCollection[Shard] -> the path of sizes.json, once all output tars are there.

    The shards are those of decisions/; one that the pool no longer has comes with an empty path. Each input tar is
    streamed once, to find where in it the chosen samples lie; then each output tar is written by itself, and reads only
    the samples that it holds: once for every copy. A worker holds one sample and the slim rows of one tar. No pixels
    cross a shuffle. An output tar that is there already is not written again.

    Raises Disagreement where decisions/ and subset.npy do not say the same. A sample that the pool no longer holds, or
    holds with another image or caption, costs its output tars only; when all others are written, Incomplete is raised.
    """

    def __init__(
        self, layout: Layout, bounds: PoolSettings, subset: Subset, spread: Spread, folder: ReshardedFolder
    ) -> None:
        super().__init__()
        self._layout, self._bounds, self._subset = layout, bounds, subset
        self._spread, self._folder = spread, folder

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        return (
            shards
            | "Find places" >> beam.Map(_find_places, self._layout, self._bounds, self._folder)
            | "All shards" >> beam.combiners.ToList()
            | "Plan tars" >> beam.FlatMap(_plan, self._spread, self._subset)
            | "Spread tars" >> beam.Reshuffle()
            | "Write tar" >> beam.ParDo(_WriteTar(self._spread, self._folder))
            | "All tars" >> beam.combiners.ToList()
            | "Check and write sizes" >> beam.Map(_finish, self._subset, self._folder)
        )


def _find_places(shard: Shard, layout: Layout, bounds: PoolSettings, folder: ReshardedFolder) -> _CountedShard:
    shard = Shard(*shard)
    path = folder.places(shard.name)
    if tables.is_complete(path, {"shard": shard.fingerprint}):
        rows = tables.read_table(path, ["uid", "copies"])
    else:
        rows = find_places(shard, layout, bounds)
        tables.write_table(path, rows, PLACES, cache_key={"shard": shard.fingerprint})
    return _CountedShard(shard, len(rows), SubsetChecksum.of((row["uid"], row["copies"]) for row in rows))


def _plan(counted: list[_CountedShard], spread: Spread, subset: Subset) -> Iterator[_PlannedTar]:
    counted = sorted(counted, key=lambda one: one.shard.name)
    samples = [one.samples for one in counted]
    tally = sum((one.tally for one in counted), SubsetChecksum())
    if (sum(samples), tally) != (subset.samples, subset.tally):
        raise Disagreement(
            f"decisions/ holds {sum(samples)} samples with {tally.rows} copies, subset.npy {subset.samples} with "
            f"{subset.tally.rows}, or others; both must come from one finished run over one pool: run it again"
        )
    for tar in range(spread.tars):
        parts = segments(spread.stretches(tar), samples)
        yield _PlannedTar(tar, tuple((counted[part.shard].shard, part) for part in parts))


class _WriteTar(beam.DoFn):
    def __init__(self, spread: Spread, folder: ReshardedFolder) -> None:
        self._spread, self._folder = spread, folder

    def process(self, planned: _PlannedTar) -> Iterator[_Outcome]:
        path, rows = self._folder.tar(planned.index), sorted(self._rows(planned), key=_by_position)
        try:
            if not files.exists(path):
                _write(path, rows)
        except _Changed as error:
            yield _Outcome(planned.index, SubsetChecksum(), str(error))
        else:
            yield _Outcome(planned.index, SubsetChecksum.of((row.place["uid"], 1) for row in rows))

    def _rows(self, planned: _PlannedTar) -> Iterator[_Row]:
        for shard, part in planned.parts:
            places = tables.read_table(self._folder.places(shard.name))
            for sample in range(part.start, part.stop):
                place = places[sample - part.first]
                if place["copies"] > part.copy:
                    yield _Row(self._spread.position(sample, part.copy), sample, part.copy, shard, place)


def _by_position(row: _Row) -> tuple[int, int]:
    return row.position, row.sample  # no two rows have both in common


def _write(path: str, rows: list[_Row]) -> None:
    """Write one output tar, whole or not at all. Raises _Changed."""
    for row in rows:
        if row.place["fault"]:
            raise _Changed(row.shard, row.place["key"], row.place["fault"])
    with (
        files.write_aside(path) as file,
        # The format without extended headers: uids and the sizes of samples always fit into it.
        tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
        contextlib.closing(_OpenShards()) as shards,
    ):
        for row in rows:
            for extension, content in shards.read(row):
                info = tarfile.TarInfo(f"{row.place['uid']}-{row.copy}.{extension}")  # its mtime and owner are 0
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


class _OpenShards:
    """Reads samples at their places. The rows of one copy go through the pool in its order, so one open tar for each
    copy is enough."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Shard, Any]] = {}

    def read(self, row: _Row) -> Iterator[tuple[str, bytes]]:
        """(extension, content) of each file. Raises _Changed where it has changed since its place was found."""
        opened = self._open.get(row.copy)
        if opened is None or opened[0] != row.shard:
            if opened is not None:
                opened[1].close()
            opened = self._open[row.copy] = row.shard, files.open_binary(row.shard.path)
        for place in row.place["files"]:
            opened[1].seek(place["offset"])
            content = opened[1].read(place["size_bytes"])
            if hashlib.sha256(content).hexdigest() != place["sha256"]:
                raise _Changed(row.shard, row.place["key"], f"its {place['extension']} has changed just now")
            yield place["extension"], content

    def close(self) -> None:
        """Close all."""
        for _, file in self._open.values():
            file.close()


def _finish(outcomes: list[_Outcome], subset: Subset, folder: ReshardedFolder) -> str:
    outcomes = sorted(outcomes, key=lambda outcome: outcome.index)
    faults = [f"{folder.tar_name(outcome.index)}: {outcome.fault}" for outcome in outcomes if outcome.fault]
    if faults:
        raise Incomplete(
            f"{len(faults)} of {len(outcomes)} tars could not be written, because the pool has changed since it was "
            f"judged ({'; '.join(faults[:_SHOWN_FAULTS])}); restore the pool and reshard again, which keeps the tars "
            "that are there, or run the changed pool and reshard into another folder"
        )
    tally = sum((outcome.tally for outcome in outcomes), SubsetChecksum())
    if tally != subset.tally:
        raise Disagreement(f"the tars hold {tally.rows} rows, subset.npy {subset.tally.rows}, or of other samples")
    if not files.exists(folder.sizes):
        files.write_json(folder.sizes, {folder.tar_name(one.index): one.tally.rows for one in outcomes})
    return folder.sizes
