"""Tests of files in Cloud Storage: objects appear only when complete, and operations take few requests."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.sources.pool import NoShards, list_shards
from tests.cloud_storage.server import CloudStorage, Request
from transforms.storage import files
from transforms.storage.local_copies import local_copy
from transforms.storage.steady_reader import SteadyReader


def is_write(request: Request) -> bool:
    return request.kind == "write"


def write_half(path: str, error: type[BaseException]) -> None:
    with files.write_aside(path) as file:
        file.write(b"half")
        file.close()
        raise error


@pytest.mark.parametrize("size_bytes", [0, 1, 2**18, 9 * 2**20, 33 * 2**20 + 1])
def test_written_bytes_can_be_read(store: CloudStorage, bucket: str, size_bytes: int) -> None:
    path, content = f"gs://{bucket}/a/b [1]/ü%2F.bin", os.urandom(size_bytes)
    files.write_bytes(path, content)
    assert files.read_bytes(path) == content
    assert store.names(bucket) == ["a/b [1]/ü%2F.bin"]  # no temporary object, and none was renamed


def test_small_file_takes_one_request(store: CloudStorage, bucket: str) -> None:
    store.asked.clear()
    files.write_bytes(f"gs://{bucket}/a", b"x" * 2**20)
    assert store.asked == {"write": 1}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_crash_leaves_the_old_object(store: CloudStorage, bucket: str, error: type[BaseException]) -> None:
    for name, before in (("old", b"old"), ("new", None)):
        if before:
            store.put(bucket, name, before)
        with pytest.raises(error):
            write_half(f"gs://{bucket}/{name}", error)
    assert store.names(bucket) == ["old"]
    assert files.read_bytes(f"gs://{bucket}/old") == b"old"


def test_failed_write_leaves_no_table(store: CloudStorage, bucket: str) -> None:
    with pytest.raises(pa.ArrowInvalid):
        tables.write_table(
            f"gs://{bucket}/t.parquet", [{"uid": "a", "pool_samples": "many"}], tables.pool_wide_schema()
        )
    assert store.names(bucket) == []


def test_object_appears_only_when_complete(store: CloudStorage, bucket: str) -> None:
    content = os.urandom(40 * 2**20)
    last = store.pause(lambda request: is_write(request) and request.headers.get("content-range", "*")[-1] != "*")
    writer = threading.Thread(target=files.write_bytes, args=(f"gs://{bucket}/big", content))
    writer.start()
    assert last.reached.wait(30)
    assert store.names(bucket) == []
    last.resume()
    writer.join()
    assert files.read_bytes(f"gs://{bucket}/big") == content


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("status", [503, 429, 500])
def test_temporary_errors_are_retried(store: CloudStorage, bucket: str, status: int, done: bool) -> None:
    store.fail(is_write, status, done=done)
    files.write_bytes(f"gs://{bucket}/a", b"content")
    assert files.read_bytes(f"gs://{bucket}/a") == b"content"


def test_missing_write_permission_says_what_to_do(store: CloudStorage, bucket: str) -> None:
    path = f"gs://{bucket}/a"
    store.fail(is_write, 403)
    expected = f"{path}: cannot be written: HTTP status 403: told to fail; allow this user to write there"
    with pytest.raises(files.WriteFailed, match=re.escape(expected)):
        files.write_bytes(path, b"")
    with pytest.raises(files.WriteFailed, match="gs://no-such/a: cannot be written: HTTP status 404: The spec"):
        files.write_bytes("gs://no-such/a", b"")


def test_missing_objects_and_buckets(store: CloudStorage, bucket: str) -> None:
    path = f"gs://{bucket}/a"
    with pytest.raises(FileNotFoundError, match=f"{path}: HTTP status 404"):
        files.read_bytes(path)
    assert not files.exists(path)
    assert files.names_in(path) == files.folders_in(path) == set()
    files.delete_if_there(path)
    files.delete_folder(path)
    with pytest.raises(NoShards, match=r"gs://no-such: cannot be listed \(.*The specified bucket does not exist"):
        list_shards("gs://no-such")
    with pytest.raises(NoShards, match=rf"{path}: contains no \*\.tar"):
        list_shards(path)


def test_pools_are_named_as_on_a_disk(store: CloudStorage, bucket: str) -> None:
    for name in ("p/00000.tar", "p/00001.tar", "p/x/0.tar", "q/00000.tar", "p/00007_stats.json", "r/0.parquet"):
        store.put(bucket, name, b'{"successes": 3}')
    pool = f"gs://{bucket}/p"

    def shards(pool: str) -> dict[str, str]:
        return {shard.name: shard.fault for shard in list_shards(pool)}

    assert shards(pool) == {"00000": "", "00001": "", "00007": "missing_shard", "x%2F0": ""}
    store.asked.clear()
    assert shards(f"{pool}/{{00000..00002}}.tar") == {"00000": "", "00001": "", "00002": "missing_shard"}
    assert store.asked == {"list": 1}
    assert shards(f"{pool}/{{0*,x/0}}.tar").keys() == {"00000", "00001", "00007", "x%2F0"}
    assert shards(f"{pool}/00001.tar::{pool}/00000.tar") == {"00000": "", "00001": ""}
    assert shards(f"{pool}/*.tar::gs://{bucket}/q/").keys() == {
        "p%2F00000", "p%2F00001", "p%2F00007", "q%2F00000"
    }  # fmt: skip
    with pytest.raises(NoShards, match=rf"^gs://{bucket}/r: contains no \*\.tar \(1 \.parquet, 0 \.tar\)"):
        list_shards(f"gs://{bucket}/r")


def test_failed_read_resumes(store: CloudStorage, bucket: str, waits: list[float]) -> None:
    content = os.urandom(20 * 2**20)
    store.put(bucket, "a", content)
    store.fail(lambda request: request.kind == "read" and request.headers["range"] != "bytes=0-16777215", 403)
    with SteadyReader(f"gs://{bucket}/a") as file:
        assert b"".join(iter(lambda: file.read(3 * 2**20), b"")) == content
    assert waits == [0.5]


def test_folders_are_listed_without_their_contents(store: CloudStorage, bucket: str) -> None:
    for version in range(30):
        for part in range(5):
            store.put(bucket, f"out/versions/{version}/decisions/part-{part}", b"")
    store.put(bucket, "out/versions/file", b"")
    store.asked.clear()
    assert files.folders_in(f"gs://{bucket}/out/versions") == {str(version) for version in range(30)}
    assert store.asked == {"list": 1}
    assert files.folders_in(f"gs://{bucket}") == {"out"}


def test_folder_is_deleted_in_batches_without_its_siblings(
    store: CloudStorage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "page_size", 70)
    for n in range(250):
        store.put(bucket, f"out/work [1]/{n}/ü*?", b"")
    store.put(bucket, "out/work [1]/", b"")  # as the console creates folders
    store.put(bucket, "out/work [1]2", b"")
    store.put(bucket, "out/work 1/a", b"")
    store.asked.clear()
    files.delete_folder(f"gs://{bucket}/out/work [1]")
    assert store.names(bucket) == ["out/work 1/a", "out/work [1]2"]
    assert (store.asked["batch"], store.asked["list"]) == (3, 4)


def test_failed_deletion_is_an_error(store: CloudStorage, bucket: str) -> None:
    for n in range(3):
        store.put(bucket, f"out/{n}", b"")
    store.fail(lambda request: request.kind == "delete", 403)
    with pytest.raises(OSError, match=r"1 objects cannot be deleted \(gs://.*/out/\d: HTTP status 403"):
        files.delete_folder(f"gs://{bucket}/out")


def test_checking_for_files_reads_only_the_first_page(
    store: CloudStorage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "page_size", 10)
    store.put(bucket, "out/", b"")
    store.put(bucket, "out/.lock.json", b"")
    assert not files.holds_files(f"gs://{bucket}/out", besides=(".lock.json",))
    for n in range(100):
        store.put(bucket, f"out/{n}", b"")
    store.asked.clear()
    assert files.holds_files(f"gs://{bucket}/out", besides=(".lock.json",))
    assert store.asked["list"] == 1
    assert not files.holds_files(f"gs://{bucket}/ou")


def test_rename_leaves_one_object(store: CloudStorage, bucket: str) -> None:
    files.write_bytes(f"gs://{bucket}/a", b"x")
    files.rename(f"gs://{bucket}/a", f"gs://{bucket}/b/c%2F")
    assert store.names(bucket) == ["b/c%2F"]


def test_tables_of_many_shards_take_one_listing(
    store: CloudStorage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(f"gs://{bucket}/out")
    shards = {"a", "b%2Fc", "d.parquet"}
    for shard in shards:
        files.write_bytes(layout.single_modality(shard), b"")
    store.asked.clear()
    assert layout.shards_with(Layout.single_modality) == shards
    assert store.asked["list"] == 1
    assert layout.shards_with(Layout.cross_modality) == set()


def test_model_folder_is_copied_once_and_again_after_changes(store: CloudStorage, bucket: str) -> None:
    for name in ("model/", "model/config.json", "model/sub/w.bin", "model-other/x"):
        store.put(bucket, name, name.encode())
    first = Path(local_copy(f"gs://{bucket}/model/"))
    assert {str(path.relative_to(first)) for path in first.rglob("*")} == {"config.json", "sub", "sub/w.bin"}
    assert (first / "sub" / "w.bin").read_bytes() == b"model/sub/w.bin"
    store.asked.clear()
    assert local_copy(f"gs://{bucket}/model") == str(first)
    assert not store.asked["read"]
    store.put(bucket, "model/sub/w.bin", b"changed")
    assert (Path(local_copy(f"gs://{bucket}/model")) / "sub" / "w.bin").read_bytes() == b"changed"
    assert Path(local_copy(f"gs://{bucket}/model/config.json")).name == "config.json"
    with pytest.raises(FileNotFoundError, match=f"gs://{bucket}/nothing: nothing there"):
        local_copy(f"gs://{bucket}/nothing")
