"""Decisions: one row per judged uid, and the outcome counts from which the funnel is computed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam

from pipeline.output_folder import tables
from pipeline.output_folder.accounting import Unaccounted, reconcile
from pipeline.output_folder.layout import POOL_WIDE, Layout
from pipeline.output_folder.pending import restrict_to_recipe
from transforms.core import catalogue, metrics
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
POOL_NOTES = "pool_notes"
OutcomeCounts = dict[tuple[str, str], int]
"""Counts by (outcome, rule or reason); the second is "" for outcomes without one."""


def decide(
    annotations: Iterable[Annotation],
    placements: dict[str, Placement],
    unjudged: set[str],
    recipe: Recipe,
    thresholds: Thresholds,
) -> list[dict[str, Any]]:
    """Return the decision rows of one shard: a pure function of its annotations, their placements and the recipe.

    `unjudged` holds the keys of stage 2's dead letters. Raises Unaccounted if a surviving sample has no placement, a
    dropped sample has one, or a placement belongs to no sample of the shard.
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
            raise Unaccounted(f"{where}: dropped by {dropped_by}, but its placement is {placement}")
        row = tables.annotation_row(annotation)
        row.update(json.loads(annotation.kept_fields or "{}"), dropped_by=dropped_by, copies=0)
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
        raise Unaccounted(f"placed, but not in the shard or not judged: {', '.join(sorted(placements)[:3])}")
    return rows


def _later_models() -> dict[str, str]:
    """Return the models that run after flipped CLIP, with the columns of their scores."""
    return {score.name: score.value for score in catalogue.model_scores()[1:] if score.value}


def count_outcomes(rows: Iterable[dict[str, Any]], letters: Iterable[DeadLetter]) -> OutcomeCounts:
    """Count the outcomes of a shard's samples."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        counts[(DROPPED, row["dropped_by"]) if row["dropped_by"] else (SURVIVORS, "")] += 1
        counts[COPIES, ""] += row["copies"]
        counts[SAMPLES, ""] += row["copies"] > 0
        counts.update((POOL_NOTES, note) for note in (row.get("pool_notes") or "").split())
        if row.get("flipped_clip_cosine") is not None:
            counts.update([(SCORED_DUPLICATES, "")] if row["dropped_by"] == NEAR_DUPLICATE.name else [])
            counts.update((NOT_ASKED, model) for model, column in _later_models().items() if row.get(column) is None)
    counts.update((DEAD, letter.reason) for letter in letters)
    return dict(counts)


class WriteDecisions(beam.DoFn):
    """(shard name, its placements and changes) -> OutcomeCounts, after the shard's decisions are written."""

    PLACEMENTS, CHANGES, SHARDS = "placements", "changes", "shards"

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        self._layout, self._recipe = layout, recipe

    def process(self, group: tuple[str, dict[str, Any]], thresholds: Thresholds) -> Iterator[OutcomeCounts]:
        shard, groups = group
        letters = {
            step: tables.read_dead_letters(self._layout.dead_letters(step, shard)) for step in DEAD_LETTER_STEPS
        }
        rules = rules_of(self._recipe, SINGLE_MODALITY)
        final = FinalDuplicates(groups[self.CHANGES])
        known = tables.read_annotations(self._layout, shard)
        rows = decide(
            (final(restrict_to_recipe(annotation, self._recipe, rules)) for annotation in known),
            _by_uid(groups[self.PLACEMENTS]),
            {letter.key for letter in letters[CROSS_MODALITY]},
            self._recipe,
            thresholds,
        )
        # This recipe does not score samples that stage 1 drops, so failures of their models in other runs are ignored.
        judged = {row["key"] for row in rows}
        letters[CROSS_MODALITY] = [letter for letter in letters[CROSS_MODALITY] if letter.key not in judged]
        counts = count_outcomes(rows, (letter for step in letters.values() for letter in step))
        # Counted independently, from the samples that stage 1 read, so that the check below can fail.
        seen = [row["uid"] for row in tables.read_table(self._layout.single_modality(shard), ["uid"])]
        later = (letter.uid for step, found in letters.items() if step != SINGLE_MODALITY for letter in found)
        reconcile(f"decisions of shard {shard}", seen, [*(row["uid"] for row in rows), *later], "uids")
        counts[IN, ""] = len(seen) + len(letters[SINGLE_MODALITY])
        halvings = tables.read_halvings(self._layout.cross_modality(shard))
        counts |= {(SMALLER_BATCHES, rule): 1 for rule in halvings}
        _reconcile(shard, counts)
        tables.write_table(self._layout.decisions(shard), rows, tables.decisions_schema(self._recipe))
        _update_metrics(counts)
        yield counts


def _update_metrics(counts: OutcomeCounts) -> None:
    """Add a shard's counts to the funnel's metrics."""
    names = {IN: metrics.FUNNEL_IN, SURVIVORS: metrics.FUNNEL_SURVIVORS, SAMPLES: metrics.FUNNEL_SAMPLES}
    names |= {COPIES: metrics.FUNNEL_COPIES}
    named = {DROPPED: metrics.funnel_dropped, DEAD: metrics.funnel_dead_letters}
    for (what, rule), count in counts.items():
        if what in names:
            metrics.counter(names[what]).inc(count)
        elif what in named:
            metrics.counter(named[what](rule)).inc(count)


def _by_uid(placements: Iterable[Placements]) -> dict[str, Placement]:
    found: dict[str, Placement] = {}
    for placement in itertools.chain.from_iterable(part.one_by_one() for part in placements):
        if found.setdefault(placement.uid, placement) is not placement:
            raise Unaccounted(f"{placement.uid} of shard {placement.shard}: placed twice")
    return found


def _reconcile(where: str, counts: OutcomeCounts) -> None:
    """Raise Unaccounted unless in = dropped + survivors + dead letters."""
    explained = sum(n for (what, _), n in counts.items() if what in (DROPPED, SURVIVORS, DEAD))
    if counts.get((IN, ""), 0) != explained:
        raise Unaccounted(f"{where}: {counts.get((IN, ''), 0)} in, but {explained} dropped, kept or dead-lettered")


def add_counts(counts: Iterable[OutcomeCounts]) -> OutcomeCounts:
    """Return the sum of counts. They are integers, so the order does not matter."""
    total: Counter[tuple[str, str]] = Counter()
    for part in counts:
        total.update(part)
    return dict(total)


def funnel(total: OutcomeCounts, recipe: Recipe) -> dict[str, Any]:
    """Return the content of funnel.json: for each rule in = kept + dropped, in the order in which rules are applied."""
    _reconcile("the pool", total)
    letters = {reason: n for (what, reason), n in sorted(total.items()) if what == DEAD}
    steps = [rule for stage in STAGES for rule in recipe.rules_of(stage)]
    rules, left = [], total.get((IN, ""), 0) - sum(letters.values())
    for rule in steps:
        dropped = total.get((DROPPED, rule.name), 0)
        rules.append({"name": rule.name, "stage": rule.stage, "in": left, "dropped": dropped, "kept": left - dropped})
        left -= dropped
    notes = {note: n for (what, note), n in sorted(total.items()) if what == POOL_NOTES}
    smaller = {rule: n for (what, rule), n in sorted(total.items()) if what == SMALLER_BATCHES}
    return {
        "in": total.get((IN, ""), 0),
        "rules": rules,
        "dead_letters": letters,
        "survivors": total.get((SURVIVORS, ""), 0),
        "samples": total.get((SAMPLES, ""), 0),
        "copies": total.get((COPIES, ""), 0),
        # scored by flipped CLIP, after which the cascade skipped a more expensive model
        NOT_ASKED: {m: total.get((NOT_ASKED, m), 0) for m in _later_models() if getattr(recipe.cross_modality, m)},
        # scored by stage 2 as members of a group of near-duplicates of which another member stays
        SCORED_DUPLICATES: total.get((SCORED_DUPLICATES, ""), 0),
        # shards scored again at smaller batch shapes, because GPU memory ran out
        **({SMALLER_BATCHES: smaller} if smaller else {}),
        # judged samples of which something that the pool says was not used
        **({POOL_NOTES: notes} if notes else {}),
    }


class WriteFunnel(beam.DoFn):
    """OutcomeCounts of the complete pool -> funnel.json."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        self._layout, self._recipe = layout, recipe

    def process(self, total: OutcomeCounts) -> Iterator[str]:
        files.write_json(self._layout.funnel, funnel(total, self._recipe))
        yield self._layout.funnel
