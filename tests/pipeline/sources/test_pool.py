"""Tests of the listing of a pool: which tars it has and how each is named."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.output_folder.layout import Layout
from pipeline.sources import pool_names
from pipeline.sources.pool import NoShards, dead_shard, list_shards
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


def no_shards(pool: str) -> str:
    with pytest.raises(NoShards) as caught:
        list_shards(pool)
    return str(caught.value)


@pytest.mark.parametrize("pool", ["empty", "empty/*.tar", "empty/gone.tar", "empty/{0..9}.tar"])
def test_a_folder_without_tars_is_told_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("0.parquet", "1.parquet", "2.parquet", "README"):
        (tmp_path / "empty" / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    message = no_shards(pool)
    assert message.startswith(f"{pool}: ") and "no *.tar" in message
    assert "3 .parquet, 1 without extension, 0 .tar" in message


@pytest.mark.parametrize("pool", ["gone", "gone/*.tar", "gone/0.tar", "gone/sub"])
def test_a_folder_that_does_not_exist_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = no_shards(pool)
    assert message.startswith(f"{pool}: contains no *.tar because gone")
    assert re.search(r"gone(/sub)? does not exist; check the path", message)


def test_what_is_no_folder_of_tars_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("x")
    assert no_shards("list.txt").startswith("list.txt: contains no *.tar because list.txt is not a folder")
    Path("a.tar.gz").write_bytes(b"x")
    for pool in ("a.tar.gz", "b.TGZ", "{0..9}.tar.bz2", "a.tar.zst"):
        assert no_shards(pool).startswith(f"{pool}: is a compressed tar, which is not read; decompress it")
    assert "1 .tar.gz" in no_shards(".") and "decompress" in no_shards(".")


def test_compressed_tars_beside_others_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "b.tar.gz").write_bytes(b"x")
    assert [shard.name for shard in write_pool(tmp_path, {"a.tar": []})] == ["a"]
    assert f"1 compressed tars are not read; decompress them: {tmp_path}/b.tar.gz" in caplog.text


# Several tars, folders and inputs ----------------------------------------------------------------------------------


def names(pool: str) -> list[str]:
    return [shard.name for shard in list_shards(pool)]


def test_braces_and_double_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pool(tmp_path / "pool", {f"{n:05d}.tar": [] for n in range(12)} | {"x/0.tar": [], "y/0.tar": []})
    monkeypatch.chdir(tmp_path)
    for start in ("pool", "./pool", str(tmp_path / "pool")):
        assert names(f"{start}/{{00000..00002}}.tar") == ["00000", "00001", "00002"]
        assert names(f"{start}/{{00000..00011..5}}.tar") == ["00000", "00005", "00010"]
        assert names(f"{start}/00010.tar::{start}/00003.tar") == ["00003", "00010"]
        assert names(f"{start}/{{00000,00007}}.tar::{start}/{{00007..00008}}.tar") == ["00000", "00007", "00008"]
        # The same names as in a run over the folder:
        assert names(f"{start}/{{x,y}}/*.tar") == names(f"{start}/{{x,y}}") == ["x%2F0", "y%2F0"]
    with monkeypatch.context() as inside:
        inside.chdir("pool")
        assert names("{00000..00001}.tar") == names("00000.tar::00001.tar") == ["00000", "00001"]


def test_characters_of_patterns_that_stand_for_themselves(tmp_path: Path) -> None:
    write_pool(tmp_path, {"a::b/{0..1}.tar": [], "a::b/c[1].tar": []})
    assert names(f"{tmp_path}/a::b") == ["%7B0..1%7D", "c%5B1%5D"]
    assert names(f"{tmp_path}/a::b/{{0..1}}.tar") == ["%7B0..1%7D"]
    assert names(f"{tmp_path}/a::b/c[1].tar") == ["c%5B1%5D"]


def test_names_of_several_inputs_are_unique_and_do_not_depend_on_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pool(tmp_path, {f"{place}/{n}.tar": [] for place in ("a", "b", "deep/a") for n in range(2)})
    monkeypatch.chdir(tmp_path)
    assert names("a::b") == names("b/::./a") == names(f"{tmp_path}/b::a::a") == ["a%2F0", "a%2F1", "b%2F0", "b%2F1"]
    assert names("a") == names("a::a") == ["0", "1"]
    found = names("a::b::deep/a")
    assert found == names("deep/a::a::b") and len(set(found)) == 6
    assert [name for name in found if name.startswith("b")] == ["b%2F0", "b%2F1"]
    assert all(re.fullmatch(r"a-[0-9a-f]{16}%2F[01]", name) for name in found if name.startswith("a"))


def test_a_tar_of_two_inputs_counts_once(tmp_path: Path) -> None:
    write_pool(tmp_path, {"a/0.tar": [], "a/b/1.tar": []})
    pool = f"{tmp_path}/a/b::{tmp_path}/a"
    assert names(pool) == ["a%2F0", "a%2Fb%2F1"]


def test_a_pool_has_one_form_whatever_the_order_and_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"{tmp_path}/a::{tmp_path}/b/{{0..9}}.tar::gs://x/y"
    assert pool_names.absolute("gs://x/y/::b/{0..9}.tar::a/") == expected == pool_names.absolute(expected)


def test_too_many_names_are_refused_at_once() -> None:
    assert "more than 1,000,000 names" in no_shards("{0..999999999999}.tar")
    assert "more than 1,000,000 names" in no_shards("{0..9999}" * 5 + ".tar")
    assert "nested" in no_shards("{a," * 99 + "}" * 99 + ".tar")


# Tars that are missing or cannot be read ----------------------------------------------------------------------------


def faults(pool: str | Path) -> dict[str, str]:
    return {shard.name: shard.fault for shard in list_shards(str(pool))}


def test_tars_of_a_range_or_of_stats_that_are_gone_are_dead_shards(tmp_path: Path) -> None:
    write_pool(tmp_path, {"0.tar": [], "2.tar": []})
    assert faults(f"{tmp_path}/{{0..2}}.tar") == {"0": "", "1": "missing_shard", "2": ""}
    (tmp_path / "7_stats.json").write_text('{"successes": 5}')
    (tmp_path / "8_stats.json").write_text('{"mean": 5}')  # not img2dataset's
    (tmp_path / "0_stats.json").write_text('{"successes": 0}')
    assert faults(tmp_path) == {"0": "", "2": "", "7": "missing_shard"}
    (tmp_path / "7.tar").write_bytes(tar_bytes([]))
    assert faults(tmp_path) == {"0": "", "2": "", "7": ""}


def test_links_pipes_and_sockets(tmp_path: Path) -> None:
    pool, elsewhere = tmp_path / "pool", tmp_path / "elsewhere"
    write_pool(elsewhere, {"e0.tar": [], "sub/e1.tar": []})
    write_pool(pool, {"0.tar": [], "real/1.tar": []})
    (pool / "linked").symlink_to(elsewhere)
    (pool / "again").symlink_to("real")  # the same folder under a second name
    (pool / "cycle").symlink_to(".")
    (elsewhere / "back").symlink_to(pool)
    (pool / "good.tar").symlink_to(elsewhere / "e0.tar")
    (pool / "gone.tar").symlink_to("nowhere")
    (pool / "gone_folder").symlink_to("nowhere")
    (pool / "gone.json").symlink_to("nowhere")
    (pool / "self.tar").symlink_to("self.tar")
    os.mkfifo(pool / "pipe.tar")
    os.mkfifo(pool / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound, monkeypatched_folder(pool):
        bound.bind("socket.tar")
    assert faults(pool) == {
        "0": "", "real%2F1": "", "linked%2Fe0": "", "linked%2Fsub%2Fe1": "", "good": "", "gone": "dangling_link",
        "gone_folder": "dangling_link", "self": "unreadable", "pipe": "not_a_file", "socket": "not_a_file",
    }  # fmt: skip
    assert faults(pool / "*.tar").keys() >= {"0", "good", "gone", "self", "pipe", "socket"}
    assert faults(pool / "pipe.tar") == {"pipe": "not_a_file"}


def test_links_that_multiply_end(tmp_path: Path) -> None:
    write_pool(tmp_path, {"39/x.tar": []})
    for level in range(39):
        (tmp_path / str(level)).mkdir()
        for link in "abc":
            (tmp_path / str(level) / link).symlink_to(f"../{level + 1}")
    assert names(str(tmp_path)) == ["39%2Fx"]


@contextlib.contextmanager
def monkeypatched_folder(folder: Path) -> Iterator[None]:
    """Work in a folder: the path of a socket has at most 108 characters."""
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


def test_a_dead_shard_has_a_name_a_message_and_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.tar").symlink_to("nowhere")
    (dead,) = list_shards(str(tmp_path))
    letter = dead_shard(dead, "single_modality")
    assert (letter.shard, letter.key, letter.reason) == ("a", "", "dangling_link")
    assert letter.message == f"{tmp_path}/a.tar: is a link to nothing"
    (tmp_path / "nowhere").write_bytes(tar_bytes([]))
    (alive,) = list_shards(str(tmp_path))
    assert alive.fault == "" and alive.fingerprint != dead.fingerprint


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
