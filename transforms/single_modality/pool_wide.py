"""The pool-wide features of stage 1: the number of images of a caption, near-duplicates, and repeated uids.

They are computed from columns of slim rows, without pixels.

Many samples may share a uid, a caption or a hash, so these are counted and looked up in parts, and no group has to fit
into a worker's memory. Only one entry for each distinct value in a bucket does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np

from transforms.columns import Columns, Part, buckets_of
from transforms.core.catalogue import SINGLE_MODALITY
from transforms.core.records import DeadLetter
from transforms.single_modality import captions
from transforms.single_modality.captions import CaptionFrequencySettings
from transforms.single_modality.hash_neighbours import NearDuplicates, Ranked, best_of_hashes
from transforms.single_modality.near_duplicate import NearDuplicateSettings


@dataclasses.dataclass(frozen=True, eq=False)
class PoolRows(Columns):
    """The columns of samples that the pool-wide passes use.

    uids S32 (n,); shards bytes (n,); keys object (n,) of str; caption_keys S32 (n,), from `captions.caption_key`;
    hashes uint64 (n,), perceptual hashes; pixels int64 (n,); fails bool (n,), whether the sample fails any stage-1 rule
    that needs no pool-wide feature, or caption_frequency once that is computed; caption_image_counts int64 (n,);
    duplicate_of S32 (n,), a uid, or b"" where there is none.
    """

    uids: np.ndarray
    shards: np.ndarray
    keys: np.ndarray
    caption_keys: np.ndarray
    hashes: np.ndarray
    pixels: np.ndarray
    fails: np.ndarray
    caption_image_counts: np.ndarray
    duplicate_of: np.ndarray


class UniqueUids(beam.PTransform):
    """PCollection[PoolRows] -> outputs `UNIQUE` (PoolRows) and `REPEATED` (DeadLetter).

    Of several samples with the same uid, the one with the smallest shard and key is kept; the others become dead
    letters. Our choice: a subset file cannot distinguish them.
    """

    UNIQUE, REPEATED = "unique", "repeated"

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self._buckets = buckets

    def expand(self, rows: beam.PCollection) -> beam.pvalue.DoOutputsTuple:
        return (
            rows
            | "By uid" >> beam.ParDo(Part(_by("uids", self._buckets)))
            | "Group by uid" >> beam.GroupByKey()
            | "First of uid" >> beam.ParDo(_FirstOfUid()).with_outputs(self.REPEATED, main=self.UNIQUE)
        )


def _by(column: str, buckets: int) -> Callable[[Any], np.ndarray]:
    return functools.partial(_buckets, column=column, buckets=buckets)


def _buckets(rows: Columns, column: str, buckets: int) -> np.ndarray:
    return buckets_of(getattr(rows, column), buckets)


class _FirstOfUid(beam.DoFn):
    def process(self, group: tuple[int, Iterable[PoolRows]]) -> Iterator[PoolRows | beam.pvalue.TaggedOutput]:
        first: dict[bytes, tuple[bytes, str]] = {}
        for rows in group[1]:
            for uid, place in _places(rows):
                if place <= first.setdefault(uid, place):
                    first[uid] = place
        for rows in group[1]:
            kept = np.array([first[uid] == place for uid, place in _places(rows)], bool)
            yield rows.take(kept)
            for uid, place in _places(rows.take(~kept)):
                (shard, key), (its_shard, its_key) = place, first[uid]
                message = f"the uid also names {its_key} of shard {its_shard.decode()}, which stays"
                letter = DeadLetter(
                    shard.decode(), key, uid.decode(), SINGLE_MODALITY, "repeated_uid", message
                )
                yield beam.pvalue.TaggedOutput(UniqueUids.REPEATED, letter)


def _places(rows: PoolRows) -> Iterator[tuple[bytes, tuple[bytes, str]]]:
    places = zip(rows.shards.tolist(), rows.keys.tolist(), strict=True)
    return zip(rows.uids.tolist(), places, strict=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _CaptionImages(Columns):
    """Pairs of a caption and an image."""

    caption_keys: np.ndarray
    hashes: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _CaptionCounts(Columns):
    """The number of distinct images of each caption in one part; the sum over all parts is the total."""

    caption_keys: np.ndarray
    counts: np.ndarray


class CaptionFrequency(beam.PTransform):
    """PCollection[PoolRows] -> PCollection[PoolRows], with `caption_image_counts` added.

    It is the number of DISTINCT images (by perceptual hash) with the same caption: one good pair that is reposted often
    is a case for `near_duplicate` (our choice). Also updates `fails` with the result of the rule, which affects the
    rank of duplicates. `pool_samples` has one element, the number of samples in the pool.
    """

    def __init__(self, settings: CaptionFrequencySettings, pool_samples: beam.PCollection, buckets: int) -> None:
        super().__init__()
        self._settings, self._pool_samples, self._buckets = settings, pool_samples, buckets

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        by_caption = _by("caption_keys", self._buckets)
        by_both = functools.partial(_by_caption_and_image, buckets=self._buckets)
        counts = (
            rows
            | "Captions with images" >> beam.Map(_caption_images)
            | "By caption and image" >> beam.ParDo(Part(by_both))
            | "Group by caption and image" >> beam.GroupByKey()
            | "Count images" >> beam.MapTuple(_count_images)
            | "Counts by caption" >> beam.ParDo(Part(by_caption))
        )
        return (
            {"rows": rows | "By caption" >> beam.ParDo(Part(by_caption)), "counts": counts}
            | "Join counts" >> beam.CoGroupByKey()
            | "Count on rows" >> beam.ParDo(_CountOnRows(self._settings), beam.pvalue.AsSingleton(self._pool_samples))
        )


def _caption_images(rows: PoolRows) -> _CaptionImages:
    return _distinct(_CaptionImages(rows.caption_keys, rows.hashes))


def _distinct(images: _CaptionImages) -> _CaptionImages:
    images = images.take(np.lexsort((images.hashes, images.caption_keys)))
    captions_, hashes = images.caption_keys, images.hashes
    differs = (captions_[1:] != captions_[:-1]) | (hashes[1:] != hashes[:-1])
    return images.take(np.concatenate([[True], differs])[: len(images)])


def _by_caption_and_image(images: _CaptionImages, buckets: int) -> np.ndarray:
    # Hashing both spreads a caption with a million images over many workers.
    both = buckets_of(images.caption_keys, 2**32).astype(np.uint64) ^ images.hashes
    return buckets_of(both, buckets)


def _count_images(bucket: int, parts: Iterable[_CaptionImages]) -> _CaptionCounts:
    images = _distinct(_CaptionImages.joined(parts))
    return _CaptionCounts(*np.unique(images.caption_keys, return_counts=True))


class _CountOnRows(beam.DoFn):
    def __init__(self, settings: CaptionFrequencySettings) -> None:
        self._settings = settings

    def process(self, joined: tuple[int, dict[str, Any]], pool_samples: int) -> Iterator[PoolRows]:
        parts = _CaptionCounts.joined(joined[1]["counts"])
        caption_keys, places = np.unique(parts.caption_keys, return_inverse=True)
        counts = np.zeros(len(caption_keys), np.int64)
        np.add.at(counts, places, parts.counts)
        for rows in joined[1]["rows"]:
            row_counts = counts[np.searchsorted(caption_keys, rows.caption_keys)]
            fails = rows.fails | (row_counts > captions.max_images(pool_samples, self._settings))
            yield dataclasses.replace(rows, caption_image_counts=row_counts, fails=fails).without("caption_keys")


class NearDuplicate(beam.PTransform):
    """PCollection[PoolRows] -> PCollection[PoolRows], with `duplicate_of` added."""

    def __init__(self, settings: NearDuplicateSettings, buckets: int) -> None:
        super().__init__()
        self._settings, self._buckets = settings, buckets

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        ranked = rows | "Rank" >> beam.Map(_ranked)
        winners = ranked | "Near-duplicates" >> NearDuplicates(self._settings.max_hamming, self._buckets)
        by_hash = _by("hashes", self._buckets)
        return (
            {
                "rows": rows | "By hash" >> beam.ParDo(Part(by_hash)),
                "winners": winners | "Winners by hash" >> beam.ParDo(Part(by_hash)),
            }
            | "Join duplicates" >> beam.CoGroupByKey()
            | "Duplicate on rows" >> beam.FlatMap(_duplicate_on_rows)
        )


def _ranked(rows: PoolRows) -> Ranked:
    return best_of_hashes(Ranked(rows.hashes, rows.fails, rows.pixels, rows.uids))


def _duplicate_on_rows(joined: tuple[int, dict[str, Any]]) -> Iterator[PoolRows]:
    winners = best_of_hashes(Ranked.joined(joined[1]["winners"]))
    for rows in joined[1]["rows"]:
        winner = winners.uids[np.searchsorted(winners.hashes, rows.hashes)]
        keepers = np.where(winner == rows.uids, b"", winner).astype("S32")
        yield dataclasses.replace(rows, duplicate_of=keepers).without("hashes", "pixels")
