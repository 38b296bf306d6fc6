"""The `_stats.json` that img2dataset writes beside each tar."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transforms.core.records import DeadLetter, Shard
from transforms.storage import files
from transforms.storage.steady_reader import SteadyReader

SUFFIX = "_stats.json"
_CAPTION_NUMBER = re.compile(r"#[0-9]+\Z")  # of a picture with several captions
STATS_MISMATCH = "stats_mismatch"
_MAX_BYTES = 2**20


def path_of(tar: str) -> str:
    """The path of the stats of a tar."""
    return f"{tar.removesuffix('.tar')}{SUFFIX}"


def successes(tar: str) -> int | None:
    """The number of samples that img2dataset reports for the tar at that path; None if there is no readable report."""
    path = path_of(tar)
    if not files.exists(path):
        return None
    stats = None
    # The report is a check and no more: the run does not depend on it.
    with contextlib.suppress(files.ReadFailed, ValueError, RecursionError), SteadyReader(path) as file:
        stats = json.loads(file.read(_MAX_BYTES))
    found = stats.get("successes") if isinstance(stats, dict) else None
    if not isinstance(found, int):
        logging.warning("%s: is not a stats file of img2dataset; the tar is not compared with it", path)
        return None
    return found


def mismatch_letters(
    shard: Shard, stage: str, rows: Sequence[Mapping[str, Any]], letters: Sequence[DeadLetter], skip: bool
) -> list[DeadLetter]:
    """The dead letters of a shard that holds another number of samples than its stats say; none if they agree.

    One for the shard, or with `skip` one for each sample in `rows`, whose row is then to go. `letters` are the others
    of the shard: one without a key says that the tar is damaged, which explains any number.
    """
    if any(not letter.key for letter in letters):
        return []
    keys = {*(row["key"] for row in rows), *(letter.key for letter in letters)}
    held, reported = len(keys), successes(shard.path)
    pictures = len({_CAPTION_NUMBER.sub("", key) for key in keys})
    if reported is None or reported in (held, pictures):
        return []
    message = f"{shard.path}: holds {held} samples, img2dataset's {path_of(shard.path)} says {reported}"[:500]
    if skip and rows:
        return [DeadLetter(shard.name, row["key"], row["uid"], stage, STATS_MISMATCH, message) for row in rows]
    return [DeadLetter(shard.name, "", "", stage, STATS_MISMATCH, message)]
