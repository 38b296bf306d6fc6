"""A pool that dies: nearly all of its samples are dead letters for one reason, which a setting may mend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.output_folder.img2dataset_stats import STATS_MISMATCH
from transforms.core.errors import Failure
from transforms.core.records import DeadLetter

_OF_OTHER_SHARDS = ("missing_shard", STATS_MISMATCH)
"""Reasons that say nothing about the samples that are there: a tar that is gone, or one that a setting skips."""


_SETTINGS = {
    "missing_image": "image_members",
    "missing_caption": "caption_members and caption_fields",
    "image_too_large": "max_image_bytes and max_image_pixels",
    "caption_too_large": "max_caption_bytes",
    "metadata_too_large": "max_json_bytes",
    "json_too_deep": "max_json_depth",
    "key_too_long": "max_key_characters",
}
"""The settings of the recipe's section `pool` that decide about a reason."""


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
    what: str, judged: int, dead: Iterable[Mapping[str, tuple[int, str]]], max_dead_share: float
) -> None:
    """Raise DeadPool if more than `max_dead_share` of the samples of `what` are dead letters for one reason.

    `judged` counts the samples that are none, and `dead` is what `dead_by_reason` returns for each shard. The result
    does not depend on the order of the shards.
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
            setting = f"the recipe's pool.{_SETTINGS[reason]} decide what is read; " if reason in _SETTINGS else ""
            raise DeadPool(
                f"{what}: {count} of {total} samples are dead letters for one reason, {reason} (for example: "
                f"{messages[reason]}); {setting}see docs/pools.md, or set pool.max_dead_share: 1.0 to continue anyway"
            )
