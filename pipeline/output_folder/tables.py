"""The tables that join the three graphs: columns of `Annotation`, one parquet file per shard and step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.output_folder.layout import Layout
from transforms.core.records import Annotation, DeadLetter
from transforms.storage import files

_IDENTITY = [("uid", pa.string()), ("shard", pa.string()), ("key", pa.string()), ("caption", pa.string())]

SINGLE_MODALITY = pa.schema(
    [
        *_IDENTITY,
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("original_width_px", pa.int32()),
        ("original_height_px", pa.int32()),
        ("image_sha256", pa.string()),
        ("perceptual_hash", pa.string()),
        ("word_count", pa.int32()),
        ("character_count", pa.int32()),
        ("language", pa.string()),
        ("language_probability", pa.float32()),
        ("pos_tags", pa.string()),
        ("face_area_share", pa.float64()),  # a share of exactly 0.4 must stay 0.4: it is on its threshold
    ]
)
POOL_WIDE = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("pool_samples", pa.int64()),
        ("caption_image_count", pa.int64()),
        ("duplicate_of", pa.string()),
    ]
)
CROSS_MODALITY = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("flipped_clip_cosine", pa.float32()),
        ("unflipped_clip_cosine", pa.float32()),
        ("match_probability", pa.float32()),
        ("digit_prompt_probability", pa.float32()),
        ("digit_probability", pa.float32()),
        ("embedding", pa.binary()),
    ]
)
DECISIONS = pa.schema(
    [
        *_IDENTITY,
        ("dropped_by", pa.string()),
        *[field for field in SINGLE_MODALITY if field.name not in dict(_IDENTITY)],
        *[field for field in POOL_WIDE if field.name not in ("uid", "key")],
        *[field for field in CROSS_MODALITY if field.name not in ("uid", "key", "embedding")],
        ("cluster", pa.int32()),
        ("semantic_duplicate_of", pa.string()),
        ("expected_copies", pa.float64()),
        ("copies", pa.int32()),
    ]
)

_ANNOTATION_COLUMNS = [field.name for field in dataclasses.fields(Annotation)]
_CACHE_KEY = b"pairsift.cache_key"
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
    """Write rows (dicts; other keys than the schema's are left out) to `path`, whole or not at all.

    `cache_key` names what the rows were computed from, thing by thing; see `is_complete`. `halvings` says how often
    each rule's batch shape was halved for want of GPU memory; `due` how many samples of the shard need a row or a dead
    letter.
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
    """The rows at `path`."""
    with files.open_binary(path) as file:
        return pq.read_table(file, columns=columns).to_pylist()


def is_complete(path: str, cache_key: Mapping[str, str]) -> bool:
    """Whether a whole table made from all of these (and perhaps of more) lies at `path`."""
    there = read_cache_key(path)
    return there is not None and cache_key.items() <= there.items()


def read_cache_key(path: str) -> dict[str, str] | None:
    """What the table at `path` was made from; None where there is no whole table."""
    if not files.exists(path):
        return None
    with files.open_binary(path) as file:
        try:
            metadata = pq.read_schema(file).metadata or {}
        except pa.ArrowInvalid:  # not whole: made again
            return None
    return json.loads(metadata.get(_CACHE_KEY, b"{}"))


def read_halvings(path: str) -> dict[str, int]:
    """How often each rule's batch shape was halved for the table at `path`; empty where the recipe's were kept."""
    with files.open_binary(path) as file:
        metadata = pq.read_schema(file).metadata or {}
    return json.loads(metadata.get(_HALVINGS, b"{}"))


def read_due(path: str) -> int:
    """How many samples of the shard need a row in the table at `path`, or a dead letter."""
    with files.open_binary(path) as file:
        return int(pq.read_schema(file).metadata[_DUE])


def annotation_row(annotation: Annotation) -> dict:
    """An annotation as a table row."""
    # Not `asdict`, which copies deeply at ten times the cost.
    return {name: getattr(annotation, name) for name in _ANNOTATION_COLUMNS}


def read_annotations(
    layout: Layout, shard: str, *, with_scores: bool = True, with_embeddings: bool = False
) -> list[Annotation]:
    """All that stage 1 (and with `with_scores` stage 2) knows of a shard's samples, in tar order.

    A sample that has no pool-wide row (its uid stands twice in the pool) is left out: it is a dead letter.
    """
    pool_wide = {row["key"]: row for row in read_table(layout.pool_wide(shard))}
    scores: dict[str, dict] = {}
    if with_scores:
        names = [name for name in CROSS_MODALITY.names if with_embeddings or name != "embedding"]
        scores = {row["key"]: row for row in read_table(layout.cross_modality(shard), names)}
    rows = read_table(layout.single_modality(shard))
    return [
        Annotation(**{**row, **pool_wide[row["key"]], **scores.get(row["key"], {})})
        for row in rows
        if row["key"] in pool_wide
    ]


def write_dead_letters(path: str, letters: Iterable[DeadLetter]) -> None:
    """Write dead letters as JSON lines in the order given; no file where there are none."""
    lines = [json.dumps(letter._asdict(), ensure_ascii=True) for letter in letters]
    if lines:
        files.write_bytes(path, ("\n".join(lines) + "\n").encode())
    else:
        files.delete_if_there(path)


def read_dead_letters(path: str) -> list[DeadLetter]:
    """The dead letters at `path`; none where there is no file."""
    if not files.exists(path):
        return []
    return [DeadLetter(**json.loads(line)) for line in files.read_bytes(path).decode().splitlines()]
