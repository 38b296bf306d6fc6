"""Every sample of the pool is accounted for: by its row, or by its dead letter. Where one is not, the run fails."""

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
    """Samples that were neither dropped by a rule, nor kept, nor dead-lettered; or more than once."""


def reconcile(where: str, due: Iterable[str], told: Iterable[str], what: str = "keys") -> None:
    """Raise Unaccounted, naming them, where `told` does not hold what `due` holds, each as often."""
    expected, found = Counter(due), Counter(told)
    faults = [
        f"{verb} {n} {what} ({', '.join(sorted(names)[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
        for verb, names in (("lost", expected - found), ("counted too often", found - expected))
        if (n := names.total())
    ]
    if faults:
        raise Unaccounted(f"{where}: {' and '.join(faults)}; nothing was written for it. This is a fault of pairsift")


def reconcile_shard(
    shard: Shard, stage: str, due: Sequence[str], rows: Iterable[Mapping[str, Any]], letters: Sequence[DeadLetter]
) -> None:
    """Raise Unaccounted unless each key that is `due` has a row or a dead letter.

    A dead letter without a key is that of a tar which breaks off: it stands for the sample that the break cut through,
    and for all that was not read.
    """
    told = [row["key"] for row in rows] + [letter.key for letter in letters if letter.key]
    if any(not letter.key for letter in letters) and due and Counter(told)[due[-1]] < Counter(due)[due[-1]]:
        due = due[:-1]
    reconcile(f"shard {shard.name}, stage {stage}", due, told)


class ReconcilePool(beam.PTransform):
    """PCollection[Shard] -> nothing. Compares each table of stage 1, made now or long ago, with what was counted in the
    tar when it was read, and with img2dataset's `_stats.json` where that lies beside the tar.

    Raises Unaccounted, which names all shards that differ, when all have been compared.
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
    """What does not add up in a shard that stage 1 has finished, in words."""
    shard = Shard(*shard)
    table = layout.single_modality(shard.name)
    letters = tables.read_dead_letters(layout.dead_letters(SINGLE_MODALITY, shard.name))
    told = [row["key"] for row in tables.read_table(table, ["key"])]
    told += [letter.key for letter in letters if letter.key]
    is_broken = any(not letter.key for letter in letters)
    in_tar = tables.read_due(table)
    if in_tar - is_broken > len(told) or in_tar < len(told):
        yield (
            f"{shard.path}: {in_tar} samples were read, {len(told)} are accounted for: something was taken out of "
            f"{layout.output}; delete {table}, and the shard is read again"
        )
    successes = _successes(shard)
    if successes is None or successes == len(set(told)) or (is_broken and successes > len(set(told))):
        return
    yield (
        f"{shard.path}: holds {len(set(told))} samples, img2dataset's {_stats_path(shard)} says {successes}; "
        "download that shard again, or delete the stats where it is they that are wrong"
    )


def _refuse(found: list[str]) -> Iterator[None]:
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise Unaccounted(f"shards that do not add up: {len(found)}: {'; '.join(sorted(found)[:_SHOWN])}{more}")
    return iter(())


def _stats_path(shard: Shard) -> str:
    return f"{shard.path.removesuffix('.tar')}_stats.json"


def _successes(shard: Shard) -> int | None:
    """How many samples img2dataset says it wrote into the tar; None where it says nothing."""
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
        logging.warning("%s: is no file of img2dataset's; the tar is not compared with it", path)
        return None
    return successes
