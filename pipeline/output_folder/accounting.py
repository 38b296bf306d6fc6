"""Accounting: every sample of the pool must have a row or a dead letter, or the run fails."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from transforms.core.recipe import SINGLE_MODALITY
from transforms.core.records import DeadLetter, Shard
from transforms.storage import files
from transforms.storage.steady_reader import SteadyReader

_SHOWN = 5
_MAX_STATS_BYTES = 2**20


class Unaccounted(AssertionError):
    """Some samples have neither a row nor a dead letter, or more than one of them."""


def reconcile(where: str, due: Iterable[str], found: Iterable[str], what: str = "keys") -> None:
    """Raise Unaccounted, naming the differences, unless `found` and `due` are equal as multisets."""
    expected, actual = Counter(due), Counter(found)
    faults = [
        f"{verb} {n} {what} ({', '.join(sorted(names)[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
        for verb, names in (("lost", expected - actual), ("counted too often", actual - expected))
        if (n := names.total())
    ]
    if faults:
        raise Unaccounted(f"{where}: {' and '.join(faults)}; nothing was written for it. This is a bug of pairsift")


def reconcile_shard(
    shard: Shard, stage: str, due: Sequence[str], rows: Iterable[Mapping[str, Any]], letters: Sequence[DeadLetter]
) -> None:
    """Raise Unaccounted unless each key in `due` has a row or a dead letter.

    A dead letter without a key belongs to a truncated tar: it stands for the sample at the end of the tar and for all
    samples that could not be read.
    """
    found = [row["key"] for row in rows] + [letter.key for letter in letters if letter.key]
    if any(not letter.key for letter in letters) and due and Counter(found)[due[-1]] < Counter(due)[due[-1]]:
        due = due[:-1]
    reconcile(f"shard {shard.name}, stage {stage}", due, found)


class ReconcilePool(beam.PTransform):
    """PCollection[Shard] -> empty PCollection. Compares each table of stage 1, whichever run wrote it, with the samples
    that were counted in the tar, and with img2dataset's `_stats.json` if that is beside the tar.

    After comparing all shards, raises Unaccounted, which names those that differ.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self._layout = layout

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        return (
            shards
            | "Compare shard" >> beam.FlatMap(differences, self._layout)
            | "All differences" >> beam.combiners.ToList()
            | "Refuse differences" >> beam.FlatMap(_refuse)
        )


def differences(shard: Shard, layout: Layout) -> Iterator[str]:
    """Messages about the differences in a shard that stage 1 has finished."""
    shard = Shard(*shard)
    table = layout.single_modality(shard.name)
    letters = tables.read_dead_letters(layout.dead_letters(SINGLE_MODALITY, shard.name))
    keys = [row["key"] for row in tables.read_table(table, ["key"])]
    keys += [letter.key for letter in letters if letter.key]
    is_broken = any(not letter.key for letter in letters)
    in_tar = tables.read_due(table)
    if in_tar - is_broken > len(keys) or in_tar < len(keys):
        yield (
            f"{shard.path}: {in_tar} samples were read, {len(keys)} are accounted for: something was removed from "
            f"{layout.output}; delete {table}, so that the shard is read again"
        )
    successes = _successes(shard)
    if successes is None or successes == len(set(keys)) or (is_broken and successes > len(set(keys))):
        return
    yield (
        f"{shard.path}: holds {len(set(keys))} samples, img2dataset's {_stats_path(shard)} says {successes}; "
        "download that shard again, or delete the stats if they are wrong"
    )


def _refuse(found: list[str]) -> Iterator[None]:
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise Unaccounted(f"shards that do not add up: {len(found)}: {'; '.join(sorted(found)[:_SHOWN])}{more}")
    return iter(())


def _stats_path(shard: Shard) -> str:
    return f"{shard.path.removesuffix('.tar')}_stats.json"


def _successes(shard: Shard) -> int | None:
    """The number of samples that img2dataset reports for the tar; None if there is no report."""
    path = _stats_path(shard)
    if not files.exists(path):
        return None
    with SteadyReader(path) as file:
        content = file.read(_MAX_STATS_BYTES)
    try:
        stats = json.loads(content)
    except (ValueError, RecursionError):
        stats = None
    successes = stats.get("successes") if isinstance(stats, dict) else None
    if not isinstance(successes, int):
        logging.warning("%s: is not a stats file of img2dataset; the tar is not compared with it", path)
        return None
    return successes
