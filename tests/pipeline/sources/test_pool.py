"""Tests of the listing of a pool: which tars it has and how each is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.output_folder.layout import Layout
from pipeline.sources.pool import NoShards, list_shards
from pipeline.sources.webdataset import read_samples
from tests.helpers import BOUNDS, sample_members, tar_bytes, write_pool
from transforms.core.records import Sample, Shard
from transforms.storage import files


def test_shards_are_sorted_and_named_after_their_escaped_path(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    names = ["00001.tar", "00000.tar", "sub/00000.tar", "sub/deep er/ü%.tar", "a..b.tar"]
    write_pool(pool, {name: [] for name in names})
    (pool / "notes.txt").write_text("x")
    (pool / "00002.tar.gz").write_text("x")
    shards = list_shards(str(pool))
    assert [shard.name for shard in shards] == [
        "00000", "00001", "a..b", "sub%2F00000", "sub%2Fdeep%20er%2F%C3%BC%25"
    ]  # fmt: skip
    assert all("/" not in shard.name and Path(shard.path).is_file() for shard in shards)


@pytest.mark.parametrize("name", ["...tar", "..tar", ".tar", "x/...tar"])
def test_no_shard_is_named_like_a_folder(tmp_path: Path, name: str) -> None:
    shards = write_pool(tmp_path / "pool", {name: []})
    layout = Layout(str(tmp_path / "out"))
    for shard in shards:
        for path in (
            layout.single_modality(shard.name), layout.pool_wide(shard.name), layout.cross_modality(shard.name),
            layout.dead_letters("s", shard.name), layout.decisions(shard.name), layout.progress("s", shard.name),
            layout.in_progress("s", shard.name),
        ):  # fmt: skip
            resolved = Path(os.path.normpath(path))
            assert resolved.is_relative_to(tmp_path / "out")
            assert resolved.name == path.rsplit("/", 1)[1] != ""


def test_long_tar_path_gives_a_valid_file_name(tmp_path: Path) -> None:
    names = [f"{'x' * 100}/{'y' * 100}/{'z' * n}.tar" for n in (100, 101)] + ["\u4e2d" * 80 + ".tar"]
    shards = write_pool(tmp_path / "pool", {name: [] for name in names})
    layout = Layout(str(tmp_path / "out"))
    assert len({shard.name for shard in shards}) == 3
    for shard in shards:
        for path in (layout.cross_modality(shard.name), layout.dead_letters("single_modality", shard.name)):
            files.write_bytes(path, b"x")


def test_shard_names_do_not_depend_on_the_form_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["00000.tar", "sub/00001.tar"]
    write_pool(tmp_path / "pool", {name: [] for name in names})
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path)
    expected = [shard.name for shard in list_shards(str(tmp_path / "pool"))]
    assert expected == ["00000", "sub%2F00001"]
    for pool in ("pool", "pool/", "./pool", "./pool/", "beside/../pool", "pool//", f"{tmp_path}/./pool",
                 f"{tmp_path}/pool/", "pool/**.tar", f"{tmp_path}/pool/**.tar"):  # fmt: skip
        assert [shard.name for shard in list_shards(pool)] == expected, pool
    monkeypatch.chdir(tmp_path / "pool")
    for pool in (".", "./", "../pool", "**.tar", "./**.tar"):
        assert [shard.name for shard in list_shards(pool)] == expected, pool


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = tmp_path / "pool"
    write_pool(pool, {name: [] for name in ("a0.tar", "a1.tar", "b0.tar", "x/a2.tar", "y/a3.tar")})
    monkeypatch.chdir(tmp_path)
    for start in (str(pool), "pool", "./pool"):
        assert [s.name for s in list_shards(f"{start}/a*.tar")] == ["a0", "a1"]
        assert [s.name for s in list_shards(f"{start}/a1.tar")] == ["a1"]
        assert [s.name for s in list_shards(f"{start}/*/a*.tar")] == ["x%2Fa2", "y%2Fa3"]
        assert [s.name for s in list_shards(f"{start}/[xy]/a*.tar")] == ["x%2Fa2", "y%2Fa3"]


def test_folder_name_with_pattern_characters(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", {"a.tar": []})
    for name in ("po[o]l", "p*l", "p?ol"):
        odd = tmp_path / name
        (tmp_path / "pool").rename(odd)
        assert [shard.name for shard in list_shards(str(odd))] == ["a"], name
        odd.rename(tmp_path / "pool")


def test_a_backslash_is_part_of_a_name(tmp_path: Path) -> None:
    write_pool(tmp_path, {"a/b.tar": [], "a\\b.tar": []})
    assert sorted(shard.name for shard in list_shards(str(tmp_path))) == ["a%2Fb", "a%5Cb"]


def test_file_name_with_invalid_utf8(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    path = os.fsencode(pool) + b"/k\xff.tar"
    with open(path, "wb") as file:
        file.write(tar_bytes(sample_members("a")))
    (shard,) = list_shards(str(pool))
    assert shard.name == "k%FF"
    (sample,) = read_samples(shard, BOUNDS, "test")
    assert isinstance(sample, Sample) and sample.annotation.key == "a"


@pytest.mark.parametrize("pool", ["empty", "gone", "empty/*.tar", "gone.tar", ""])
def test_no_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoShards, match=r"no \*\.tar") as caught:
        list_shards(pool)
    assert pool in str(caught.value)


def test_fingerprint_changes_with_the_shard(tmp_path: Path) -> None:
    (before,) = write_pool(tmp_path, {"a.tar": sample_members("a")})
    assert list_shards(str(tmp_path)) == [before]
    status = os.stat(before.path)
    os.utime(before.path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    (touched,) = list_shards(str(tmp_path))
    assert touched.fingerprint != before.fingerprint
    (longer,) = write_pool(tmp_path, {"a.tar": [*sample_members("a"), *sample_members("b"), ("z", b"z" * 20000)]})
    assert longer.fingerprint not in (before.fingerprint, touched.fingerprint)


def test_shard_survives_json(tmp_path: Path) -> None:
    (shard,) = write_pool(tmp_path, {"a/b c.tar": []})
    assert Shard(*json.loads(json.dumps(shard))) == shard
