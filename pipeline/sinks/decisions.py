"""Decisions: one row per judged uid, and the tally that the funnel is made of."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam

from pipeline.output_folder import tables
from pipeline.output_folder.accounting import Unaccounted, reconcile
from pipeline.output_folder.layout import POOL_WIDE, Layout
from pipeline.output_folder.pending import as_asked
from transforms.core import catalogue
from transforms.core import metrics as work
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES, Recipe
from transforms.core.records import Annotation, DeadLetter
from transforms.distribution_alignment.records import Placement, Placements
from transforms.rules import Thresholds, first_failing, rules_of
from transforms.single_modality.duplicate_groups import FinalDuplicates
from transforms.single_modality.near_duplicate import NEAR_DUPLICATE
from transforms.storage import files

DEAD_LETTER_STEPS = (SINGLE_MODALITY, POOL_WIDE, CROSS_MODALITY)

IN, DROPPED, DEAD, SURVIVORS, SAMPLES, COPIES = "in", "dropped", "dead_letters", "survivors", "samples", "copies"
NOT_ASKED, SMALLER_BATCHES, SCORED_DUPLICATES = "not_asked", "smaller_batches", "scored_duplicates"
Tally = dict[tuple[str, str], int]
"""Counts by (what, rule or reason); what has no finer name is under ""."""


def decide(
    annotations: Iterable[Annotation],
    placements: dict[str, Placement],
    unjudged: set[str],
    recipe: Recipe,
    thresholds: Thresholds,
) -> list[dict[str, Any]]:
    """The decision rows of one shard: a pure function of its annotations, their placements and the recipe.

    `unjudged` holds the keys that are dead letters of stage 2. Raises Unaccounted where a sample that no rule dropped
    has no placement, one that was dropped has, or a placement is nobody's.
    """
    placements = dict(placements)
    local = rules_of(recipe, SINGLE_MODALITY)
    scored = rules_of(recipe, CROSS_MODALITY, thresholds)
    aligned = rules_of(recipe, DISTRIBUTION_ALIGNMENT)
    rows = []
    for annotation in annotations:
        dropped_by = first_failing(annotation, local)
        if dropped_by is None and annotation.key in unjudged:
            continue
        dropped_by = dropped_by or first_failing(annotation, scored)
        placement = placements.pop(annotation.uid, None)
        if (dropped_by is None) != (placement is not None):
            where = f"{annotation.uid} ({annotation.key!a} of shard {annotation.shard})"
            raise Unaccounted(f"{where}: dropped by {dropped_by}, yet its placement is {placement}")
        row = tables.annotation_row(annotation)
        row.update(dropped_by=dropped_by, copies=0)
        if placement is not None:
            row.update(
                cluster=placement.cluster,
                semantic_duplicate_of=placement.semantic_duplicate_of or None,
                expected_copies=placement.expected_copies,
                copies=placement.copies,
            )
            final = annotation.with_columns(semantic_duplicate_of=row["semantic_duplicate_of"])
            row["dropped_by"] = first_failing(final, aligned)
        rows.append(row)
    if placements:
        raise Unaccounted(f"placed, yet not in the shard or not judged: {', '.join(sorted(placements)[:3])}")
    return rows


def _later_models() -> dict[str, str]:
    """The models that run after flipped CLIP, with the columns of their scores."""
    return {score.name: score.value for score in catalogue.model_scores()[1:] if score.value}


def tally(rows: Iterable[dict[str, Any]], letters: Iterable[DeadLetter]) -> Tally:
    """What became of a shard's samples."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        counts[(DROPPED, row["dropped_by"]) if row["dropped_by"] else (SURVIVORS, "")] += 1
        counts[COPIES, ""] += row["copies"]
        counts[SAMPLES, ""] += row["copies"] > 0
        if row.get("flipped_clip_cosine") is not None:
            counts.update([(SCORED_DUPLICATES, "")] if row["dropped_by"] == NEAR_DUPLICATE.name else [])
            counts.update((NOT_ASKED, model) for model, column in _later_models().items() if row.get(column) is None)
    counts.update((DEAD, letter.reason) for letter in letters)
    return dict(counts)


class WriteDecisions(beam.DoFn):
    """(shard name, its placements and changes) -> Tally, once the shard's decisions are written."""

    PLACEMENTS, CHANGES, SHARDS = "placements", "changes", "shards"

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        self._layout, self._recipe = layout, recipe

    def process(self, group: tuple[str, dict[str, Any]], thresholds: Thresholds) -> Iterator[Tally]:
        shard, groups = group
        letters = {
            step: tables.read_dead_letters(self._layout.dead_letters(step, shard)) for step in DEAD_LETTER_STEPS
        }
        rules = rules_of(self._recipe, SINGLE_MODALITY)
        final = FinalDuplicates(groups[self.CHANGES])
        known = tables.read_annotations(self._layout, shard)
        rows = decide(
            (final(as_asked(annotation, self._recipe, rules)) for annotation in known),
            _by_uid(groups[self.PLACEMENTS]),
            {letter.key for letter in letters[CROSS_MODALITY]},
            self._recipe,
            thresholds,
        )
        # A sample that stage 1 drops is not asked for, and what broke when it was is nothing to this recipe.
        judged = {row["key"] for row in rows}
        letters[CROSS_MODALITY] = [letter for letter in letters[CROSS_MODALITY] if letter.key not in judged]
        counts = tally(rows, (letter for step in letters.values() for letter in step))
        # Counted on its own from what stage 1 saw, so that the sum below can really fail.
        seen = [row["uid"] for row in tables.read_table(self._layout.single_modality(shard), ["uid"])]
        later = (letter.uid for step, found in letters.items() if step != SINGLE_MODALITY for letter in found)
        reconcile(f"decisions of shard {shard}", seen, [*(row["uid"] for row in rows), *later], "uids")
        counts[IN, ""] = len(seen) + len(letters[SINGLE_MODALITY])
        halvings = tables.read_halvings(self._layout.cross_modality(shard))
        counts |= {(SMALLER_BATCHES, rule): 1 for rule in halvings}
        _reconcile(shard, counts)
        tables.write_table(self._layout.decisions(shard), rows, tables.decisions_schema(self._recipe))
        _count(counts)
        yield counts


def _count(counts: Tally) -> None:
    """Raise the funnel's counters by a shard's tally."""
    names = {IN: work.FUNNEL_IN, SURVIVORS: work.FUNNEL_SURVIVORS, SAMPLES: work.FUNNEL_SAMPLES}
    names |= {COPIES: work.FUNNEL_COPIES}
    named = {DROPPED: work.funnel_dropped, DEAD: work.funnel_dead_letters}
    for (what, rule), count in counts.items():
        if what in names:
            work.counter(names[what]).inc(count)
        elif what in named:
            work.counter(named[what](rule)).inc(count)


def _by_uid(placements: Iterable[Placements]) -> dict[str, Placement]:
    found: dict[str, Placement] = {}
    for placement in itertools.chain.from_iterable(part.one_by_one() for part in placements):
        if found.setdefault(placement.uid, placement) is not placement:
            raise Unaccounted(f"{placement.uid} of shard {placement.shard}: placed twice")
    return found


def _reconcile(where: str, counts: Tally) -> None:
    """Raise Unaccounted unless in = dropped + survivors + dead letters."""
    explained = sum(n for (what, _), n in counts.items() if what in (DROPPED, SURVIVORS, DEAD))
    if counts.get((IN, ""), 0) != explained:
        raise Unaccounted(f"{where}: {counts.get((IN, ''), 0)} in, but {explained} dropped, kept or dead-lettered")


def add_tallies(tallies: Iterable[Tally]) -> Tally:
    """The sum of tallies; whole numbers, so their order cannot matter."""
    total: Counter[tuple[str, str]] = Counter()
    for counts in tallies:
        total.update(counts)
    return dict(total)


def funnel(total: Tally, recipe: Recipe) -> dict[str, Any]:
    """The content of funnel.json: per rule in = kept + dropped, rule by rule in the order they are applied."""
    _reconcile("the pool", total)
    letters = {reason: n for (what, reason), n in sorted(total.items()) if what == DEAD}
    steps = [rule for stage in STAGES for rule in recipe.rules_of(stage)]
    rules, left = [], total.get((IN, ""), 0) - sum(letters.values())
    for rule in steps:
        dropped = total.get((DROPPED, rule.name), 0)
        rules.append({"name": rule.name, "stage": rule.stage, "in": left, "dropped": dropped, "kept": left - dropped})
        left -= dropped
    smaller = {rule: n for (what, rule), n in sorted(total.items()) if what == SMALLER_BATCHES}
    return {
        "in": total.get((IN, ""), 0),
        "rules": rules,
        "dead_letters": letters,
        "survivors": total.get((SURVIVORS, ""), 0),
        "samples": total.get((SAMPLES, ""), 0),
        "copies": total.get((COPIES, ""), 0),
        # scored by flipped CLIP, and then spared a dearer model by the cascade
        NOT_ASKED: {m: total.get((NOT_ASKED, m), 0) for m in _later_models() if getattr(recipe.cross_modality, m)},
        # scored by stage 2 as members of a group of near-duplicates in which another member stands
        SCORED_DUPLICATES: total.get((SCORED_DUPLICATES, ""), 0),
        # shards scored again at smaller batch shapes, because the GPU had too little memory
        **({SMALLER_BATCHES: smaller} if smaller else {}),
    }


class WriteFunnel(beam.DoFn):
    """Tally of the whole pool -> funnel.json."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        self._layout, self._recipe = layout, recipe

    def process(self, total: Tally) -> Iterator[str]:
        files.write_json(self._layout.funnel, funnel(total, self._recipe))
        yield self._layout.funnel
