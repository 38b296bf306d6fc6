"""The caches of the stages: which results of a shard exist, and which a recipe still needs.

A table has a cache key: a digest of the shard, and one of each feature or model with the settings that change its
results (`only_decide` of the recipe's sections names the settings that do not). A result is kept until the shard or its
own feature or model changes. A table may therefore hold more than a recipe needs (see `restrict_to_recipe`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.output_folder import tables
from pipeline.output_folder.img2dataset_stats import STATS_MISMATCH, mismatch_letters, successes
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.manifest import computing_versions
from transforms.core import catalogue
from transforms.core.recipe import CROSS_MODALITY, SINGLE_MODALITY, Recipe
from transforms.core.records import Annotation, DeadLetter, Shard
from transforms.models.cascade import (
    MODEL_FAILED,
    NOT_FINITE,
    PREPARATION_FAILED,
    asked,
    match_floor,
    prompt_floor,
    unscored,
)
from transforms.rules import ActiveRule, first_failing, rules_of
from transforms.single_modality.near_duplicate import as_contender
from transforms.storage import files

_DIGIT_PROMPTS = "digit_prompts"
"""The entry of the cache key for CLIP's score of the digit prompts, which CLIP computes for the section `digit`."""


def _stage_2_columns() -> dict[str, tuple[str, ...]]:
    """Return the columns of each entry of stage 2's cache key."""
    found = {score.name: tuple(score.columns) for score in catalogue.scores_of(CROSS_MODALITY) if score.columns}
    found["digit"] = ("digit_probability",)
    return {**found, _DIGIT_PROMPTS: ("digit_prompt_probability",)}


_SHARD, _FAILED_AT = "shard", "failed_at"
_FAILURES_OF_MODELS = (PREPARATION_FAILED, MODEL_FAILED, NOT_FINITE)


class ShardTable(NamedTuple):
    """The content of a shard's table. `samples_back` counts rows that are new although the shard was scored before."""

    rows: list[dict[str, Any]]
    dead_letters: list[DeadLetter]
    cache_key: dict[str, str]
    halvings: Mapping[str, int]
    samples_back: int = 0


class FeatureCache:
    """The features of stage 1. A shard without a complete table is read completely."""

    stage = SINGLE_MODALITY

    def __init__(self, recipe: Recipe, layout: Layout, identities: Mapping[str, Any]) -> None:
        self._layout = layout
        known = identities[SINGLE_MODALITY]
        rules = {score.name: recipe.settings_of(score) for score in catalogue.per_sample_scores()}
        self._pool = _digest(recipe.pool.computing, recipe.pool.keep_columns, computing_versions(SINGLE_MODALITY))
        self._skips_mismatches = recipe.pool.stats_mismatch == "skip"
        self._features = {
            name: _digest(settings.computing, known.get(name)) for name, settings in rules.items() if settings
        }
        self._failures_of_others = {f"{name}_failed" for name, settings in rules.items() if not settings}

    def cache_key(self, shard: Shard) -> dict[str, str]:
        """Return the cache key of the shard's table."""
        return {_SHARD: _digest(shard.fingerprint, self._pool), **self._features}

    def is_complete(self, shard: Shard) -> bool:
        """Return whether the shard has all features. A sample that failed on a rule that is now off has none yet."""
        if not tables.is_complete(self._layout.single_modality(shard.name), self.cache_key(shard)):
            return False
        letters = tables.read_dead_letters(self._layout.dead_letters(self.stage, shard.name))
        if any(letter.reason in self._failures_of_others for letter in letters):
            return False
        return self._agrees_with_stats(shard, letters)

    def wanted(self, shard: Shard) -> None:
        """Return None: all samples of the shard."""
        return None

    def table(
        self, shard: Shard, rows: list[dict[str, Any]], letters: list[DeadLetter], halvings: Mapping[str, int]
    ) -> ShardTable:
        """Return the table to write."""
        mismatches = mismatch_letters(shard, self.stage, rows, letters, self._skips_mismatches)
        if any(letter.key for letter in mismatches):
            rows = []
        return ShardTable(rows, letters + mismatches, self.cache_key(shard), halvings)

    def _agrees_with_stats(self, shard: Shard, letters: list[DeadLetter]) -> bool:
        """Return whether the table was made with the current img2dataset stats and the current setting for them."""
        before = {letter for letter in letters if letter.reason == STATS_MISMATCH}
        if not before and successes(shard.path) is None:
            return True
        if not files.exists(shard.path):  # the pool has gone, and its stats with it
            return True
        rows: list[Any] = tables.read_table(self._layout.single_modality(shard.name), ["uid", "key"])
        rows += [letter._asdict() for letter in before if letter.key]
        others = [letter for letter in letters if letter not in before]
        return before == set(mismatch_letters(shard, self.stage, rows, others, self._skips_mismatches))


class PoolWideCache:
    """The pool-wide columns. They depend on every shard, and on which samples the other rules keep."""

    def __init__(self, recipe: Recipe, layout: Layout, identities: Mapping[str, Any], shards: Sequence[Shard]) -> None:
        features = FeatureCache(recipe, layout, identities)
        found = sorted((shard.name, features.cache_key(shard)) for shard in shards)
        self._layout, self.cache_key = layout, {"pool": _digest(found, recipe.single_modality.model_dump())}

    def is_complete(self, shard: Shard) -> bool:
        """Return whether the shard has a complete table."""
        return tables.is_complete(self._layout.pool_wide(shard.name), self.cache_key)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The stored results of a shard.

    `rows` by key, None if no table is valid; their cache key; the dead letters that are still valid; and whether there
    are stale ones.
    """

    rows: dict[str, dict[str, Any]] | None
    cache_key: dict[str, str]
    letters: list[DeadLetter]
    has_stale_letters: bool


class ScoreCache:
    """The scores of stage 2. Only samples that stage 1 keeps and that lack a score are read; stored scores are kept.

    A score does not depend on the other rows of its batch, so one table can hold the scores of several runs.
    """

    stage = CROSS_MODALITY

    def __init__(self, recipe: Recipe, layout: Layout, identities: Mapping[str, Any]) -> None:
        self._layout, self._recipe = layout, recipe
        cross, known = recipe.cross_modality, identities[CROSS_MODALITY]
        computed_by = cross.device, cross.precision, computing_versions(CROSS_MODALITY)
        self._pool = _digest(recipe.pool.computing, *computed_by)
        sections = {
            score.name: recipe.settings_of(score) for score in catalogue.scores_of(CROSS_MODALITY) if score.columns
        }
        self._models = {
            # The identity contains the revision that was used.
            name: _digest(settings.computing | {"revision": None}, known.get(name))
            for name, settings in sections.items()
            if settings
        }
        prompts = cross.digit.clip_prompts if cross.digit else None
        if prompts:
            self._models[_DIGIT_PROMPTS] = _digest(self._models["flipped_clip"], prompts.computing)
        # The thresholds decide which models score a sample, and so which failures make it a dead letter.
        floors = cross.flipped_clip.cascade_min_cosine, match_floor(cross), cross.digit and prompt_floor(cross.digit)
        self._floors = _digest(floors)

    def cache_key(self, shard: Shard) -> dict[str, str]:
        """Return the cache key of the shard's table."""
        return {_SHARD: _digest(shard.fingerprint, self._pool), **self._models}

    def is_complete(self, shard: Shard) -> bool:
        """Return whether the shard has all scores."""
        kept = self._kept(shard)
        stored = self._stored(shard, kept, with_embeddings=False)
        return stored.rows is not None and not stored.has_stale_letters and not self._missing(kept, stored)

    def has_scores(self, shard: Shard) -> bool:
        """Return whether the shard has a valid table of scores, complete or not."""
        there = tables.read_cache_key(self._layout.cross_modality(shard.name))
        return there is not None and there.get(_SHARD) == self.cache_key(shard)[_SHARD]

    def wanted(self, shard: Shard) -> dict[str, Annotation]:
        """Return the samples that stage 1 keeps and that lack a score, by key, with their stored scores."""
        kept = self._kept(shard)
        return self._missing(kept, self._stored(shard, kept, with_embeddings=True))

    def count_wanted(self, shard: Shard) -> int:
        """Return the number of samples that `wanted` returns."""
        kept = self._kept(shard)
        return len(self._missing(kept, self._stored(shard, kept, with_embeddings=False)))

    def _missing(self, kept: Mapping[str, Annotation], stored: _Stored) -> dict[str, Annotation]:
        broken = {letter.key for letter in stored.letters}
        wanted = {}
        for key, annotation in kept.items():
            scored = Annotation(**{**tables.annotation_row(annotation), **(stored.rows or {}).get(key, {})})
            if key not in broken and unscored(scored, self._recipe.cross_modality):
                wanted[key] = scored
        return wanted

    def table(
        self, shard: Shard, rows: list[dict[str, Any]], letters: list[DeadLetter], halvings: Mapping[str, int]
    ) -> ShardTable:
        """Return the table to write: stored rows, replaced or extended by new ones, in tar order."""
        stored = self._stored(shard, self._kept(shard), with_embeddings=True)
        found = {row["key"]: {name: row.get(name) for name in tables.cross_modality_schema().names} for row in rows}
        merged = (stored.rows or {}) | found
        broken = {letter.key: letter for letter in (*stored.letters, *letters)}
        order = [row["key"] for row in tables.read_table(self._layout.single_modality(shard.name), ["key"])]
        installed = {_SHARD, *_stage_2_columns()}
        cache_key = {**{k: v for k, v in stored.cache_key.items() if k in installed}, **self.cache_key(shard)}
        cache_key.pop(_FAILED_AT, None)
        if any(letter.reason in _FAILURES_OF_MODELS for letter in broken.values()):
            cache_key[_FAILED_AT] = self._floors
        back = len(found.keys() - stored.rows.keys()) if stored.rows is not None else 0
        before = tables.read_halvings(self._layout.cross_modality(shard.name)) if stored.rows else {}
        of_models = {rule: n for rule, n in before.items() if stored.cache_key.get(rule) == cache_key.get(rule)}
        return ShardTable(
            [merged[key] for key in order if key in merged and key not in broken],
            [broken[key] for key in order if key in broken],
            cache_key,
            {rule: max(of_models.get(rule, 0), halvings.get(rule, 0)) for rule in {**of_models, **halvings}},
            back,
        )

    def _kept(self, shard: Shard) -> dict[str, Annotation]:
        rules = rules_of(self._recipe, SINGLE_MODALITY)
        annotations = map(as_contender, tables.read_annotations(self._layout, shard.name, with_scores=False))
        return {a.key: a for a in annotations if first_failing(a, rules) is None}

    def _stored(self, shard: Shard, kept: Mapping[str, Annotation], with_embeddings: bool) -> _Stored:
        path, ours = self._layout.cross_modality(shard.name), self.cache_key(shard)
        there = tables.read_cache_key(path)
        if there is None or there.get(_SHARD) != ours[_SHARD]:
            return _Stored(None, {}, [], False)
        stale = [name for name in self._models if there.get(name) != ours[name]]
        stale_columns = dict.fromkeys(column for name in stale for column in _stage_2_columns()[name])
        names = [name for name in tables.cross_modality_schema().names if with_embeddings or name != "embedding"]
        rows = {row["key"]: row | stale_columns for row in tables.read_table(path, names)}
        letters = tables.read_dead_letters(self._layout.dead_letters(self.stage, shard.name))
        valid = [
            letter
            for letter in letters
            if not stale
            and letter.key in kept
            and (letter.reason not in _FAILURES_OF_MODELS or there.get(_FAILED_AT) == self._floors)
        ]
        return _Stored(rows, there, valid, len(valid) < len(letters))


def restrict_to_recipe(annotation: Annotation, recipe: Recipe, rules: Sequence[ActiveRule]) -> Annotation:
    """Return the annotation that a run of `recipe` from scratch would compute.

    Removes the features and scores that only another recipe, or another state of the pool, needed. `rules` are the
    recipe's rules of stage 1.
    """
    extra = [column for score in catalogue.per_sample_scores() if not recipe.is_on(score) for column in score.columns]
    is_kept = first_failing(as_contender(annotation), rules) is None
    for name, columns in _stage_2_columns().items():
        if not is_kept or not _asks(recipe, name, columns, annotation):
            extra += columns
    computed = [column for column in extra if getattr(annotation, column) is not None]
    return annotation.with_columns(**dict.fromkeys(computed)) if computed else annotation


def _asks(recipe: Recipe, score: str, columns: Sequence[str], annotation: Annotation) -> bool:
    cross = recipe.cross_modality
    if score == "flipped_clip":
        return True
    if score == _DIGIT_PROMPTS:
        return cross.digit is not None and cross.digit.clip_prompts is not None
    return bool(set(columns) & set(asked(annotation, cross)))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
