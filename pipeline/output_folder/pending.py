"""What of a shard is done already, and what a recipe still wants of it.

A table says what it was made from, thing by thing: the shard, and each feature or model with the settings that change
what it computes (`only_decide` of the recipe's sections names the others). What was computed once is kept until the
shard or the thing itself changes; so a table may hold more than the recipe at hand asks for (see `as_asked`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.manifest import library_versions
from transforms.core import catalogue
from transforms.core.recipe import CROSS_MODALITY, SINGLE_MODALITY, Recipe
from transforms.core.records import Annotation, DeadLetter, Shard
from transforms.models.cascade import asked, match_floor, prompt_floor, unscored
from transforms.models.fixed_batches import MODEL_FAILED, NOT_FINITE, PREPARATION_FAILED
from transforms.rules import ActiveRule, first_failing, rules_of
from transforms.single_modality.near_duplicate import as_contender

_DIGIT_PROMPTS = "digit_prompts"
"""CLIP's score of the digit prompts. CLIP computes it for the section `digit`, so it has a cache key of its own."""


def _stage_1_columns() -> dict[str, tuple[str, ...]]:
    return {score.name: tuple(score.columns) for score in catalogue.per_sample_scores()}


def _stage_2_columns() -> dict[str, tuple[str, ...]]:
    """The columns of each cache key of stage 2."""
    found = {score.name: tuple(score.columns) for score in catalogue.scores_of(CROSS_MODALITY) if score.columns}
    found["digit"] = ("digit_probability",)
    return {**found, _DIGIT_PROMPTS: ("digit_prompt_probability",)}


_SHARD, _FAILED_AT = "shard", "failed_at"
_FAILURES_OF_MODELS = (PREPARATION_FAILED, MODEL_FAILED, NOT_FINITE)


class ShardTable(NamedTuple):
    """What is to be written of a shard. `samples_back`: rows of a shard that was looked at before, wanted only now."""

    rows: list[dict[str, Any]]
    dead_letters: list[DeadLetter]
    cache_key: dict[str, str]
    halvings: Mapping[str, int]
    samples_back: int = 0


class FeatureCache:
    """Stage 1 looks at all of a shard, unless its table is there already."""

    stage = SINGLE_MODALITY

    def __init__(self, recipe: Recipe, layout: Layout, identities: Mapping[str, Any]) -> None:
        self._layout = layout
        known = identities[SINGLE_MODALITY]
        rules = {score.name: recipe.settings_of(score) for score in catalogue.per_sample_scores()}
        self._pool = _digest(recipe.pool.model_dump(), library_versions(SINGLE_MODALITY))
        self._features = {
            name: _digest(settings.computing, known.get(name)) for name, settings in rules.items() if settings
        }
        self._failures_of_others = {f"{name}_failed" for name, settings in rules.items() if not settings}

    def cache_key(self, shard: Shard) -> dict[str, str]:
        """What the shard's table is made from."""
        return {_SHARD: _digest(shard.fingerprint, self._pool), **self._features}

    def is_complete(self, shard: Shard) -> bool:
        """Whether the shard's features are there. A sample that broke on a rule which is off now has none yet."""
        if not tables.is_complete(self._layout.single_modality(shard.name), self.cache_key(shard)):
            return False
        letters = tables.read_dead_letters(self._layout.dead_letters(self.stage, shard.name))
        return not any(letter.reason in self._failures_of_others for letter in letters)

    def in_progress(self, shard: Shard) -> str:
        """The path of the mark that lies there while the shard is worked on."""
        return self._layout.in_progress(self.stage, shard.name)

    def wanted(self, shard: Shard) -> None:
        """All of the shard."""
        return None

    def table(
        self, shard: Shard, rows: list[dict[str, Any]], letters: list[DeadLetter], halvings: Mapping[str, int]
    ) -> ShardTable:
        """What is to be written, of what was found."""
        return ShardTable(rows, letters, self.cache_key(shard), halvings)


class PoolWideCache:
    """What only the whole pool can tell hangs on every shard, and on which samples the other rules keep."""

    def __init__(self, recipe: Recipe, layout: Layout, identities: Mapping[str, Any], shards: Sequence[Shard]) -> None:
        features = FeatureCache(recipe, layout, identities)
        found = sorted((shard.name, features.cache_key(shard)) for shard in shards)
        self._layout, self.cache_key = layout, {"pool": _digest(found, recipe.single_modality.model_dump())}

    def is_complete(self, shard: Shard) -> bool:
        """Whether the shard's table is there."""
        return tables.is_complete(self._layout.pool_wide(shard.name), self.cache_key)


@dataclasses.dataclass(frozen=True)
class _Known:
    """What is known of a shard before its turn: the scores by key (None: no table is of use), what they were made
    from, the dead letters that still hold, and whether others lie there too."""

    rows: dict[str, dict[str, Any]] | None
    cache_key: dict[str, str]
    letters: list[DeadLetter]
    has_others: bool


class ScoreCache:
    """Stage 2 looks at what stage 1 kept and a score is missing of, and keeps all scores that are there.

    A score does not depend on its batch-mates, so scores of several runs stand in one table as if made at once.
    """

    stage = CROSS_MODALITY

    def __init__(self, recipe: Recipe, layout: Layout, identities: Mapping[str, Any]) -> None:
        self._layout, self._recipe = layout, recipe
        cross, known = recipe.cross_modality, identities[CROSS_MODALITY]
        computed_by = cross.device, cross.precision, library_versions(CROSS_MODALITY)
        self._pool = _digest(recipe.pool.model_dump(), *computed_by)
        sections = {
            score.name: recipe.settings_of(score) for score in catalogue.scores_of(CROSS_MODALITY) if score.columns
        }
        self._models = {
            # Which revision a name stood for, its identity tells.
            name: _digest(settings.computing | {"revision": None}, known.get(name))
            for name, settings in sections.items()
            if settings
        }
        prompts = cross.digit.clip_prompts if cross.digit else None
        if prompts:
            self._models[_DIGIT_PROMPTS] = _digest(self._models["flipped_clip"], prompts.computing)
        # Which model a sample has to fail on to be a dead letter hangs on who is asked.
        floors = cross.flipped_clip.cascade_min_cosine, match_floor(cross), cross.digit and prompt_floor(cross.digit)
        self._floors = _digest(floors)

    def cache_key(self, shard: Shard) -> dict[str, str]:
        """What the shard's table is made from."""
        return {_SHARD: _digest(shard.fingerprint, self._pool), **self._models}

    def is_complete(self, shard: Shard) -> bool:
        """Whether nothing is missing."""
        kept = self._kept(shard)
        known = self._known(shard, kept, with_embeddings=False)
        return known.rows is not None and not known.has_others and not self._missing(kept, known)

    def is_begun(self, shard: Shard) -> bool:
        """Whether scores of the shard are there, be it too few."""
        there = tables.read_cache_key(self._layout.cross_modality(shard.name))
        return there is not None and there.get(_SHARD) == self.cache_key(shard)[_SHARD]

    def in_progress(self, shard: Shard) -> str:
        """The path of the mark that lies there while the shard is worked on."""
        return self._layout.in_progress(self.stage, shard.name)

    def wanted(self, shard: Shard) -> dict[str, Annotation]:
        """The samples that stage 1 keeps and that a score is missing of, by key; with the scores that are there."""
        kept = self._kept(shard)
        return self._missing(kept, self._known(shard, kept, with_embeddings=True))

    def count_wanted(self, shard: Shard) -> int:
        """How many they are."""
        kept = self._kept(shard)
        return len(self._missing(kept, self._known(shard, kept, with_embeddings=False)))

    def _missing(self, kept: Mapping[str, Annotation], known: _Known) -> dict[str, Annotation]:
        broken = {letter.key for letter in known.letters}
        wanted = {}
        for key, annotation in kept.items():
            scored = Annotation(**{**tables.annotation_row(annotation), **(known.rows or {}).get(key, {})})
            if key not in broken and unscored(scored, self._recipe.cross_modality):
                wanted[key] = scored
        return wanted

    def table(
        self, shard: Shard, rows: list[dict[str, Any]], letters: list[DeadLetter], halvings: Mapping[str, int]
    ) -> ShardTable:
        """What is to be written: what was known, and what was found now in its place or beside it; in tar order."""
        known = self._known(shard, self._kept(shard), with_embeddings=True)
        found = {row["key"]: {name: row.get(name) for name in tables.cross_modality_schema().names} for row in rows}
        merged = (known.rows or {}) | found
        broken = {letter.key: letter for letter in (*known.letters, *letters)}
        order = [row["key"] for row in tables.read_table(self._layout.single_modality(shard.name), ["key"])]
        installed = {_SHARD, *_stage_2_columns()}
        cache_key = {**{k: v for k, v in known.cache_key.items() if k in installed}, **self.cache_key(shard)}
        cache_key.pop(_FAILED_AT, None)
        if any(letter.reason in _FAILURES_OF_MODELS for letter in broken.values()):
            cache_key[_FAILED_AT] = self._floors
        back = len(found.keys() - known.rows.keys()) if known.rows is not None else 0
        before = tables.read_halvings(self._layout.cross_modality(shard.name)) if known.rows else {}
        of_models = {rule: n for rule, n in before.items() if known.cache_key.get(rule) == cache_key.get(rule)}
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

    def _known(self, shard: Shard, kept: Mapping[str, Annotation], with_embeddings: bool) -> _Known:
        path, ours = self._layout.cross_modality(shard.name), self.cache_key(shard)
        there = tables.read_cache_key(path)
        if there is None or there.get(_SHARD) != ours[_SHARD]:
            return _Known(None, {}, [], False)
        stale = [name for name in self._models if there.get(name) != ours[name]]
        stale_columns = dict.fromkeys(column for name in stale for column in _stage_2_columns()[name])
        names = [name for name in tables.cross_modality_schema().names if with_embeddings or name != "embedding"]
        rows = {row["key"]: row | stale_columns for row in tables.read_table(path, names)}
        letters = tables.read_dead_letters(self._layout.dead_letters(self.stage, shard.name))
        holding = [
            letter
            for letter in letters
            if not stale
            and letter.key in kept
            and (letter.reason not in _FAILURES_OF_MODELS or there.get(_FAILED_AT) == self._floors)
        ]
        return _Known(rows, there, holding, len(holding) < len(letters))


def as_asked(annotation: Annotation, recipe: Recipe, rules: Sequence[ActiveRule]) -> Annotation:
    """The annotation as a run of `recipe` from nothing would know it: without the features and scores that only
    another recipe, or another pool, asked for. `rules` are the recipe's of stage 1."""
    unasked = [column for score in catalogue.per_sample_scores() if not recipe.is_on(score) for column in score.columns]
    is_kept = first_failing(as_contender(annotation), rules) is None
    for name, columns in _stage_2_columns().items():
        if not is_kept or not _asks(recipe, name, columns, annotation):
            unasked += columns
    known = [column for column in unasked if getattr(annotation, column) is not None]
    return annotation.with_columns(**dict.fromkeys(known)) if known else annotation


def _asks(recipe: Recipe, score: str, columns: Sequence[str], annotation: Annotation) -> bool:
    cross = recipe.cross_modality
    if score == "flipped_clip":
        return True
    if score == _DIGIT_PROMPTS:
        return cross.digit is not None and cross.digit.clip_prompts is not None
    return bool(set(columns) & set(asked(annotation, cross)))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
