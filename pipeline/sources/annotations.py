"""Reading what earlier stages left: slim rows for the passes over the whole pool."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.pending import as_asked
from transforms.core.recipe import CROSS_MODALITY, SINGLE_MODALITY, Recipe
from transforms.core.records import Annotation, Shard
from transforms.cross_modality.thresholds import KeepFractionThreshold
from transforms.distribution_alignment.records import Candidates, CandidateShard
from transforms.distribution_alignment.work_folder import WorkFolder, write_candidates
from transforms.models.cascade import unscored
from transforms.rules import Thresholds, first_failing, rules_of
from transforms.single_modality.captions import caption_key
from transforms.single_modality.pool_wide import PoolRows

POOL_WIDE_RULES = ("near_duplicate", "caption_frequency")


class MissingScores(ValueError):
    """Samples that a rule has to judge and that were never scored."""


def count_samples(shard: Shard, layout: Layout) -> int:
    """The samples of a shard: those with features, and those that broke before."""
    name = Shard(*shard).name
    letters = tables.read_dead_letters(layout.dead_letters(SINGLE_MODALITY, name))
    return len(tables.read_table(layout.single_modality(name), ["uid"])) + len(letters)


class ReadPoolRows(beam.PTransform):
    """PCollection[Shard] -> PCollection[PoolRows], those of a shard at a time."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__()
        self._layout, self._recipe = layout, recipe

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        return shards | "Read rows" >> beam.ParDo(_ReadPoolRows(self._layout, self._recipe))


class _ReadPoolRows(beam.DoFn):
    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        self._layout, self._recipe = layout, recipe

    def setup(self) -> None:
        self._rules = [r for r in rules_of(self._recipe, SINGLE_MODALITY) if r.name not in POOL_WIDE_RULES]

    def process(self, shard: Shard) -> Iterator[PoolRows]:
        known = [Annotation(**row) for row in tables.read_table(self._layout.single_modality(Shard(*shard).name))]
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
    """PCollection[Shard] -> one `Thresholds`: the recipe's absolute values, or what a `keep_fraction` comes to over
    the samples that reach the rule. The fraction of image-text matching is taken of what passes flipped CLIP, whatever
    the order of the rules, because only that is scored."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__()
        self._layout, self._recipe = layout, recipe

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        models = self._recipe.cross_modality
        thresholds = shards.pipeline | "As the recipe says" >> beam.Create(
            [
                Thresholds(
                    -np.inf if models.flipped_clip.min is None else models.flipped_clip.min,
                    -np.inf if models.image_text_matching is None or models.image_text_matching.min is None
                    else models.image_text_matching.min,
                )
            ]
        )  # fmt: skip
        for field, column, settings in (
            (0, "flipped_clip_cosine", models.flipped_clip),
            (1, "match_probability", models.image_text_matching),
        ):
            if settings is not None and settings.keep_fraction is not None:
                read = _ReadScores(self._layout, self._recipe, column)
                found = (
                    shards
                    | f"Read {column}" >> beam.ParDo(read, AsSingleton(thresholds))
                    | f"Threshold of {column}" >> KeepFractionThreshold(settings.keep_fraction)
                )
                thresholds = thresholds | f"Set {column}" >> beam.Map(_with_threshold, field, AsSingleton(found))
        return thresholds


def _with_threshold(thresholds: Thresholds, field: int, found: float | None) -> Thresholds:
    values = list(thresholds)
    values[field] = -np.inf if found is None else found
    return Thresholds(*values)


class _ReadScores(beam.DoFn):
    """The scores in one column of what stage 1 and the thresholds known so far keep."""

    def __init__(self, layout: Layout, recipe: Recipe, column: str) -> None:
        self._layout, self._recipe, self._column = layout, recipe, column

    def process(self, shard: Shard, thresholds: Thresholds) -> Iterator[float]:
        reaching = Thresholds(*thresholds)._replace(image_text_matching_min_probability=-np.inf)
        if self._column == "flipped_clip_cosine":
            reaching = Thresholds(-np.inf, -np.inf)
        for annotation in _survivors(self._layout, self._recipe, Shard(*shard), reaching):
            yield getattr(annotation, self._column)


def _survivors(
    layout: Layout, recipe: Recipe, shard: Shard, thresholds: Thresholds, *, with_embeddings: bool = False
) -> Iterator[Annotation]:
    """The scored samples of a shard that no rule of stages 1 and 2 drops. Raises MissingScores."""
    rules = rules_of(recipe, SINGLE_MODALITY)
    scored = rules_of(recipe, CROSS_MODALITY, thresholds)
    broken = {letter.key for letter in tables.read_dead_letters(layout.dead_letters(CROSS_MODALITY, shard.name))}
    for known in tables.read_annotations(layout, shard.name, with_embeddings=with_embeddings):
        annotation = as_asked(known, recipe, rules)
        if annotation.key in broken or first_failing(annotation, rules) is not None:
            continue
        missing = unscored(annotation, recipe.cross_modality)
        if missing:
            raise MissingScores(f"{annotation.uid} of shard {shard.name} has no {missing[0]}; run stage cross_modality")
        if first_failing(annotation, scored) is None:
            yield annotation


class ReadCandidates(beam.PTransform):
    """PCollection[Shard] -> PCollection[CandidateShard]: what stages 1 and 2 keep of each, written as arrays to stage
    3's work folder, where every later step reads them."""

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
            _survivors(self._layout, self._recipe, Shard(*shard), Thresholds(*thresholds), with_embeddings=True)
        )
        if survivors:
            write_candidates(self._work.candidates(name), candidates_of(survivors))
            yield CandidateShard(name, len(survivors))


def candidates_of(annotations: Sequence[Annotation]) -> Candidates:
    """The columns that stage 3 works on, of at least one scored sample. Raises ValueError where a cosine is no number
    or an embedding has another width than the others."""
    for a in annotations:
        assert a.flipped_clip_cosine is not None and a.embedding is not None  # it was scored
        if math.isnan(a.flipped_clip_cosine):
            raise ValueError(f"sample {a.uid} of {a.shard}: flipped_clip_cosine is not a number")
    widths = {len(a.embedding) for a in annotations}  # type: ignore[arg-type]
    if len(widths) > 1 or min(widths) == 0 or min(widths) % 2:
        raise ValueError(
            f"shard {annotations[0].shard}: embeddings of {min(widths)} to {max(widths)} bytes; allowed: fp16 values, "
            "two bytes each, equally many for every sample; run stage cross_modality again"
        )
    embeddings = np.frombuffer(b"".join(a.embedding for a in annotations), "<f2")  # type: ignore[misc]
    return Candidates(
        np.array([a.uid.encode() for a in annotations]),
        np.array([a.shard.encode() for a in annotations]),
        np.array([a.flipped_clip_cosine for a in annotations], np.float32),
        np.array([-1.0 if a.digit_probability is None else a.digit_probability for a in annotations], np.float32),
        embeddings.reshape(len(annotations), -1),
    )
