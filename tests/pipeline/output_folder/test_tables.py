"""Tables: rows are read back unchanged, with their cache key."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from tests.helpers import annotation, recipe, uid
from transforms.core import catalogue
from transforms.core.records import Annotation, DeadLetter
from transforms.storage import files

HOSTILE = ["", "a\x00b", "\u2028\n\r\t", '"quoted\\', "\U0001f600", "‮abc", "x" * 100_000]


def write_single(layout: Layout, annotations: list[Annotation]) -> None:
    rows = [tables.annotation_row(a) for a in annotations]
    tables.write_table(layout.single_modality("s"), rows, tables.single_modality_schema())


def test_rows_are_read_back_in_order(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    written = [annotation(uid=uid(n), key=f"k{n}", caption=text, width_px=2**31 - 1) for n, text in enumerate(HOSTILE)]
    write_single(layout, written[::-1])
    rows = tables.read_table(layout.single_modality("s"))
    assert [row["caption"] for row in rows] == HOSTILE[::-1]
    assert [row["uid"] for row in rows] == [uid(n) for n in range(len(HOSTILE))][::-1]
    assert rows[0]["width_px"] == 2**31 - 1


def test_columns_that_were_never_computed_are_none(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    write_single(layout, [Annotation(uid(1), "s", "k", "")])
    (row,) = tables.read_table(layout.single_modality("s"))
    assert row["caption"] == ""
    assert all(value is None for name, value in row.items() if name not in ("uid", "shard", "key", "caption"))


@pytest.mark.parametrize("share", [0.0, 0.4, 1 / 3, 1.0])
def test_share_equal_to_its_threshold_survives_the_round_trip(tmp_path: Path, share: float) -> None:
    layout = Layout(str(tmp_path))
    write_single(layout, [annotation(face_area_share=share)])
    (row,) = tables.read_table(layout.single_modality("s"))
    assert row["face_area_share"] == share  # otherwise `<= 0.4` would drop a picture of exactly 0.4


def test_empty_table(tmp_path: Path) -> None:
    path = str(tmp_path / "t.parquet")
    tables.write_table(path, [], tables.cross_modality_schema(), {"made": "x"})
    assert tables.read_table(path) == []
    assert tables.is_complete(path, {"made": "x"})


def test_columns_of_other_tables_are_ignored_and_missing_ones_are_none(tmp_path: Path) -> None:
    path = str(tmp_path / "t.parquet")
    given = {"uid": uid(1), "key": "k", "caption": "not here", "embedding": b"\0\1"}
    tables.write_table(path, [given], tables.cross_modality_schema())
    (row,) = tables.read_table(path)
    assert set(row) == set(tables.cross_modality_schema().names)
    assert row["embedding"] == b"\0\1"
    assert row["match_probability"] is None
    assert tables.read_table(path, ["key"]) == [{"key": "k"}]


def test_value_of_another_type_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"integer|int32|convert"):
        tables.write_table(str(tmp_path / "t"), [{"uid": uid(1), "width_px": "wide"}], tables.single_modality_schema())
    assert list(tmp_path.iterdir()) == []


def test_table_is_complete_if_its_cache_key_matches(tmp_path: Path) -> None:
    path = str(tmp_path / "t.parquet")
    assert not tables.is_complete(path, {"made": "this"})
    tables.write_table(path, [], tables.pool_wide_schema(), {"made": "this"})
    assert tables.is_complete(path, {"made": "this"})
    assert not tables.is_complete(path, {"made": "that"})
    assert not tables.is_complete(path, {"made": ""})


@pytest.mark.parametrize("kept", [0, 1, 0.5])
def test_damaged_table_is_not_complete(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "t.parquet"
    tables.write_table(str(path), [{"uid": uid(1)}], tables.pool_wide_schema(), {"made": "this"})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept < 1 else -1])
    assert not tables.is_complete(str(path), {"made": "this"})


def test_equal_rows_make_equal_files(tmp_path: Path) -> None:
    rows = [tables.annotation_row(annotation(uid=uid(n), key=f"k{n}")) for n in range(100)]
    for name in ("a", "b"):
        tables.write_table(str(tmp_path / name), rows, tables.decisions_schema(recipe()), {"made": "x"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_column_of_an_annotation_has_its_table() -> None:
    names = set(catalogue.columns())
    by_stage = {
        *tables.single_modality_schema().names,
        *tables.pool_wide_schema().names,
        *tables.cross_modality_schema().names,
    }
    assert names - by_stage == {"cluster", "semantic_duplicate_of"}
    assert by_stage <= names
    of_tables_only = {"embedding", "image_thumbnail", "kept_fields", "pool_notes"}
    decided = {"dropped_by", "expected_copies", "copies"}
    assert set(tables.decisions_schema(recipe()).names) == names - of_tables_only | decided


def test_annotations_are_joined_by_key_in_tar_order(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    single = [annotation(uid=uid(9 - n), shard="s", key=f"k{n}", pool_samples=None, flipped_clip_cosine=None,
                         match_probability=None, digit_probability=None) for n in range(4)]  # fmt: skip
    write_single(layout, single)
    pool_wide = [{"uid": a.uid, "key": a.key, "pool_samples": 4, "caption_image_count": n, "duplicate_of": None}
                 for n, a in enumerate(single) if n != 1]  # fmt: skip
    tables.write_table(layout.pool_wide("s"), pool_wide[::-1], tables.pool_wide_schema())
    scores = [{"uid": single[2].uid, "key": "k2", "flipped_clip_cosine": 0.5, "embedding": b"e"}]
    tables.write_table(layout.cross_modality("s"), scores, tables.cross_modality_schema())

    unscored = tables.read_annotations(layout, "s", with_scores=False)
    assert [a.key for a in unscored] == ["k0", "k2", "k3"]  # k1's uid is repeated in the pool: a dead letter
    assert [a.caption_image_count for a in unscored] == [0, 2, 3]
    scored = tables.read_annotations(layout, "s")
    assert [a.flipped_clip_cosine for a in scored] == [None, 0.5, None]
    assert [a.embedding for a in scored] == [None] * 3
    assert [a.embedding for a in tables.read_annotations(layout, "s", with_embeddings=True)] == [None, b"e", None]
    assert [a.width_px for a in scored] == [640] * 3


def test_dead_letters_are_read_back(tmp_path: Path) -> None:
    path = str(tmp_path / "d.jsonl")
    letters = [DeadLetter("s", text, uid(n), "stage", "reason", text) for n, text in enumerate(HOSTILE)]
    tables.write_dead_letters(path, letters)
    assert tables.read_dead_letters(path) == letters
    lines = Path(path).read_text("ascii").split("\n")
    assert lines.pop() == ""
    assert len(lines) == len(letters)
    assert all(list(json.loads(line)) == ["shard", "key", "uid", "stage", "reason", "message"] for line in lines)


def test_without_dead_letters_an_older_file_is_deleted(tmp_path: Path) -> None:
    path = str(tmp_path / "d.jsonl")
    assert tables.read_dead_letters(path) == []
    tables.write_dead_letters(path, [])
    assert not files.exists(path)
    tables.write_dead_letters(path, [DeadLetter("s", "k", uid(1), "stage", "reason", "m")])
    tables.write_dead_letters(path, iter([]))
    assert not files.exists(path)
    assert tables.read_dead_letters(path) == []


def test_tables_contain_no_machine_name_and_no_time(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    tables.write_table(str(path), [{"uid": uid(1)}], tables.pool_wide_schema(), {"made": "this"})
    assert set(pq.read_schema(path).metadata) == {b"pairsift.made_from"}
    assert str(tmp_path).encode() not in path.read_bytes()
