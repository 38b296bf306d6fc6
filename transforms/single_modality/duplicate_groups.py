"""Groups of near-duplicate images: which members stage 2 scores, and which one stands afterwards.

A keeper is an image that others are near-duplicates of. Each other image belongs to the group of its best-ranked
near-duplicate; a keeper that has no better image near it belongs to its own group. Only one hop is followed:

    z <- y <- x     y is near z, x is near y only: y belongs to z's group, x to y's group

Stage 2 scores each keeper and the next best members of its group. What survives all other rules is compared within the
group, together with its keeper. Where the keeper of a group belongs to another group, it is judged there, and here it
only displaces others. So every survivor that is displaced is displaced by a better survivor, and no group loses its
pair. Our choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import apache_beam as beam
import numpy as np

from transforms.columns import Columns, Part, buckets_of

if TYPE_CHECKING:
    from transforms.core.records import Annotation

NOT_SCORED = -1
"""The rank of a member that stage 2 does not score."""


@dataclasses.dataclass(frozen=True, eq=False)
class Contenders(Columns):
    """Members of groups that pass all other rules of stage 1.

    keepers and uids S32 (n,); pixels int64 (n,); contents uint64 (n,): hashes of image bytes and caption.
    """

    keepers: np.ndarray
    uids: np.ndarray
    pixels: np.ndarray
    contents: np.ndarray


def best_of_groups(members: Contenders, count: int) -> tuple[Contenders, np.ndarray]:
    """The best `count` members of each group, sorted by group and rank, and their ranks int32 (n,) from 0.

    Members of equal bytes and caption count once: their scores would be equal. More pixels rank higher, then the
    smaller uid.
    """
    members = members.take(np.lexsort((members.uids, -members.pixels, members.contents, members.keepers)))
    members = members.take(_first(members.keepers, members.contents))
    members = members.take(np.lexsort((members.uids, -members.pixels, members.keepers)))
    rows = np.arange(len(members))
    ranks = rows - np.maximum.accumulate(np.where(_first(members.keepers), rows, 0))
    return members.take(ranks < count), ranks[ranks < count].astype(np.int32)


def _first(*columns: np.ndarray) -> np.ndarray:
    """Whether each row of sorted columns differs from the row before it: bool (n,)."""
    differs = np.zeros(max(len(columns[0]) - 1, 0), bool)
    for column in columns:
        differs |= column[1:] != column[:-1]
    return np.concatenate([[True], differs])[: len(columns[0])]


@dataclasses.dataclass(frozen=True, eq=False)
class Members(Columns):
    """Members of groups after stage 2.

    keepers S32 (n,), which name the groups; uids S32 (n,); shards bytes (n,); duplicate_of S32 (n,): the keeper that
    stage 1 found, b"" for a keeper in its own group. visits bool (n,): a keeper in its group that is judged in another.
    scored and survives bool (n,): whether stage 2 scores the member, and whether it passes all other rules of stages 1
    and 2. pixels int64 (n,); images uint64 (n,): hashes of the image bytes; cosines float32 (n,): flipped CLIP.
    """

    keepers: np.ndarray
    uids: np.ndarray
    shards: np.ndarray
    duplicate_of: np.ndarray
    visits: np.ndarray
    scored: np.ndarray
    survives: np.ndarray
    pixels: np.ndarray
    images: np.ndarray
    cosines: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Changes(Columns):
    """Samples that stage 2 gave another verdict of `near_duplicate`: uids S32 (n,), shards bytes (n,), duplicate_of S32
    (n,), b"" where no other member stands in the sample's place."""

    uids: np.ndarray
    shards: np.ndarray
    duplicate_of: np.ndarray


class FinalDuplicates:
    """Gives annotations of one shard their final `duplicate_of`, from the `Changes` of that shard."""

    def __init__(self, changes: Iterable[Changes]) -> None:
        self._changed: dict[str, str | None] = {}
        for part in changes:
            pairs = zip(part.uids.tolist(), part.duplicate_of.tolist(), strict=True)
            self._changed |= {uid.decode(): keeper.decode() or None for uid, keeper in pairs}

    def __call__(self, annotation: Annotation) -> Annotation:
        """The annotation, with the verdict on near-duplicates that stands after stage 2."""
        if annotation.uid not in self._changed:
            return annotation
        return annotation.with_columns(duplicate_of=self._changed[annotation.uid])


def standing(members: Members) -> Members:
    """The member that stands for each group with survivors, sorted by group.

    The best image stands: more pixels, then the smaller uid. Of survivors with the bytes of that image, the caption
    with the highest cosine stands, then the smaller uid.
    """
    survivors = members.take(members.survives)
    survivors = survivors.take(np.lexsort((survivors.uids, -survivors.pixels, survivors.keepers)))
    first = _first(survivors.keepers)
    best_images = survivors.images[first][np.cumsum(first) - 1]
    captions = survivors.take(survivors.images == best_images)
    captions = captions.take(np.lexsort((captions.uids, -captions.cosines, captions.keepers)))
    return captions.take(_first(captions.keepers))


def displaced_by(members: Members, winners: Members) -> np.ndarray:
    """The final `duplicate_of` of each member, S32 (n,), where `winners` is `standing` of all members of the groups.

    A survivor, and a member that was not scored, is a duplicate of the winner. A scored member that another rule drops
    is one only if the winner ranks higher. Where no member survives, each is dropped by the rule that it fails, and
    those that were not scored remain duplicates of the keeper.
    """
    if not len(winners):
        return np.where(members.scored, b"", members.duplicate_of).astype("S32")
    places = np.minimum(np.searchsorted(winners.keepers, members.keepers), len(winners) - 1)
    has_winner = winners.keepers[places] == members.keepers
    uids, pixels = winners.uids[places], winners.pixels[places]
    ranks_higher = (pixels > members.pixels) | ((pixels == members.pixels) & (uids < members.uids))
    is_displaced = has_winner & (uids != members.uids) & (members.survives | ~members.scored | ranks_higher)
    otherwise = np.where(has_winner | members.scored, b"", members.duplicate_of)
    return np.where(is_displaced, uids, otherwise).astype("S32")


class DecideGroups(beam.PTransform):
    """PCollection[Members] -> PCollection[Changes]. `buckets` is the number of groups of the shuffle."""

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self._buckets = buckets

    def expand(self, members: beam.PCollection) -> beam.PCollection:
        return (
            members
            | "By group" >> beam.ParDo(Part(_GroupBuckets(self._buckets)))
            | "Gather groups" >> beam.GroupByKey()
            | "Displace" >> beam.FlatMap(_changes)
        )


@dataclasses.dataclass(frozen=True)
class _GroupBuckets:
    buckets: int

    def __call__(self, members: Members) -> np.ndarray:
        return buckets_of(members.keepers, self.buckets)


def _changes(bucket: tuple[int, Iterable[Members]]) -> Iterator[Changes]:
    # A group may be large, but few of its members are scored, and only scored ones survive.
    winners = standing(Members.joined(part.take(part.survives) for part in bucket[1]))
    for part in bucket[1]:
        final = displaced_by(part, winners)
        changed = ~part.visits & (final != part.duplicate_of)
        if changed.any():
            yield Changes(part.uids[changed], part.shards[changed], final[changed])
