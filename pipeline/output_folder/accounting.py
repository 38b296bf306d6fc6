"""Accounting: every sample of the pool must have a row or a dead letter, or the run fails."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam

from pipeline.output_folder import tables
from pipeline.output_folder.dead_pool import check_alive, dead_by_reason
from pipeline.output_folder.img2dataset_stats import STATS_MISMATCH
from pipeline.output_folder.layout import Layout
from transforms.core.recipe import SINGLE_MODALITY
from transforms.core.records import DeadLetter, Shard

_SHOWN = 5


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


class ShardAccount(NamedTuple):
    """What became of a shard in stage 1. `faults` says what does not add up, `mismatches` how its stats differ.

    `dead` maps the reason of dead letters to their number and the first message.
    """

    faults: list[str]
    mismatches: list[str]
    judged: int
    dead: dict[str, tuple[int, str]]


class ReconcilePool(beam.PTransform):
    """PCollection[Shard] -> empty PCollection. Compares each table of stage 1, whichever run wrote it, with the samples
    that were counted in the tar.

    After comparing all shards, warns of those that differ from img2dataset's `_stats.json`, raises Unaccounted, which
    names those that do not add up, and DeadPool if more than `max_dead_share` of the pool is dead for one reason.
    """

    def __init__(self, layout: Layout, max_dead_share: float = 1.0) -> None:
        super().__init__()
        self._layout, self._max_dead_share = layout, max_dead_share

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        return (
            shards
            | "Compare shard" >> beam.Map(account_of, self._layout)
            | "All accounts" >> beam.combiners.ToList()
            | "Refuse differences" >> beam.FlatMap(_refuse, self._max_dead_share)
        )


def account_of(shard: Shard, layout: Layout) -> ShardAccount:
    """The account of a shard that stage 1 has finished."""
    shard = Shard(*shard)
    table = layout.single_modality(shard.name)
    letters = tables.read_dead_letters(layout.dead_letters(SINGLE_MODALITY, shard.name))
    rows = tables.read_table(table, ["key"])
    keyed = len(rows) + sum(letter.key != "" for letter in letters)
    is_broken = any(not letter.key for letter in letters)
    in_tar = tables.read_due(table)
    faults = []
    if in_tar - is_broken > keyed or in_tar < keyed:
        faults.append(
            f"{shard.path}: {in_tar} samples were read, {keyed} are accounted for: something was removed from "
            f"{layout.output}; delete {table}, so that the shard is read again"
        )
    mismatches = sorted({letter.message for letter in letters if letter.reason == STATS_MISMATCH})
    return ShardAccount(faults, mismatches, len(rows), dead_by_reason(letters))


def _refuse(accounts: list[ShardAccount], max_dead_share: float) -> Iterator[None]:
    mismatches = [message for account in accounts for message in account.mismatches]
    if mismatches:
        logging.warning(
            "%d shards differ from their stats: %s; download them again, or delete the stats if they are wrong; "
            "`stats_mismatch` in the recipe's section `pool` says whether such shards are skipped",
            len(mismatches),
            _first(mismatches),
        )
    faults = [fault for account in accounts for fault in account.faults]
    if faults:
        raise Unaccounted(f"shards that do not add up: {len(faults)}: {_first(faults)}")
    judged = sum(account.judged for account in accounts)
    check_alive("the pool", judged, [account.dead for account in accounts], max_dead_share)
    return iter(())


def _first(messages: list[str]) -> str:
    more = f"; and {len(messages) - _SHOWN} more" if len(messages) > _SHOWN else ""
    return "; ".join(sorted(messages)[:_SHOWN]) + more
