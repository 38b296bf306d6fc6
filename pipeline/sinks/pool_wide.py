"""Writes the pool-wide columns of each shard next to its features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np

from pipeline.output_folder import owner, tables
from pipeline.output_folder.layout import POOL_WIDE, Layout
from transforms.columns import Part
from transforms.core.metrics import count_dead_letters
from transforms.core.records import DeadLetter, Shard
from transforms.single_modality.duplicate_groups import NOT_SCORED
from transforms.single_modality.pool_wide import PoolRows


class WritePoolWide(beam.PTransform):
    """{shards, rows, dead letters} -> names of the shards, each with its table written in tar order.

    Shards without rows get an empty table.
    """

    SHARDS, ROWS, DEAD_LETTERS = "shards", "rows", "dead_letters"

    def __init__(self, layout: Layout, pool_samples: beam.PCollection, cache_key: dict[str, str]) -> None:
        super().__init__()
        self._layout, self._pool_samples, self._cache_key = layout, pool_samples, cache_key

    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection:
        return (
            {
                self.SHARDS: inputs[self.SHARDS] | "Shard names" >> beam.Map(_by_name),
                self.ROWS: inputs[self.ROWS] | "Rows by shard" >> beam.ParDo(Part(_shards_of)),
                self.DEAD_LETTERS: inputs[self.DEAD_LETTERS] | "Letters by shard" >> beam.Map(_by_shard),
            }
            | "Gather shard" >> beam.CoGroupByKey()
            | "Write table"
            >> beam.ParDo(_Write(self._layout, self._cache_key), beam.pvalue.AsSingleton(self._pool_samples))
        )


def _by_name(shard: Shard) -> tuple[str, None]:
    return Shard(*shard).name, None


def _shards_of(rows: PoolRows) -> np.ndarray:
    return rows.shards


def _by_shard(letter: DeadLetter) -> tuple[str, DeadLetter]:
    return letter.shard, letter


class _Write(beam.DoFn):
    def __init__(self, layout: Layout, cache_key: dict[str, str]) -> None:
        self._layout, self._cache_key = layout, cache_key

    def process(self, group: tuple[str, dict[str, Any]], pool_samples: int) -> Iterator[str]:
        shard, groups = group
        by_key: dict[str, dict[str, Any]] = {}
        for part in groups[WritePoolWide.ROWS]:
            for key, found in _found(part):
                # The keeper of one group that is a member of another comes twice; it is scored if either says so.
                known = by_key.setdefault(key, found)
                known["near_duplicate_rank"] = _better(known["near_duplicate_rank"], found["near_duplicate_rank"])
        features = tables.read_table(self._layout.single_modality(shard), ["uid", "key"])
        rows = [
            {**feature, **by_key[feature["key"]], "pool_samples": pool_samples}
            for feature in features
            if feature["key"] in by_key
        ]
        letters = sorted(groups[WritePoolWide.DEAD_LETTERS])
        owner.check(self._layout)
        tables.write_dead_letters(self._layout.dead_letters(POOL_WIDE, shard), letters)
        tables.write_table(self._layout.pool_wide(shard), rows, tables.pool_wide_schema(), self._cache_key)
        count_dead_letters(letter.reason for letter in letters)
        yield shard


def _found(part: PoolRows) -> Iterator[tuple[str, dict[str, Any]]]:
    columns = part.keys, part.caption_image_counts, part.duplicate_of, part.keepers, part.ranks
    for key, count, keeper, group, rank in zip(*(column.tolist() for column in columns), strict=True):
        yield key, {
            "caption_image_count": count,
            "duplicate_of": keeper.decode() or None,
            "near_duplicate_group": group.decode() or None,
            "near_duplicate_rank": None if rank == NOT_SCORED else rank,
        }


def _better(rank: int | None, other: int | None) -> int | None:
    return min((each for each in (rank, other) if each is not None), default=None)
