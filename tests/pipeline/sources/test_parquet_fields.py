"""The parquet beside a tar: fields of samples whose json lacks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources import parquet_fields
from pipeline.sources.webdataset import read_samples
from tests.helpers import BOUNDS, Members, jpeg, sample_members, tar_bytes, uid
from tests.pipeline.sources.test_captions_and_ids import told
from transforms.core.recipe import PoolSettings
from transforms.core.records import DeadLetter, Sample, Shard

ROWS: list[dict[str, Any]] = [
    {"key": "0", "uid": uid(7), "caption": "a dog", "url": "u0", "face_bboxes": [[0.0, 0.0, 1.0, 0.5]], "texts": None},
    {"key": "1", "uid": uid(8), "caption": None, "url": "u1", "face_bboxes": None, "texts": ["a cat", "ein Kater"]},
]


def read(folder: Path, members: Members, pool: PoolSettings = BOUNDS) -> list[Sample | DeadLetter]:
    path = folder / "a.tar"
    path.write_bytes(tar_bytes(members))
    return list(read_samples(Shard("a", str(path), "f"), pool, "stage"))


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_fields_of_samples_without_a_json(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    pool = PoolSettings(keep_columns=["url"])
    found = read(tmp_path, [("0.jpg", jpeg()), ("x/1.jpg", jpeg()), ("2.jpg", jpeg()), ("2.txt", b"no row")], pool)
    assert told(found) == [("0", "a dog"), ("x/1#0", "a cat"), ("x/1#1", "ein Kater"), ("2", "no row")]
    first = found[0]
    assert isinstance(first, Sample)
    assert first.annotation.uid == uid(7)
    assert json.loads(first.annotation.kept_fields) == {"url": "u0"}
    assert first.metadata["face_bboxes"] == [[0.0, 0.0, 1.0, 0.5]]


def test_the_json_comes_first(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    pool = PoolSettings(keep_columns=["url"])
    (sample,) = read(tmp_path, sample_members("0", "of the file", metadata={"uid": uid(9)}), pool)
    assert isinstance(sample, Sample)
    assert (sample.annotation.uid, sample.annotation.caption) == (uid(9), "of the file")
    assert json.loads(sample.annotation.kept_fields) == {"url": "u0"}


def test_it_is_not_opened_where_the_json_has_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ROWS)

    def refuse(*_: Any) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(parquet_fields.ParquetFields, "_read", refuse)
    assert told(read(tmp_path, sample_members("0", "c"))) == [("0", "c")]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet" * 99, None])
def test_one_that_cannot_be_used_is_told(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [{**ROWS[0], "caption": "c" * 100_000}])
    if content is not None:
        path.write_bytes(content)
    pool = PoolSettings(max_parquet_bytes=50_000)
    assert told(read(tmp_path, [("0.jpg", b"x"), ("0.txt", b"c"), ("1.jpg", b"x")], pool)) == [
        ("0", "c"), ("1", "!missing_caption")
    ]  # fmt: skip
    assert [record.message.partition(": ")[2][:24] for record in caplog.records] == ["its fields are not used:"]


@pytest.mark.parametrize(
    "rows", [[{"name": "0", "caption": "c"}], [{"key": "0", "other": 1}], [{"key": 0, "text": "t"}]]
)
def test_columns_of_other_names(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write(tmp_path, rows)
    found = told(read(tmp_path, [("0.jpg", b"x")]))
    assert found == [("0", rows[0].get("text", "!missing_caption"))]
