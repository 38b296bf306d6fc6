"""What only the whole pool can tell of a sample: how many images its caption stands with, whether a better-ranked
image is its near-duplicate, and whether its uid is its own. Slim rows only; no pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import apache_beam as beam

from pipeline import recipe
from pipeline.records import DeadLetter
from transforms.single_modality import captions, near_duplicate


class PoolRow(NamedTuple):
    """What the passes over the whole pool need of a sample."""

    uid: str
    shard: str
    key: str
    caption_key: str
    perceptual_hash: str
    pixels: int
    fails_other_rule: bool  # any stage-1 rule but the two that look across the pool
    caption_image_count: int = 0
    duplicate_of: str | None = None


class UniqueUids(beam.PTransform):
    """Of several samples with one uid the one with the smallest shard and key stays (main output); the others are
    dead letters (`REPEATED`). Our choice: a subset file cannot tell them apart."""

    UNIQUE, REPEATED = "unique", "repeated"

    def expand(self, rows: beam.PCollection) -> beam.pvalue.DoOutputsTuple:
        return (
            rows
            | "Key by uid" >> beam.Map(_by_uid)
            | "Group by uid" >> beam.GroupByKey()
            | "First of uid" >> beam.ParDo(_FirstOfUid()).with_outputs(self.REPEATED, main=self.UNIQUE)
        )


def _by_uid(row: PoolRow) -> tuple[str, PoolRow]:
    return row.uid, row


class _FirstOfUid(beam.DoFn):
    def process(self, group: tuple[str, Iterable[PoolRow]]) -> Iterator[PoolRow | beam.pvalue.TaggedOutput]:
        first, *others = sorted(group[1], key=_place)
        yield first
        for row in others:
            message = f"the uid also names {first.key} of shard {first.shard}, which stays"
            letter = DeadLetter(
                row.shard, row.key, row.uid, recipe.SINGLE_MODALITY, "repeated_uid", message
            )
            yield beam.pvalue.TaggedOutput(UniqueUids.REPEATED, letter)


def _place(row: PoolRow) -> tuple[str, str]:
    return row.shard, row.key


class CaptionFrequency(beam.PTransform):
    """Adds `caption_image_count`, and counts the rule among those that decide the rank of duplicates."""

    def __init__(self, settings: recipe.CaptionFrequency, pool_samples: beam.PCollection) -> None:
        super().__init__()
        self._settings, self._pool_samples = settings, pool_samples

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        counts = (
            rows
            | "Caption and image" >> beam.Map(_caption_image)
            | "Images per caption" >> captions.CountImagesPerCaption()
        )
        keyed = rows | "Key by caption" >> beam.Map(_by_caption)
        return (
            {"rows": keyed, "count": counts}
            | "Join counts" >> beam.CoGroupByKey()
            | "Count on row"
            >> beam.ParDo(_CountOnRow(self._settings), beam.pvalue.AsSingleton(self._pool_samples))
        )


def _caption_image(row: PoolRow) -> captions.CaptionImage:
    return captions.CaptionImage(row.caption_key, row.perceptual_hash)


def _by_caption(row: PoolRow) -> tuple[str, PoolRow]:
    return row.caption_key, row


class _CountOnRow(beam.DoFn):
    def __init__(self, settings: recipe.CaptionFrequency) -> None:
        self._settings = settings

    def process(self, joined: tuple[str, dict], pool_samples: int) -> Iterator[PoolRow]:
        (count,) = joined[1]["count"]
        fails = not captions.keeps_frequency(count, pool_samples, self._settings)
        for row in joined[1]["rows"]:
            yield row._replace(
                caption_image_count=count, fails_other_rule=row.fails_other_rule or fails
            )


class NearDuplicate(beam.PTransform):
    """Adds `duplicate_of`."""

    def __init__(self, settings: recipe.NearDuplicate) -> None:
        super().__init__()
        self._settings = settings

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        found = (
            rows
            | "Rank" >> beam.Map(_ranked)
            | "Near-duplicates" >> near_duplicate.NearDuplicates(self._settings.max_hamming)
        )
        keyed = rows | "Key by hash" >> beam.Map(_by_hash)
        return (
            {"rows": keyed, "found": found}
            | "Join duplicates" >> beam.CoGroupByKey()
            | "Duplicate on row" >> beam.FlatMap(_duplicate_on_row)
        )


def _ranked(row: PoolRow) -> tuple[str, near_duplicate.Rank]:
    return row.perceptual_hash, near_duplicate.rank(row.fails_other_rule, row.pixels, row.uid)


def _by_hash(row: PoolRow) -> tuple[str, PoolRow]:
    return row.perceptual_hash, row


def _duplicate_on_row(joined: tuple[str, dict]) -> Iterator[PoolRow]:
    ((best, neighbour),) = joined[1]["found"]
    for row in joined[1]["rows"]:
        yield row._replace(duplicate_of=near_duplicate.duplicate_of(row.uid, best, neighbour))
