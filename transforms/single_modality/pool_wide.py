"""The pool-wide features of stage 1: the number of images of a caption, near-duplicates, and repeated uids.

They are computed from columns of slim rows, without pixels.

Many samples may share a uid, a caption or a hash, so these are counted and looked up in parts, and no group has to fit
into a worker's memory. Only one entry for each distinct value in a bucket does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import numpy as np

from transforms.columns import Columns, Part, buckets_of
from transforms.core.catalogue import SINGLE_MODALITY
from transforms.core.records import DeadLetter
from transforms.single_modality import captions
from transforms.single_modality.captions import CaptionFrequencySettings
from transforms.single_modality.duplicate_groups import NOT_SCORED, Contenders, best_of_groups
from transforms.single_modality.hash_neighbours import NearDuplicates, Ranked, best_of_signatures, signatures_of
from transforms.single_modality.near_duplicate import NearDuplicateSettings


@dataclasses.dataclass(frozen=True, eq=False)
class PoolRows(Columns):
    """The columns of samples that the pool-wide passes use.

    uids S32 (n,); shards bytes (n,); keys object (n,) of str; caption_keys S32 (n,), from `captions.caption_key`;
    hashes uint64 (n,), perceptual hashes; thumbnails S48 (n,); pixels int64 (n,), of the original image; fails bool
    (n,), whether the sample fails any stage-1 rule that needs no pool-wide feature, or caption_frequency once that is
    computed; contents uint64 (n,), hashes of image bytes and caption; caption_image_counts int64 (n,). Of
    near-duplicates: duplicate_of S32 (n,), the keeper, b"" where there is none; keepers S32 (n,), the keeper of the
    group, b"" outside groups; ranks int32 (n,), those of members that stage 2 scores, else `NOT_SCORED`.
    """

    uids: np.ndarray
    shards: np.ndarray
    keys: np.ndarray
    caption_keys: np.ndarray
    hashes: np.ndarray
    thumbnails: np.ndarray
    pixels: np.ndarray
    fails: np.ndarray
    contents: np.ndarray
    caption_image_counts: np.ndarray
    duplicate_of: np.ndarray
    keepers: np.ndarray
    ranks: np.ndarray


class UniqueUids(beam.PTransform):
    """PCollection[PoolRows] -> outputs `UNIQUE` (PoolRows) and `REPEATED` (DeadLetter).

    Of several samples with one uid, image and caption, the one with the smallest shard and key is kept; the others
    become dead letters. Where image or caption differ, all become dead letters. Our choice: a subset file cannot
    distinguish them, and no order of the pool says which pair owns the uid.
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


_Place = tuple[bytes, str, int]
"""Shard, key, and the hash of image and caption."""


class _FirstOfUid(beam.DoFn):
    def process(self, group: tuple[int, Iterable[PoolRows]]) -> Iterator[PoolRows | beam.pvalue.TaggedOutput]:
        first = _first_places(group[1], {})
        other = _first_places(group[1], first)
        for rows in group[1]:
            kept = np.array([first[uid] == place and uid not in other for uid, place in _places(rows)], bool)
            yield rows.take(kept)
            for uid, place in _places(rows.take(~kept)):
                letter = _repeated(uid, place, first[uid], other.get(uid))
                yield beam.pvalue.TaggedOutput(UniqueUids.REPEATED, letter)


def _first_places(parts: Iterable[PoolRows], besides: Mapping[bytes, _Place]) -> dict[bytes, _Place]:
    """The smallest place of each uid, of samples with other content than the uid's place in `besides`."""
    found: dict[bytes, _Place] = {}
    for rows in parts:
        for uid, place in _places(rows):
            if uid in besides and besides[uid][2] == place[2]:
                continue
            if place <= found.setdefault(uid, place):
                found[uid] = place
    return found


def _repeated(uid: bytes, place: _Place, first: _Place, other: _Place | None) -> DeadLetter:
    if other is None:
        message = f"the uid also names {_named(first)}, which stays"
    else:
        conflicting = first if place[2] != first[2] else other
        message = f"the uid also names {_named(conflicting)}, another pair; give each pair a uid of its own"
    return DeadLetter(place[0].decode(), place[1], uid.decode(), SINGLE_MODALITY, "repeated_uid", message)


def _named(place: _Place) -> str:
    return f"{place[1]} of shard {place[0].decode()}"


def _places(rows: PoolRows) -> Iterator[tuple[bytes, _Place]]:
    places = zip(rows.shards.tolist(), rows.keys.tolist(), rows.contents.tolist(), strict=True)
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
    """PCollection[PoolRows] -> PCollection[PoolRows], with `duplicate_of`, `keepers` and `ranks` added.

    A keeper of one group that belongs to another comes twice: the second time with rank 0, because it is scored.
    """

    def __init__(self, settings: NearDuplicateSettings, buckets: int) -> None:
        super().__init__()
        self._settings, self._buckets = settings, buckets

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        ranked = rows | "Rank" >> beam.Map(_ranked)
        winners = ranked | "Near-duplicates" >> NearDuplicates(self._settings, self._buckets)
        by_signature = functools.partial(_by_signature, buckets=self._buckets)
        return (
            {
                "rows": rows | "By signature" >> beam.ParDo(Part(by_signature)),
                "winners": winners | "Winners by signature" >> beam.ParDo(Part(_by("signatures", self._buckets))),
            }
            | "Join duplicates" >> beam.CoGroupByKey()
            | "Duplicate on rows" >> beam.FlatMap(_duplicate_on_rows)
            | "Into groups" >> beam.FlatMap(_into_groups)
            | "By group" >> beam.ParDo(Part(_by("keepers", self._buckets)))
            | "Gather groups" >> beam.GroupByKey()
            | "Rank in groups" >> beam.ParDo(_RankInGroups(self._settings.further_members))
        )


def _ranked(rows: PoolRows) -> Ranked:
    uids = np.frombuffer(bytes.fromhex(rows.uids.tobytes().decode()), "S16")
    return best_of_signatures(Ranked(_signatures(rows), rows.fails, rows.pixels, uids))


def _signatures(rows: PoolRows) -> np.ndarray:
    return signatures_of(rows.hashes, rows.thumbnails)


def _by_signature(rows: PoolRows, buckets: int) -> np.ndarray:
    return buckets_of(_signatures(rows), buckets)


def _duplicate_on_rows(joined: tuple[int, dict[str, Any]]) -> Iterator[PoolRows]:
    winners = best_of_signatures(Ranked.joined(joined[1]["winners"]))
    uids = np.frombuffer(winners.uids.tobytes().hex().encode(), "S32")
    for rows in joined[1]["rows"]:
        winner = uids[np.searchsorted(winners.signatures, _signatures(rows))]
        keepers = np.where(winner == rows.uids, b"", winner).astype("S32")
        yield dataclasses.replace(rows, duplicate_of=keepers).without("caption_keys", "hashes", "thumbnails")


def _into_groups(rows: PoolRows) -> Iterator[PoolRows]:
    """Each row in the group that it may keep, and a duplicate also in the group of its keeper."""
    yield dataclasses.replace(rows, keepers=rows.uids)
    duplicates = rows.take(rows.duplicate_of != b"")
    yield dataclasses.replace(duplicates, keepers=duplicates.duplicate_of)


class _RankInGroups(beam.DoFn):
    def __init__(self, further_members: int) -> None:
        self._scored = 1 + further_members

    def process(self, bucket: tuple[int, Iterable[PoolRows]]) -> Iterator[PoolRows]:
        # A group may be large, so only the best of each is in memory, and the parts are read twice.
        best, ranks, kept = None, np.zeros(0, np.int32), np.zeros(0, "S32")
        for rows in bucket[1]:
            passing = _contenders(rows.take(~rows.fails))
            joined = passing if best is None else Contenders.joined([best, passing])
            best, ranks = best_of_groups(joined, self._scored)
            kept = np.union1d(kept, rows.keepers[rows.keepers != rows.uids])
        assert best is not None
        is_member = best.uids != best.keepers
        members, ranks = best.take(is_member), ranks[is_member]
        order = np.argsort(members.uids)
        for rows in bucket[1]:
            yield from _with_ranks(rows, kept, members.take(order), ranks[order])


def _contenders(rows: PoolRows) -> Contenders:
    return Contenders(rows.keepers, rows.uids, rows.pixels, rows.contents)


def _with_ranks(rows: PoolRows, kept: np.ndarray, scored: Contenders, ranks: np.ndarray) -> Iterator[PoolRows]:
    """The rows with their ranks. `kept` are the keepers that have members; `scored` the members that stage 2 scores,
    sorted by uid, with their `ranks`."""
    is_keeper = rows.keepers == rows.uids
    is_root = is_keeper & (rows.duplicate_of == b"")
    keepers = rows.take(is_root)
    has_members = np.isin(keepers.uids, kept)
    yield dataclasses.replace(
        keepers,
        keepers=np.where(has_members, keepers.uids, b"").astype("S32"),
        ranks=np.where(has_members & ~keepers.fails, 0, NOT_SCORED).astype(np.int32),
    ).without("pixels")
    members = rows.take(~is_keeper)
    places = np.searchsorted(scored.uids, members.uids)
    found = np.append(scored.uids, b"")[places] == members.uids
    own = np.where(found, np.append(ranks, NOT_SCORED)[places], NOT_SCORED).astype(np.int32)
    yield dataclasses.replace(members, ranks=own).without("pixels")
    others = rows.take(is_keeper & ~is_root & np.isin(rows.uids, scored.keepers))
    yield dataclasses.replace(others, keepers=others.duplicate_of, ranks=np.zeros_like(others.ranks)).without("pixels")
