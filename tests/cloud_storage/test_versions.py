"""Tests of versions in Cloud Storage: readers see one version or the next, and never an older one again."""

from __future__ import annotations

import json
import re
import threading

import pytest

from pipeline.output_folder import versions
from pipeline.output_folder.layout import Layout
from tests.cloud_storage.server import CloudStorage, Request
from transforms.storage import files, generations


@pytest.fixture
def output(bucket: str) -> str:
    return f"gs://{bucket}/out"


def is_switch(request: Request) -> bool:
    return request.kind == "write" and request.name == "out/current.json"


def publish(output: str) -> Layout:
    """Write a new version as stage 3 does."""
    layout = versions.begin(output)
    write_version(layout)
    versions.switch(layout)
    return layout


def write_version(layout: Layout) -> None:
    for path in (layout.subset, layout.decisions("a"), layout.decisions("b"), layout.manifest):
        files.write_bytes(path, layout.results.encode())


def test_no_version_before_the_first(output: str) -> None:
    assert versions.newest(output).results == ""
    layout = versions.begin(output)
    write_version(layout)
    assert versions.newest(output).results == ""
    versions.switch(layout)
    assert versions.newest(output) == layout
    assert files.read_bytes(versions.newest(output).subset) == layout.results.encode()


def test_oldest_versions_are_deleted(store: CloudStorage, bucket: str, output: str) -> None:
    for _ in range(4):
        newest = publish(output)
    for name in ("0/subset.npy", "5/subset.npy", "old"):  # of a killed run; of a running one; an unrelated file
        store.put(bucket, f"out/versions/{name}", b"")
    versions.prune(newest, 2)
    found = {name.split("/")[2] for name in store.names(bucket, "out/versions/")}
    assert found == {"3", "4", "5", "old"}
    assert versions.newest(output).results == f"{output}/versions/4"


def test_version_of_a_killed_run_is_deleted_and_its_number_free(store: CloudStorage, bucket: str, output: str) -> None:
    publish(output)
    store.put(bucket, "out/versions/2/decisions/part-a.parquet", b"half")
    assert versions.begin(output).results == f"{output}/versions/2"
    assert store.names(bucket, "out/versions/2") == []


def test_listing_versions_takes_few_requests(store: CloudStorage, bucket: str, output: str) -> None:
    publish(output)
    for n in range(2500):
        store.put(bucket, f"out/versions/1/decisions/part-{n}.parquet", b"")
    store.asked.clear()
    versions.begin(output)
    assert store.asked.total() <= 4


def test_switch_is_idempotent(store: CloudStorage, output: str) -> None:
    layout = publish(output)
    before = generations.read(f"{output}/current.json")
    versions.switch(layout)
    assert generations.read(f"{output}/current.json") == before


@pytest.mark.parametrize("status", [503, 500])
def test_switch_with_a_lost_answer(store: CloudStorage, output: str, status: int) -> None:
    publish(output)
    store.fail(is_switch, status, done=True)
    layout = publish(output)
    assert versions.newest(output) == layout


def test_outdated_switch_is_an_error_and_does_not_affect_readers(store: CloudStorage, output: str) -> None:
    slow = versions.begin(output)
    write_version(slow)
    quick = publish(output)
    assert quick.results == f"{output}/versions/2"
    expected = f"{output}: version 1 is complete, but another run has published version 2"
    with pytest.raises(versions.VersionConflict, match=re.escape(expected)):
        versions.switch(slow)
    assert versions.newest(output) == quick


def test_overtaken_switch_is_an_error(store: CloudStorage, bucket: str, output: str) -> None:
    slow = publish(output)
    slow = versions.begin(output)
    write_version(slow)
    on_its_way = store.pause(is_switch)  # it has read version 1 and writes the pointer
    lost: list[versions.VersionConflict] = []

    def switch() -> None:
        try:
            versions.switch(slow)
        except versions.VersionConflict as error:
            lost.append(error)

    thread = threading.Thread(target=switch)
    thread.start()
    assert on_its_way.reached.wait(10)
    store.put(bucket, "out/current.json", json.dumps({"version": 3}).encode())
    on_its_way.resume()
    thread.join()
    assert "published version 3" in str(lost[0])
    assert versions.newest(output).results == f"{output}/versions/3"


def test_older_pointer_that_changed_in_the_meantime_is_replaced(
    store: CloudStorage, bucket: str, output: str
) -> None:
    publish(output)
    layout = versions.begin(output)
    write_version(layout)
    on_its_way = store.pause(is_switch)
    thread = threading.Thread(target=versions.switch, args=(layout,))
    thread.start()
    assert on_its_way.reached.wait(10)
    store.put(bucket, "out/current.json", json.dumps({"version": 1}).encode())
    on_its_way.resume()
    thread.join()
    assert versions.newest(output) == layout


def test_reader_during_a_switch_gets_one_of_both_versions(
    store: CloudStorage, bucket: str, output: str
) -> None:
    publish(output)
    reading = store.pause(lambda request: request.kind == "read" and request.name == "out/current.json")
    found: list[Layout] = []
    thread = threading.Thread(target=lambda: found.append(versions.newest(output)))
    thread.start()
    assert reading.reached.wait(10)  # it has looked up a generation that no longer exists when it is read
    layout = publish(output)
    reading.resume()
    thread.join()
    assert found == [layout]
