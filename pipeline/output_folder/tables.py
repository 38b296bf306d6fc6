"""The tables that connect the three graphs: columns of `Annotation`, one parquet file per shard and step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.output_folder.layout import Layout
from transforms.core import catalogue
from transforms.core.catalogue import (
    ALIGNMENT_COLUMNS,
    CROSS_MODALITY,
    DISTRIBUTION_ALIGNMENT,
    IDENTITY_COLUMNS,
    IMAGE_COLUMNS,
    POOL_COLUMNS,
    SINGLE_MODALITY,
    SOURCE_COLUMNS,
    STAGES,
    ColumnType,
    Score,
    scores_of,
)
from transforms.core.recipe import Recipe
from transforms.core.records import Annotation, DeadLetter
from transforms.storage import files


def _schema(columns: Mapping[str, ColumnType]) -> pa.Schema:
    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])


def _columns_of(scores: Iterable[Score[Any]]) -> dict[str, ColumnType]:
    return {name: kind for score in scores for name, kind in score.columns.items()}


def single_modality_schema() -> pa.Schema:
    """Return the schema of the features of a shard's captions and images."""
    own = {**IDENTITY_COLUMNS, **IMAGE_COLUMNS, **SOURCE_COLUMNS}
    return _schema({**own, **_columns_of(catalogue.per_sample_scores())})


def pool_wide_schema() -> pa.Schema:
    """Return the schema of the columns that depend on the complete pool."""
    own: dict[str, ColumnType] = {"uid": "string", "key": "string"}
    return _schema({**own, **POOL_COLUMNS, **_columns_of(catalogue.pool_wide_rules())})


def cross_modality_schema() -> pa.Schema:
    """Return the schema of the scores and embeddings of the samples that stage 1 keeps; binary columns come last."""
    own: dict[str, ColumnType] = {"uid": "string", "key": "string"}
    scores = _columns_of(scores_of(CROSS_MODALITY))
    in_order = dict(sorted(scores.items(), key=lambda column: column[1] == "binary"))
    return _schema({**own, **in_order})


def decisions_schema(recipe: Recipe) -> pa.Schema:
    """Return the schema of the decisions: the fields of `pool.keep_columns`, the columns of all built-in and all other
    active scores, and the copies."""
    shown = [score for score in catalogue.scores() if score.is_built_in or recipe.is_on(score)]
    of_stage = {stage: [score for score in shown if score.stage == stage] for stage in STAGES}
    pool_wide = catalogue.pool_wide_rules()
    columns: dict[str, ColumnType] = {
        **IDENTITY_COLUMNS,
        **dict.fromkeys(recipe.pool.keep_columns, "string"),
        "dropped_by": "string",
        **IMAGE_COLUMNS,
        **_columns_of(score for score in of_stage[SINGLE_MODALITY] if score not in pool_wide),
        **POOL_COLUMNS,
        **_columns_of(pool_wide),
        **_columns_of(of_stage[CROSS_MODALITY]),
        **ALIGNMENT_COLUMNS,
        **_columns_of(of_stage[DISTRIBUTION_ALIGNMENT]),
        "expected_copies": "float64",
        "copies": "int32",
    }
    return _schema({name: kind for name, kind in columns.items() if kind != "binary"})


_CACHE_KEY = b"pairsift.made_from"  # the name on disk since the first version
_HALVINGS = b"pairsift.batch_halvings"
_DUE = b"pairsift.due"


def write_table(
    path: str,
    columns: Sequence[dict],
    schema: pa.Schema,
    cache_key: Mapping[str, str] | None = None,
    halvings: Mapping[str, int] | None = None,
    due: int | None = None,
) -> None:
    """Write rows to `path` atomically. Keys that are not in the schema are ignored.

    `cache_key` holds a digest of each input that the rows were computed from; see `is_complete`. `halvings` counts how
    often each rule's batch shape was halved because GPU memory ran out. `due` is the number of samples of the shard
    that need a row or a dead letter.
    """
    rows = [{name: row.get(name) for name in schema.names} for row in columns]
    metadata = {_CACHE_KEY: json.dumps(dict(cache_key or {}), sort_keys=True).encode()}
    if halvings:
        metadata[_HALVINGS] = json.dumps(halvings, sort_keys=True).encode()
    if due is not None:
        metadata[_DUE] = str(due).encode()
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata(metadata))
    with files.write_aside(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_table(path: str, columns: list[str] | None = None) -> list[dict]:
    """Return the rows of the table at `path`, limited to those of `columns` that it has."""
    with files.open_binary(path) as file:
        return pq.ParquetFile(file).read(columns=columns).to_pylist()


def is_complete(path: str, cache_key: Mapping[str, str]) -> bool:
    """Return whether there is a complete table at `path` whose cache key contains `cache_key`."""
    there = read_cache_key(path)
    return there is not None and cache_key.items() <= there.items()


def read_cache_key(path: str) -> dict[str, str] | None:
    """Return the cache key of the table at `path`; None if there is no complete table."""
    if not files.exists(path):
        return None
    with files.open_binary(path) as file:
        try:
            metadata = pq.read_schema(file).metadata or {}
        except pa.ArrowInvalid:  # incomplete: it is written again
            return None
    return json.loads(metadata.get(_CACHE_KEY, b"{}"))


def read_halvings(path: str) -> dict[str, int]:
    """Return how often each rule's batch shape was halved for the table at `path`; empty if none was."""
    with files.open_binary(path) as file:
        metadata = pq.read_schema(file).metadata or {}
    return json.loads(metadata.get(_HALVINGS, b"{}"))


def read_due(path: str) -> int:
    """Return the number of samples of the shard that need a row in the table at `path`, or a dead letter."""
    with files.open_binary(path) as file:
        return int(pq.read_schema(file).metadata[_DUE])


def annotation_row(annotation: Annotation) -> dict[str, Any]:
    """Return an annotation as a table row."""
    return annotation.row


def read_annotations(
    layout: Layout, shard: str, *, with_scores: bool = True, with_embeddings: bool = False
) -> list[Annotation]:
    """Return the annotations of a shard's samples from stage 1 (and from stage 2 if `with_scores`), in tar order.

    Samples without a pool-wide row are omitted: their uid is repeated in the pool, so they are dead letters.
    """
    pool_wide = {row["key"]: row for row in read_table(layout.pool_wide(shard), pool_wide_schema().names)}
    scores: dict[str, dict] = {}
    if with_scores:
        names = [name for name in cross_modality_schema().names if with_embeddings or name != "embedding"]
        scores = {row["key"]: row for row in read_table(layout.cross_modality(shard), names)}
    features = [name for name in single_modality_schema().names if name != "image_thumbnail"]  # for one pass only
    rows = read_table(layout.single_modality(shard), features)
    return [
        Annotation(**{**row, **pool_wide[row["key"]], **scores.get(row["key"], {})})
        for row in rows
        if row["key"] in pool_wide
    ]


def write_dead_letters(path: str, letters: Iterable[DeadLetter]) -> None:
    """Write dead letters as JSON lines in the given order. If there are none, delete the file."""
    lines = [json.dumps(letter._asdict(), ensure_ascii=True) for letter in letters]
    if lines:
        files.write_bytes(path, ("\n".join(lines) + "\n").encode())
    else:
        files.delete_if_there(path)


def read_dead_letters(path: str) -> list[DeadLetter]:
    """Return the dead letters at `path`; none if there is no file."""
    if not files.exists(path):
        return []
    return [DeadLetter(**json.loads(line)) for line in files.read_bytes(path).decode().splitlines()]
