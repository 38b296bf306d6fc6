"""A job on a cluster outlives its client: what it writes then changes nothing of the next run, nor is it published."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import graphs
from pipeline.output_folder import owner, tables, versions
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import write_listing
from pipeline.output_folder.pending import ShardTable
from pipeline.runners import supported
from pipeline.runs import claim
from pipeline.runs.stage import token_of
from pipeline.sinks.pool_wide import WritePoolWide, _Write
from pipeline.sinks.publication import NotHeld, Publication, publish
from pipeline.sinks.shard_tables import WriteShardTable
from tests.helpers import annotation
from transforms.core.errors import UsageError
from transforms.core.records import Sample, SampleBatch, Shard
from transforms.distribution_alignment.work_folder import WorkFolder
from transforms.storage import files

PUBLICATION = Publication({"seed": 0})
SHARD = Shard("s", "/pool/s.tar", "1")


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def begun(output: str, token: str) -> Layout:
    """A run that got the folder and began its results; its client was then killed."""
    layout = Layout(output, token=token)
    with contextlib.suppress(InterruptedError), claim.only_writer(layout):
        write_listing(layout, [SHARD])
        raise InterruptedError  # as a killed process, it leaves the owner
    return versions.begin(output, token)


def write_results(layout: Layout, content: bytes) -> None:
    files.write_json(layout.funnel, {"by": content.decode()})
    files.write_bytes(layout.subset, content)
    files.write_bytes(layout.decisions("s"), content)


def results(output: str) -> set[bytes]:
    return {Path(output, name).read_bytes() for name in ("subset.npy", "decisions/part-s.parquet")}


@pytest.mark.parametrize("token", ["", "b" * 16])
def test_a_job_that_goes_on_changes_nothing_of_the_next_run(output: str, token: str) -> None:
    """The next run is one of this machine (without a token), or another one on a cluster."""
    lost = begun(output, "a" * 16)
    theirs = begun(output, token)
    write_results(theirs, b"theirs")
    write_results(lost, b"lost")
    with pytest.raises(NotHeld, match=f"another run has taken over this folder from run {'a' * 16}"):
        publish(lost, PUBLICATION)
    assert not os.path.lexists(f"{output}/current")
    publish(theirs, PUBLICATION)
    assert results(output) == {b"theirs"}
    write_results(lost, b"lost again")
    with pytest.raises(NotHeld):
        publish(lost, PUBLICATION)
    assert results(output) == {b"theirs"}
    assert os.readlink(f"{output}/current") == f"versions/1{f'-{token}' if token else ''}"


def test_its_work_folder_is_its_own(output: str) -> None:
    lost, theirs, local = (begun(output, token) for token in ("a" * 16, "b" * 16, ""))
    folders = [layout.alignment_work for layout in (lost, theirs, local)]
    assert len(set(folders)) == 3
    left = WorkFolder(lost.alignment_work).tile(0, 0)
    files.write_bytes(left, b"left")
    with claim.only_writer(Layout(output)):  # the next run deletes what is left
        assert not files.exists(left)
    files.write_bytes(left, b"left")
    with pytest.raises(NotHeld):
        graphs._clear(0, WorkFolder(lost.alignment_work), lost, PUBLICATION)


def batch(number: int) -> SampleBatch:
    sample = Sample(annotation(shard="s", key=f"k{number}"), {}, b"")
    return SampleBatch(SHARD, 0, True, (sample,), due=(f"k{number}",))


def shard_table(layout: Layout) -> WriteShardTable:
    class Work:
        stage = "single_modality"

        def table(self, shard: Shard, rows: Any, letters: Any, halvings: Any) -> Any:
            return ShardTable(rows, letters, {}, halvings)

    writer = WriteShardTable(layout, Work(), Layout.single_modality, tables.single_modality_schema())
    writer.start_bundle()
    return writer


def test_its_tables_are_not_written(output: str) -> None:
    lost = begun(output, "a" * 16)
    list(shard_table(lost).process(batch(1)))  # no other run is there yet
    table = Path(lost.single_modality("s"))
    before = table.read_bytes()
    begun(output, "")
    with pytest.raises(NotHeld):
        list(shard_table(lost).process(batch(2)))
    assert table.read_bytes() == before
    group = ("s", {WritePoolWide.SHARDS: [None], WritePoolWide.ROWS: [], WritePoolWide.DEAD_LETTERS: []})
    with pytest.raises(NotHeld):
        list(_Write(lost, {}).process(group, 1))
    assert not Path(lost.pool_wide("s")).exists()


def test_a_run_that_ends_leaves_no_owner(output: str) -> None:
    layout = Layout(output, token="a" * 16)
    with claim.only_writer(layout):
        assert owner.owns(layout)
    assert not owner.owns(layout)
    assert not Path(layout.owner).exists()


def test_a_late_retry_of_publishing_changes_nothing(output: str) -> None:
    layout = begun(output, "a" * 16)
    write_results(layout, b"first")
    publish(layout, PUBLICATION)
    begun(output, "")
    publish(layout, PUBLICATION)  # it had been published: no error
    assert results(output) == {b"first"}


def test_the_owner_of_a_killed_run_does_not_make_a_folder_another_s(output: str) -> None:
    layout = Layout(output, token="a" * 16)
    owner.take(layout)
    claim.check_pool(layout, "/pool")
    files.write_bytes(f"{output}/other.txt", b"")
    with pytest.raises(UsageError, match="is not empty"):
        claim.check_pool(layout, "/pool")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], False),
        (["--direct_num_workers=2", "--direct_running_mode=multi_processing"], False),
        (["--runner=PortableRunner", "--job_endpoint=embed"], False),
        (["--runner=PortableRunner", "--job_endpoint=localhost:8099"], True),
        (["--runner=FlinkRunner"], True),
        (["--runner=SparkRunner"], True),
        (["--runner=DataflowRunner"], True),
    ],
)
def test_which_jobs_may_outlive_their_client(options: list[str], expected: bool) -> None:
    assert supported.may_outlive_client(options) is expected
    assert bool(token_of(options)) is expected
    assert token_of(options) != token_of(options) or not expected


def test_versions_with_and_without_tokens(output: str) -> None:
    for token in ("a" * 16, "", "b" * 16, "c" * 16):
        layout = versions.begin(output, token)
        write_results(layout, token.encode())
        files.write_json(layout.manifest, {})
        versions.switch(layout)
    unfinished = versions.begin(output, "d" * 16)
    write_results(unfinished, b"")
    assert Path(unfinished.results).name == f"5-{'d' * 16}"
    versions.prune(layout, 2)
    assert set(os.listdir(f"{output}/versions")) == {f"3-{'b' * 16}", f"4-{'c' * 16}", f"5-{'d' * 16}"}
    assert versions.newest(output).results == layout.results
    versions.prune(layout, 1)
    assert set(os.listdir(f"{output}/versions")) == {f"4-{'c' * 16}", f"5-{'d' * 16}"}
    assert json.loads(Path(output, "manifest.json").read_text()) == {}


def test_layouts_without_a_token_are_as_ever(output: str) -> None:
    plain = Layout(output)
    assert plain.alignment_work == f"{output}/.distribution_alignment"
    assert plain.select_work == f"{output}/.select"
    assert dataclasses.replace(plain, token="a").select_work == f"{output}/.select/a"
    assert owner.owns(plain)
