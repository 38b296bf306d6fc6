"""Tests of resharding: every copy once, copies far apart, file contents unchanged, and only complete tars."""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import json
import math
import os
import re
import shutil
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.report.progress import Progress
from pipeline.reshard import command as reshard_module
from pipeline.reshard import subset as subset_module
from pipeline.reshard import tars as resharded_module
from pipeline.reshard.command import reshard
from pipeline.reshard.copy_placement import CopyPlacement, split_by_shard
from pipeline.reshard.subset import SubsetChecksum, read_subset
from pipeline.sinks.subset import subset_rows
from pipeline.sources.pool import list_shards
from pipeline.sources.webdataset import read_samples
from tests.helpers import BOUNDS, Members, least_apart, recipe, sample_members, tar_bytes, uid, write_pool
from transforms.core.records import Sample
from transforms.storage import files

DEMO_POOL = importlib.resources.files("pipeline") / "demo" / "pool"


# Copy placement ---------------------------------------------------------------------------------------------------

Row = tuple[int, int]  # sample, copy
COPIES = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=80)


def rows_of_tar(placement: CopyPlacement, copies: Sequence[int], tar: int) -> list[Row]:
    rows = [
        (sample, range_.copy)
        for range_ in placement.ranges(tar)
        for sample in range(range_.start, range_.stop)
        if copies[sample] > range_.copy
    ]
    return sorted(rows, key=lambda row: (placement.position(*row), row[0]))


def planned(copies: Sequence[int], samples_per_shard: int) -> tuple[CopyPlacement, list[list[Row]]]:
    placement = CopyPlacement.plan(len(copies), max(copies), sum(copies), samples_per_shard)
    return placement, [rows_of_tar(placement, copies, tar) for tar in range(placement.tars)]


@given(COPIES, st.integers(1, 30))
def test_positions_follow_the_formula(copies: list[int], samples_per_shard: int) -> None:
    _, tars = planned(copies, samples_per_shard)
    expected: list[list[tuple[Fraction, Row]]] = [[] for _ in tars]
    for sample, count in enumerate(copies):
        for copy in range(count):
            position = (Fraction(sample, len(copies)) + Fraction(copy, max(copies))) % 1
            expected[math.floor(position * len(tars))].append((position, (sample, copy)))
    assert tars == [[row for _, row in sorted(tar)] for tar in expected]


@given(COPIES, st.integers(1, 30))
def test_copies_are_at_least_the_stated_distance_apart(copies: list[int], samples_per_shard: int) -> None:
    placement, tars = planned(copies, samples_per_shard)
    rows = [row for tar in tars for row in tar]
    assert least_apart((sample, index) for index, (sample, _) in enumerate(rows)) >= placement.least_rows_apart
    found = least_apart((sample, index) for index, tar in enumerate(tars) for sample, _ in tar)
    assert found >= placement.least_tars_apart >= 1


@given(COPIES, st.integers(1, 30))
def test_no_tar_is_empty_and_the_average_size_is_as_requested(copies: list[int], samples_per_shard: int) -> None:
    placement, tars = planned(copies, samples_per_shard)
    assert all(tars)
    wanted = math.ceil(sum(copies) / samples_per_shard)
    if max(copies) <= wanted <= len(copies):
        assert placement.tars == wanted


@given(COPIES, st.integers(1, 30))
def test_samples_of_one_copy_are_consecutive_except_for_one_wrap(copies: list[int], samples_per_shard: int) -> None:
    placement, tars = planned(copies, samples_per_shard)
    for tar in range(len(tars)):
        per_copy = Counter(range_.copy for range_ in placement.ranges(tar))
        assert max(per_copy.values()) <= 2
        for copy, ranges in itertools.groupby(placement.ranges(tar), key=lambda range_: range_.copy):
            numbers = [sample for range_ in ranges for sample in range(range_.start, range_.stop)]
            positions = [placement.position(sample, copy) for sample in numbers]
            assert positions == sorted(set(positions))


@pytest.mark.parametrize(
    ("copies", "rows_apart", "tars_apart"),
    [([7], 1, 1), ([2, 1, 1], 2, 1), ([5] + [1] * 99, 20, 2), ([1] * 60 + [4] + [1] * 2, 16, 1)],
)
def test_distance_bound_is_tight(copies: list[int], rows_apart: int, tars_apart: int) -> None:
    placement, tars = planned(copies, 10)
    assert (placement.least_rows_apart, placement.least_tars_apart) == (rows_apart, tars_apart)
    rows = [row for tar in tars for row in tar]
    assert least_apart((sample, index) for index, (sample, _) in enumerate(rows)) == rows_apart
    assert least_apart((sample, index) for index, tar in enumerate(tars) for sample, _ in tar) == tars_apart


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(1, 5), st.integers(1, 9))
def test_split_by_shard_splits_ranges_at_shard_boundaries(shards: list[int], most: int, per_shard: int) -> None:
    placement = CopyPlacement.plan(sum(shards), most, sum(shards) * most, per_shard)
    home = [(shard, index) for shard, count in enumerate(shards) for index in range(count)]
    for tar in range(placement.tars):
        expected = [
            (range_.copy, *home[sample])
            for range_ in placement.ranges(tar)
            for sample in range(range_.start, range_.stop)
        ]
        found = [
            (part.copy, part.shard, sample - part.first)
            for part in split_by_shard(placement.ranges(tar), shards)
            for sample in range(part.start, part.stop)
        ]
        assert found == expected


# Reading the subset -----------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(0, 2**128 - 1).map(uid), st.integers(1, 9), max_size=30), st.integers(1, 7))
def test_subset_is_read_in_chunks(
    tmp_path_factory: pytest.TempPathFactory, copies: dict[str, int], read_rows: int
) -> None:
    path = str(tmp_path_factory.mktemp("subset") / "subset.npy")
    np.save(path, subset_rows(copies.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subset_module, "_READ_ROWS", read_rows)
        subset = read_subset(path)
    assert (subset.samples, subset.most_copies) == (len(copies), max(copies.values(), default=0))
    assert (
        subset.checksum
        == SubsetChecksum.of(copies.items())
        == sum(map(SubsetChecksum.of, [[pair] for pair in copies.items()]), SubsetChecksum())
    )
    assert subset.checksum.rows == sum(copies.values())


# The subset of a run ----------------------------------------------------------------------------------------------


def finished_run(output: Path, pool: Path, copies_of: Callable[[str], int]) -> None:
    """Write the outputs of a run over `pool`, with copies chosen by the test."""
    layout, chosen = Layout(str(output)), []
    for shard in list_shards(str(pool)):
        rows = []
        for sample in read_samples(shard, BOUNDS, "test"):
            if isinstance(sample, Sample):
                row = tables.annotation_row(sample.annotation)
                row["image_sha256"] = hashlib.sha256(sample.image_bytes).hexdigest()
                row["copies"] = copies_of(row["uid"])
                chosen.append((row["uid"], row["copies"]))
                rows.append(row)
        tables.write_table(layout.decisions(shard.name), rows, tables.decisions_schema(recipe()))
    np.save(layout.subset, subset_rows(chosen))
    files.write_json(layout.manifest, {"recipe": recipe().model_dump()})


def skewed(uid_: str) -> int:
    return (0, 1, 1, 2, 6)[int(uid_, 16) % 5]


def run_reshard(run: Path, pool: Path, output: Path, *beam_options: str) -> None:
    reshard(str(run), str(pool), str(output), 100, list(beam_options), Progress(Console(stderr=True)))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tars(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if name.endswith(".tar")}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        found = [(info.name, tar.extractfile(info)) for info in tar]
        assert len(dict(found)) == len(found)
        return {name: file.read() for name, file in found if file}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool") / "pool"
    shutil.copytree(str(DEMO_POOL), folder)
    return folder


@pytest.fixture(scope="module")
def run(pool: Path) -> Path:
    finished_run(pool.parent / "out", pool, skewed)
    return pool.parent / "out"


@pytest.fixture(scope="module")
def resharded(pool: Path, run: Path) -> Path:
    run_reshard(run, pool, pool.parent / "tars")
    return pool.parent / "tars"


def test_rows_by_uid_are_the_subset(run: Path, resharded: Path) -> None:
    keys = [name.partition(".")[0] for name in sorted(tars(resharded)) for name in members(resharded / name)]
    found = Counter(key.partition("-")[0] for key in set(keys))
    subset = Counter(f"{int(high):016x}{int(low):016x}" for high, low in np.load(run / "subset.npy"))
    assert found == subset
    assert max(subset.values()) == 6
    assert set(keys) == {f"{uid_}-{copy}" for uid_, count in subset.items() for copy in range(count)}


def test_rows_are_in_the_order_of_the_placement(pool: Path, run: Path, resharded: Path) -> None:
    layout = Layout(str(run))
    shards = [tables.read_table(layout.decisions(shard.name)) for shard in list_shards(str(pool))]
    chosen = [row for rows in shards for row in rows if row["copies"]]
    _, expected = planned([row["copies"] for row in chosen], 100)
    found = {
        name: list(dict.fromkeys(member.partition(".")[0] for member in members(resharded / name)))
        for name in tars(resharded)
    }
    assert found == {
        f"{index:05d}.tar": [f"{chosen[sample]['uid']}-{copy}" for sample, copy in rows]
        for index, rows in enumerate(expected)
    }


def test_files_are_identical_to_those_of_the_pool(pool: Path, resharded: Path) -> None:
    originals: dict[str, dict[str, bytes]] = {}
    for shard in list_shards(str(pool)):
        with tarfile.open(shard.path) as tar:
            by_key: dict[str, dict[str, bytes]] = defaultdict(dict)
            for info in tar:
                key, _, extension = info.name.partition(".")
                by_key[key][extension] = tar.extractfile(info).read()  # type: ignore[union-attr]
        for sample in read_samples(shard, BOUNDS, "test"):
            if isinstance(sample, Sample):
                originals[sample.annotation.uid] = by_key[sample.annotation.key]
    found: dict[str, dict[str, bytes]] = defaultdict(dict)
    for name in tars(resharded):
        for member, content in members(resharded / name).items():
            key, _, extension = member.partition(".")
            found[key][extension] = content
    assert found
    assert all(content == originals[key.partition("-")[0]] for key, content in found.items())


def test_resharded_tars_are_read_without_dead_letters(run: Path, resharded: Path) -> None:
    found = [sample for shard in list_shards(str(resharded)) for sample in read_samples(shard, BOUNDS, "test")]
    assert all(isinstance(sample, Sample) for sample in found)
    assert len(found) == len(np.load(run / "subset.npy"))


def test_copies_in_the_tars_are_far_apart(run: Path, resharded: Path) -> None:
    rows = [
        (sample.annotation.uid, index)
        for index, shard in enumerate(list_shards(str(resharded)))
        for sample in read_samples(shard, BOUNDS, "test")
        if isinstance(sample, Sample)
    ]
    subset = read_subset(str(run / "subset.npy"))
    placement = CopyPlacement.plan(subset.samples, subset.most_copies, subset.checksum.rows, 100)
    assert placement.least_rows_apart > 100
    assert least_apart((uid_, row) for row, (uid_, _) in enumerate(rows)) >= placement.least_rows_apart
    assert least_apart(rows) >= placement.least_tars_apart >= 2


def test_names_sizes_and_headers(resharded: Path) -> None:
    sizes = json.loads((resharded / "sizes.json").read_text())
    assert list(sizes) == sorted(tars(resharded))
    assert list(sizes)[:2] == ["00000.tar", "00001.tar"]
    assert sizes == {name: len({m.partition(".")[0] for m in members(resharded / name)}) for name in sizes}
    assert 50 < sum(sizes.values()) / len(sizes) <= 100
    with tarfile.open(resharded / "00000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname) for info in tar} == {(0, 0, 0, "")}


def test_bytes_do_not_depend_on_worker_processes_or_the_order_of_shards(
    pool: Path, run: Path, resharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_reshard(run, pool, tmp_path / "two", "--direct_num_workers=2", "--direct_running_mode=multi_processing")
    assert tree(tmp_path / "two") == tree(resharded)
    create = beam.Create
    monkeypatch.setattr(beam, "Create", lambda shards: create(shards[::-1]))
    run_reshard(run, pool, tmp_path / "reversed")
    assert tree(tmp_path / "reversed") == tree(resharded)


def test_rerun_writes_nothing_and_opens_no_tar(
    pool: Path, run: Path, resharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a tar was opened or a file written")

    with monkeypatch.context() as patch:
        patch.setattr(reshard_module, "pipeline_of", refuse)
        patch.setattr(files, "write_aside", refuse)
        run_reshard(run, pool, resharded)
    missing = sorted(tars(resharded))[1]
    before = tree(resharded)
    (resharded / missing).unlink()
    written = {path.name: path.stat().st_mtime_ns for path in resharded.iterdir()}
    run_reshard(run, pool, resharded)
    assert tree(resharded) == before
    assert {name: (resharded / name).stat().st_mtime_ns for name in written} == written


# Errors -----------------------------------------------------------------------------------------------------------


def small_pool(folder: Path, shards: int = 3, samples: int = 8) -> dict[str, Members]:
    content = {
        f"{shard}.tar": [
            file
            for number in range(samples)
            for file in sample_members(f"k{number}", f"caption {shard} {number}", seed=8 * shard + number)
        ]
        for shard in range(shards)
    }
    write_pool(folder, content)
    return content


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small pool and its finished run: 24 samples, the last one of shard 1 with two copies."""
    small_pool(tmp_path / "pool")
    twice = [s for s in read_samples(list_shards(str(tmp_path / "pool"))[1], BOUNDS, "test") if isinstance(s, Sample)]
    finished_run(tmp_path / "out", tmp_path / "pool", lambda uid_: 1 + (uid_ == twice[-1].annotation.uid))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pairsift(*more: str, out: str = "out", pool: str = "pool", output: str = "tars", per_shard: int = 5) -> Result:
    arguments = ["reshard", out, "--input", pool, "--output", output, "--samples-per-shard", str(per_shard)]
    return CliRunner().invoke(app, [*arguments, *more])


def test_output(place: Path) -> None:
    events = [json.loads(line) for line in pairsift("--json").stdout.splitlines()]
    assert [event["event"] for event in events] == ["stage_done", "done"]
    assert events[0]["message"].startswith("reshard: 5/5 tars")
    assert events[1] == {
        "event": "done", "output": "tars", "samples": 24, "copies": 25, "tars": 5, "least_rows_apart": 12,
        "least_tars_apart": 2,
    }  # fmt: skip
    result = pairsift()
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "tars: 25 copies of 24 samples in 5 tars",
        "copies of one sample are at least 12 rows apart; the numbers of their tars differ by at least 2",
    ]


def test_output_without_repeated_samples(place: Path) -> None:
    finished_run(place / "out", place / "pool", lambda uid_: 1)
    assert "no sample occurs twice" in pairsift().stdout


def error_of(result: Result) -> str:
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def only_complete_tars(folder: Path) -> set[str]:
    """Return the tars, after checking that the folder has no other files than those needed to resume."""
    found = set(tars(folder))
    assert tree(folder).keys() == found | {"reshard.json", *(f".places/{shard}.parquet" for shard in range(3))}
    return found


def test_changed_samples_affect_only_their_own_tars(place: Path) -> None:
    assert pairsift(output="complete", per_shard=1).exit_code == 0
    changed = {"k1.jpg": sample_members("x", seed=99)[0][1], "k2.txt": b"other"}
    content = [
        (name, changed.get(name, file))
        for name, file in small_pool(place / "pool")["1.tar"]
        if name != "k3.jpg" and not name.startswith("k4.")
    ]
    (place / "pool" / "1.tar").write_bytes(tar_bytes([*content, ("k7.png", b"x")]))
    message = error_of(pairsift(per_shard=1))
    assert "6 of 24 tars could not be written" in message  # k7 has two copies
    for named in (
        "shard 1, key 'k1': the image has changed since the run",
        "shard 1, key 'k2': the caption has changed since the run",
        "shard 1, key 'k3': no longer has an image and a caption",
        "shard 1, key 'k4': no longer in the tar",
        "shard 1, key 'k7': duplicate_member: a second image: k7.png",
    ):
        assert named in message
    assert len(only_complete_tars(place / "tars")) == 18

    small_pool(place / "pool")  # restores the pool
    assert pairsift(per_shard=1).exit_code == 0
    assert tree(place / "tars") == tree(place / "complete")


def test_samples_that_moved_within_their_tar(place: Path) -> None:
    assert pairsift(output="complete").exit_code == 0
    content = small_pool(place / "pool")["1.tar"]
    (place / "pool" / "1.tar").write_bytes(tar_bytes([*content[12:], *content[:12]]))
    assert pairsift().exit_code == 0
    assert tree(place / "tars") == tree(place / "complete")


def test_tar_that_changes_during_resharding(place: Path) -> None:
    (place / "pool" / "2.tar").rename(place / "2.tar")
    assert "no longer in the pool" in error_of(pairsift(per_shard=1))  # finds the offsets of the other shards
    (place / "2.tar").rename(place / "pool" / "2.tar")
    (place / "tars" / "00009.tar").unlink()
    path = place / "pool" / "1.tar"
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b"caption 1 1", b"CAPTION 1 1"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    message = error_of(pairsift(per_shard=1))
    assert "00009.tar: shard 1, key 'k1': the txt has changed while this command was running" in message
    assert len(only_complete_tars(place / "tars")) == 23


def test_truncated_tar(place: Path) -> None:
    content = (place / "pool" / "1.tar").read_bytes()
    (place / "pool" / "1.tar").write_bytes(content[: len(content) // 2])
    message = error_of(pairsift(per_shard=1))
    assert re.search(r"shard 1, key 'k[34]': the tar is damaged at byte \d+", message)
    assert {"00007.tar", "00016.tar"} <= only_complete_tars(place / "tars")  # tars of the shards before and after


def test_missing_shard(place: Path) -> None:
    (place / "pool" / "1.tar").unlink()
    message = error_of(pairsift(per_shard=1))
    assert "9 of 24 tars could not be written" in message
    assert "shard 1, key 'k0': the shard is no longer in the pool" in message
    assert len(only_complete_tars(place / "tars")) == 15


def test_missing_shard_without_selected_samples(place: Path) -> None:
    gone = {s.annotation.uid for s in read_samples(list_shards("pool")[1], BOUNDS, "test") if isinstance(s, Sample)}
    finished_run(place / "out", place / "pool", lambda uid_: int(uid_ not in gone))
    (place / "pool" / "1.tar").unlink()
    assert pairsift().exit_code == 0
    assert sum(json.loads((place / "tars" / "sizes.json").read_text()).values()) == 16


def test_decisions_that_do_not_match_the_subset(place: Path) -> None:
    subset = np.load("out/subset.npy")
    others = subset.copy()
    others["f1"][0] += 1
    for rows in (subset[1:], np.r_[subset, subset[-1:]], others):
        np.save("out/subset.npy", rows)
        result = pairsift(output=f"tars{len(rows)}")
        assert result.exit_code == 1
        assert "both must come from the same finished run" in " ".join(result.stderr.split())
        assert not tars(place / f"tars{len(rows)}")
        shutil.rmtree(place / f"tars{len(rows)}")


def test_row_that_is_not_written_is_detected(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_the_first(*arguments: Any) -> Any:
        return itertools.islice(split_by_shard(*arguments), 1, None)

    monkeypatch.setattr(resharded_module, "split_by_shard", without_the_first)
    assert "subset.npy holds 25, or rows of different samples" in error_of(pairsift())
    assert only_complete_tars(place / "tars")


def wrong_use(place: Path, message: str, *more: str, **changes: Any) -> None:
    before = tree(place)
    result = pairsift(*more, **changes)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert tree(place) == before


def test_wrong_use(place: Path) -> None:
    wrong_use(place, "out2: holds no finished run", out="out2")
    wrong_use(place, "nowhere: contains no *.tar", pool="nowhere")
    wrong_use(place, "is inside the pool", output="pool/tars")
    wrong_use(place, "is inside the pool", output="pool")
    wrong_use(place, "is inside the pool", pool="pool/**.tar", output="pool/tars")
    wrong_use(place, "is inside the pool", pool="*/*.tar")
    wrong_use(place, "out: is not empty and holds no run of pairsift", output="out")
    wrong_use(place, "foo:// is not supported", output="foo://x")
    wrong_use(place, "--samples-per-shard", per_shard=0)
    wrong_use(place, "No such option", "--jsn")
    assert pairsift().exit_code == 0
    wrong_use(place, "tars: holds another run (it differs in tars)", per_shard=24)
    finished_run(place / "out", place / "pool", lambda uid_: 1)
    wrong_use(place, "it differs in copies, decisions_sha256, most_copies, subset_sha256")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(0, "u8,u8"), "the training subset of this run is empty"),
        (np.zeros(3, "u8"), "not rows of u8,u8"),
        (np.zeros((3, 3), "u8,u8"), "not rows of u8,u8"),
        (np.array([{}], object), "not rows of u8,u8"),
    ],
)
def test_invalid_subset(place: Path, content: np.ndarray, message: str) -> None:
    np.save("out/subset.npy", content)
    wrong_use(place, message)


def test_truncated_subset(place: Path) -> None:
    subset = (place / "out" / "subset.npy").read_bytes()
    for length in (len(subset) - 16, len(subset) - 5, 100, 4, 0):
        (place / "out" / "subset.npy").write_bytes(subset[:length])
        wrong_use(place, "out: holds no finished run")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"recipe": {"pool": {"max_image_bytes": -1}}}'])
def test_run_with_an_invalid_manifest(place: Path, content: str) -> None:
    (place / "out" / "manifest.json").write_text(content)
    wrong_use(place, "out: holds no finished run")
