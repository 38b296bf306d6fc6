"""A pool that dies: nearly all of its samples are dead letters for one reason, which a setting may mend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.output_folder.img2dataset_stats import STATS_MISMATCH
from transforms.core.errors import Failure
from transforms.core.records import DeadLetter

_OF_OTHER_SHARDS = ("missing_shard", STATS_MISMATCH)
"""Reasons that say nothing about the samples that are there: a tar that is gone, or one that a setting skips."""


class DeadPool(Failure):
    """More samples than the recipe allows are dead letters for one reason."""


def dead_by_reason(letters: Iterable[DeadLetter]) -> dict[str, tuple[int, str]]:
    """Number of dead letters and the first message, by reason."""
    found: dict[str, tuple[int, str]] = {}
    for letter in letters:
        count, message = found.get(letter.reason, (0, letter.message))
        found[letter.reason] = count + 1, message
    return found


def check_alive(
    what: str, judged: int, dead: Iterable[Mapping[str, tuple[int, str]]], max_dead_share: float, hint: str = ""
) -> None:
    """Raise DeadPool if more than `max_dead_share` of the samples of `what` are dead letters for one reason.

    `judged` counts the samples that are none, and `dead` is what `dead_by_reason` returns for each shard. The result
    does not depend on the order of the shards. `hint` ends the message's description of what is there.
    """
    counts: dict[str, int] = {}
    messages: dict[str, str] = {}
    for of_shard in dead:
        for reason, (count, message) in of_shard.items():
            counts[reason] = counts.get(reason, 0) + count
            messages[reason] = min(messages.get(reason, message), message)
    total = judged + sum(count for reason, count in counts.items() if reason not in _OF_OTHER_SHARDS)
    for reason, count in sorted(counts.items()):
        if reason not in _OF_OTHER_SHARDS and count > max_dead_share * total:
            raise DeadPool(
                f"{what}: {count} of {total} samples are dead letters for one reason, {reason} (for example: "
                f"{messages[reason]}){hint}; see docs/pools.md for the settings of the recipe's section `pool` that "
                "say how members are named, or set pool.max_dead_share: 1.0 to go on all the same"
            )
