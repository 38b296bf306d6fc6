"""Reads the tables of earlier stages: slim rows for the passes over the complete pool."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.pending import restrict_to_recipe
from transforms.core.catalogue import rules_of_stage
from transforms.core.recipe import CROSS_MODALITY, SINGLE_MODALITY, Recipe
from transforms.core.records import Annotation, Shard
from transforms.cross_modality.thresholds import KeepFractionThreshold
from transforms.distribution_alignment.records import Candidates, CandidateShard
from transforms.distribution_alignment.work_folder import WorkFolder, write_candidates
from transforms.models.cascade import unscored
from transforms.rules import KEEP_ALL, Thresholds, first_failing, has_keep_fraction, rules_of
from transforms.single_modality.captions import caption_key
from transforms.single_modality.pool_wide import PoolRows


class MissingScores(ValueError):
    """A sample that a rule has to judge was never scored."""


def count_samples(shard: Shard, layout: Layout) -> int:
    """Return the number of samples of a shard: those with features, and dead letters of stage 1."""
    name = Shard(*shard).name
    letters = tables.read_dead_letters(layout.dead_letters(SINGLE_MODALITY, name))
    return len(tables.read_table(layout.single_modality(name), ["uid"])) + len(letters)


class ReadPoolRows(beam.PTransform):
    """PCollection[Shard] -> PCollection[PoolRows], one element for each shard that has rows."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__()
        self._layout, self._recipe = layout, recipe

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        return shards | "Read rows" >> beam.ParDo(_ReadPoolRows(self._layout, self._recipe))


class _ReadPoolRows(beam.DoFn):
    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        self._layout, self._recipe = layout, recipe

    def setup(self) -> None:
        self._rules = [r for r in rules_of(self._recipe, SINGLE_MODALITY) if not r.rule.pool_wide]

    def process(self, shard: Shard) -> Iterator[PoolRows]:
        known = [
            Annotation(**row)
            for row in tables.read_table(
                self._layout.single_modality(Shard(*shard).name), tables.single_modality_schema().names
            )
        ]
        if not known:
            return
        yield PoolRows(
            uids=np.array([a.uid for a in known], "S32"),
            shards=np.array([a.shard for a in known], "S"),
            keys=np.array([a.key for a in known], object),
            caption_keys=np.array([caption_key(a.caption) for a in known], "S32"),
            hashes=np.array([int(a.perceptual_hash or "", 16) for a in known], np.uint64),
            pixels=np.array([(a.width_px or 0) * (a.height_px or 0) for a in known], np.int64),
            fails=np.array([first_failing(a, self._rules) is not None for a in known], bool),
            caption_image_counts=np.zeros(len(known), np.int64),
            duplicate_of=np.zeros(len(known), "S32"),
        )


class ReadThresholds(beam.PTransform):
    """PCollection[Shard] -> one `Thresholds`: the score that corresponds to each `keep_fraction`.

    The fraction refers to the samples that stage 1 keeps and that pass the rules whose models run earlier, because only
    these are scored. The order of the rules in the recipe does not matter.
    """

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__()
        self._layout, self._recipe = layout, recipe

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        thresholds = shards.pipeline | "No threshold yet" >> beam.Create([{}])
        for rule in rules_of_stage(CROSS_MODALITY):
            if not has_keep_fraction(rule, self._recipe):
                continue
            read = _ReadScores(self._layout, self._recipe, rule.name)
            found = (
                shards
                | f"Read {rule.value}" >> beam.ParDo(read, AsSingleton(thresholds))
                | f"Threshold of {rule.value}"
                >> KeepFractionThreshold(getattr(self._recipe.settings_of(rule), "keep_fraction"))  # noqa: B009
            )
            thresholds = thresholds | f"Set {rule.value}" >> beam.Map(_with_threshold, rule.name, AsSingleton(found))
        return thresholds


def _with_threshold(thresholds: Thresholds, rule: str, found: float | None) -> Thresholds:
    return {**thresholds, rule: KEEP_ALL if found is None else found}


class _ReadScores(beam.DoFn):
    """Yields the scores of one rule for the samples that stage 1 and the earlier models keep."""

    def __init__(self, layout: Layout, recipe: Recipe, rule: str) -> None:
        self._layout, self._recipe, self._rule = layout, recipe, rule

    def process(self, shard: Shard, thresholds: Thresholds) -> Iterator[float]:
        names = [rule.name for rule in rules_of_stage(CROSS_MODALITY)]
        index = names.index(self._rule)
        value = rules_of_stage(CROSS_MODALITY)[index].value
        assert value is not None
        # A rule whose threshold is not known yet, including this one, drops nothing here.
        reaching = {**dict.fromkeys(names, KEEP_ALL), **thresholds}
        for annotation in _survivors(
            self._layout, self._recipe, Shard(*shard), reaching, earlier_than=index
        ):
            score = getattr(annotation, value)
            if score is not None:
                yield score


def _survivors(
    layout: Layout,
    recipe: Recipe,
    shard: Shard,
    thresholds: Thresholds,
    *,
    with_embeddings: bool = False,
    earlier_than: int | None = None,
) -> Iterator[Annotation]:
    """Yield the scored samples of a shard that no rule of stages 1 and 2 drops. Raises MissingScores."""
    rules = rules_of(recipe, SINGLE_MODALITY)
    earlier = {rule.name for rule in rules_of_stage(CROSS_MODALITY)[:earlier_than]}
    scored = [rule for rule in rules_of(recipe, CROSS_MODALITY, thresholds) if rule.name in earlier]
    broken = {letter.key for letter in tables.read_dead_letters(layout.dead_letters(CROSS_MODALITY, shard.name))}
    for known in tables.read_annotations(layout, shard.name, with_embeddings=with_embeddings):
        annotation = restrict_to_recipe(known, recipe, rules)
        if annotation.key in broken or first_failing(annotation, rules) is not None:
            continue
        missing = unscored(annotation, recipe.cross_modality)
        if missing:
            raise MissingScores(f"{annotation.uid} of shard {shard.name} has no {missing[0]}; run stage cross_modality")
        if first_failing(annotation, scored) is None:
            yield annotation


class ReadCandidates(beam.PTransform):
    """PCollection[Shard] -> PCollection[CandidateShard].

    Writes the samples that stages 1 and 2 keep to stage 3's work folder as arrays, which all later steps read.
    """

    def __init__(self, layout: Layout, recipe: Recipe, work: WorkFolder, thresholds: beam.PCollection) -> None:
        super().__init__()
        self._layout, self._recipe, self._work, self._thresholds = layout, recipe, work, thresholds

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        read = _ReadCandidates(self._layout, self._recipe, self._work)
        return shards | "Read survivors" >> beam.ParDo(read, AsSingleton(self._thresholds))


class _ReadCandidates(beam.DoFn):
    def __init__(self, layout: Layout, recipe: Recipe, work: WorkFolder) -> None:
        self._layout, self._recipe, self._work = layout, recipe, work

    def process(self, shard: Shard, thresholds: Thresholds) -> Iterator[CandidateShard]:
        name = Shard(*shard).name
        survivors = list(
            _survivors(self._layout, self._recipe, Shard(*shard), thresholds, with_embeddings=True)
        )
        if survivors:
            write_candidates(self._work.candidates(name), candidates_of(survivors))
            yield CandidateShard(name, len(survivors))


def candidates_of(annotations: Sequence[Annotation]) -> Candidates:
    """Return the columns that stage 3 needs, for at least one scored sample.

    Raises ValueError if a cosine is NaN or the embeddings differ in width.
    """
    for a in annotations:
        assert a.flipped_clip_cosine is not None and a.embedding is not None  # it was scored
        if math.isnan(a.flipped_clip_cosine):
            raise ValueError(f"sample {a.uid} of {a.shard}: flipped_clip_cosine is not a number")
    widths = {len(a.embedding) for a in annotations}
    if len(widths) > 1 or min(widths) == 0 or min(widths) % 2:
        raise ValueError(
            f"shard {annotations[0].shard}: embeddings of {min(widths)} to {max(widths)} bytes; allowed: fp16 values, "
            "two bytes each, the same number for every sample; run stage cross_modality again"
        )
    embeddings = np.frombuffer(b"".join(a.embedding for a in annotations), "<f2")
    return Candidates(
        np.array([a.uid.encode() for a in annotations]),
        np.array([a.shard.encode() for a in annotations]),
        np.array([a.flipped_clip_cosine for a in annotations], np.float32),
        np.array([-1.0 if a.digit_probability is None else a.digit_probability for a in annotations], np.float32),
        embeddings.reshape(len(annotations), -1),
    )
