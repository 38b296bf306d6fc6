"""The training subset as webdataset tars: every sample as often as `copies` says, its copies far apart."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import io
import itertools
import operator
import tarfile
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import apache_beam as beam

from pipeline import files, tables
from pipeline.layout import Layout
from pipeline.recipe import PoolBounds
from pipeline.records import Shard
from pipeline.sources.subset import Subset, Tally
from pipeline.sources.webdataset import BrokenTar, Members, read_members
from pipeline.spread import Segment, Spread, segments

_SHOWN_FAULTS = 5


class Disagreement(RuntimeError):
    """decisions/ and subset.npy do not say the same."""


class Incomplete(RuntimeError):
    """Output tars whose samples the pool no longer holds as they were judged."""


class _Changed(Exception):
    """A sample that the pool no longer holds as it was judged; where, and what is wrong."""


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

    @property
    def manifest(self) -> str:
        """What the tars were made from."""
        return files.join(self.output, "reshard.json")


@dataclasses.dataclass(frozen=True)
class _CountedShard:
    """A shard, the samples of it that stand in the subset, and their rows."""

    shard: Shard
    samples: int
    tally: Tally


@dataclasses.dataclass(frozen=True)
class _PlannedSegment:
    """Which of a shard's samples go into a tar, and the shard."""

    shard: Shard
    segment: Segment


@dataclasses.dataclass(frozen=True)
class _PlannedTar:
    """All that one output tar is made from, in a few lines: not its rows."""

    index: int
    segments: tuple[_PlannedSegment, ...]


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What became of one output tar: its rows, or the first sample that it could not have."""

    index: int
    tally: Tally
    fault: str | None = None


class _Row(NamedTuple):
    """One row of an output tar. Rows sort by position, then by the sample's number; no two have both in common."""

    position: int
    sample: int
    copy: int
    decision: dict[str, Any]
    members: Members


class WriteResharded(beam.PTransform):
    """PCollection[Shard] -> the path of sizes.json, once all output tars are there.

    The shards are those of decisions/; one that the pool no longer has comes with an empty path. Each worker writes one
    output tar at a time: it merges at most `spread.most_copies` streams over input tars, so its memory holds as many
    samples and one shard's decisions for each. An output tar that is there already is not written again.

    Raises Disagreement where decisions/ and subset.npy do not say the same. A sample that the pool no longer holds, or
    holds with another image or caption, costs its output tar only; when all others are written, Incomplete is raised.
    """

    def __init__(
        self, layout: Layout, bounds: PoolBounds, subset: Subset, spread: Spread, folder: ReshardedFolder
    ) -> None:
        super().__init__()
        self._layout, self._bounds, self._subset = layout, bounds, subset
        self._spread, self._folder = spread, folder

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        return (
            shards
            | "Count samples" >> beam.Map(_count, self._layout)
            | "All counts" >> beam.combiners.ToList()
            | "Plan tars" >> beam.FlatMap(_plan, self._spread, self._subset)
            | "Spread tars" >> beam.Reshuffle()
            | "Write tar" >> beam.ParDo(_WriteTar(self._layout, self._bounds, self._spread, self._folder))
            | "All tars" >> beam.combiners.ToList()
            | "Check and write sizes" >> beam.Map(_finish, self._subset, self._folder)
        )


def _count(shard: Shard, layout: Layout) -> _CountedShard:
    shard = Shard(*shard)
    rows = tables.read_table(layout.decisions(shard.name), ["uid", "copies"])
    return _CountedShard(
        shard, sum(row["copies"] > 0 for row in rows), Tally.of((row["uid"], row["copies"]) for row in rows)
    )


def _plan(counted: list[_CountedShard], spread: Spread, subset: Subset) -> Iterator[_PlannedTar]:
    counted = sorted(counted, key=lambda one: one.shard.name)
    samples = [one.samples for one in counted]
    tally = sum((one.tally for one in counted), Tally())
    if (sum(samples), tally) != (subset.samples, subset.tally):
        raise Disagreement(
            f"decisions/ holds {sum(samples)} samples with {tally.rows} copies, subset.npy {subset.samples} with "
            f"{subset.tally.rows}, or others; both must come from one finished run over one pool: run it again"
        )
    for tar in range(spread.tars):
        parts = segments(spread.stretches(tar), samples)
        yield _PlannedTar(tar, tuple(_PlannedSegment(counted[part.shard].shard, part) for part in parts))


class _WriteTar(beam.DoFn):
    def __init__(self, layout: Layout, bounds: PoolBounds, spread: Spread, folder: ReshardedFolder) -> None:
        self._layout, self._bounds, self._spread, self._folder = layout, bounds, spread, folder

    def process(self, planned: _PlannedTar) -> Iterator[_Outcome]:
        path = self._folder.tar(planned.index)
        try:
            if files.exists(path):
                uids = [row["uid"] for part in planned.segments for _, row in self._decisions(part)]
            else:
                uids = self._write(path, planned)
        except _Changed as error:
            yield _Outcome(planned.index, Tally(), str(error))
        else:
            yield _Outcome(planned.index, Tally.of((uid, 1) for uid in uids))

    def _write(self, path: str, planned: _PlannedTar) -> list[str]:
        """The uids of the rows written."""
        uids = []
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(contextlib.closing(self._stream(list(parts))))
                for _, parts in itertools.groupby(planned.segments, key=lambda part: part.segment.copy)
            ]
            file = stack.enter_context(files.write_aside(path))
            # Of all formats the one without extended headers; uids and member sizes always fit into it.
            tar = stack.enter_context(tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT))
            for row in heapq.merge(*streams, key=operator.attrgetter("position", "sample")):
                _add(tar, row)
                uids.append(row.decision["uid"])
        return uids

    def _stream(self, parts: list[_PlannedSegment]) -> Generator[_Row, None, None]:
        """The rows of one copy, by position."""
        for part in parts:
            decisions = list(self._decisions(part))
            if not decisions:  # then the shard's tar need not even be there
                continue
            with contextlib.closing(_judged_members(part.shard, self._bounds, decisions)) as found:
                for (sample, decision), members in zip(decisions, found, strict=True):
                    position = self._spread.position(sample, part.segment.copy)
                    yield _Row(position, sample, part.segment.copy, decision, members)

    def _decisions(self, part: _PlannedSegment) -> Iterator[tuple[int, dict[str, Any]]]:
        """(the sample's number, its decision) for those of a segment that have the segment's copy."""
        columns = ["uid", "key", "caption", "image_sha256", "copies"]
        rows = tables.read_table(self._layout.decisions(part.shard.name), columns)
        segment = part.segment
        numbered = enumerate((row for row in rows if row["copies"] > 0), segment.first)
        for sample, row in itertools.islice(numbered, segment.start - segment.first, segment.stop - segment.first):
            if row["copies"] > segment.copy:
                yield sample, row


def _judged_members(
    shard: Shard, bounds: PoolBounds, decisions: list[tuple[int, dict[str, Any]]]
) -> Generator[Members, None, None]:
    """The files of each sample, read in one pass that ends with the last. Raises _Changed."""
    if not shard.path:
        raise _Changed(f"shard {shard.name}, key {decisions[0][1]['key']!a}: the pool no longer has that shard")
    found = read_members(shard.path, bounds)
    for _, decision in decisions:
        key = decision["key"]
        try:
            members = next((members for members in found if members.key == key), None)
        except BrokenTar as error:
            raise _Changed(f"shard {shard.name}, key {key!a}: the tar is broken {error}") from error
        fault = _fault(members, decision)
        if members is None or fault:
            raise _Changed(f"shard {shard.name}, key {key!a}: {fault}")
        yield members


def _fault(members: Members | None, decision: dict[str, Any]) -> str | None:
    """What is no longer as it was judged; None where all is."""
    if members is None:
        return "not in the tar any more, or at another place"
    if members.fault:
        return f"{members.fault[0]}: {members.fault[1]}"
    if members.image is None or members.caption is None:
        return "has no image or no caption any more"
    if hashlib.sha256(members.image).hexdigest() != decision["image_sha256"]:
        return "has another image than the one that was judged"
    if members.caption != decision["caption"].encode():
        return "has another caption than the one that was judged"
    return None


def _add(tar: tarfile.TarFile, row: _Row) -> None:
    members = row.members
    contents = {members.image_extension: members.image, "txt": members.caption, "json": members.metadata}
    for extension, content in contents.items():
        if content is not None:
            info = tarfile.TarInfo(f"{row.decision['uid']}-{row.copy}.{extension}")  # its mtime and owner are 0
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _finish(outcomes: list[_Outcome], subset: Subset, folder: ReshardedFolder) -> str:
    outcomes = sorted(outcomes, key=lambda outcome: outcome.index)
    faults = [f"{folder.tar_name(outcome.index)}: {outcome.fault}" for outcome in outcomes if outcome.fault]
    if faults:
        raise Incomplete(
            f"{len(faults)} of {len(outcomes)} tars could not be written, because the pool has changed since it was "
            f"judged ({'; '.join(faults[:_SHOWN_FAULTS])}); restore the pool and reshard again, which keeps the tars "
            "that are there, or run the changed pool and reshard into another folder"
        )
    tally = sum((outcome.tally for outcome in outcomes), Tally())
    if tally != subset.tally:
        raise Disagreement(f"the tars hold {tally.rows} rows, subset.npy {subset.tally.rows}, or of other samples")
    if not files.exists(folder.sizes):
        files.write_json(folder.sizes, {folder.tar_name(one.index): one.tally.rows for one in outcomes})
    return folder.sizes
