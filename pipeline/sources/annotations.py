"""Reads the tables of earlier stages: slim rows for the passes over the complete pool."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
from transforms.single_modality.duplicate_groups import NOT_SCORED, FinalDuplicates, Members
from transforms.single_modality.near_duplicate import as_contender
from transforms.single_modality.perceptual_hash import THUMBNAIL_BYTES
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
            thumbnails=np.array([a.image_thumbnail for a in known], f"S{THUMBNAIL_BYTES}"),
            pixels=_original_pixels(known),
            fails=np.array([first_failing(a, self._rules) is not None for a in known], bool),
            contents=np.array([_content(a) for a in known], np.uint64),
            caption_image_counts=np.zeros(len(known), np.int64),
            duplicate_of=np.zeros(len(known), "S32"),
            keepers=np.zeros(len(known), "S32"),
            ranks=np.full(len(known), NOT_SCORED, np.int32),
        )


def _original_pixels(annotations: Sequence[Annotation]) -> np.ndarray:
    """int64 (n,): the pixels of the original image, where the pool gives its size, else of the stored one."""
    return np.array([(a.original_width_px or 0) * (a.original_height_px or 0) for a in annotations], np.int64)


def _content(annotation: Annotation) -> int:
    """64 bits that identify image bytes and caption."""
    text = f"{annotation.image_sha256} {annotation.caption}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8])


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
        for annotation in _survivors(self._layout, self._recipe, Shard(*shard).name, reaching, earlier_than=index):
            score = getattr(annotation, value)
            if score is not None:
                yield score


def _as_known(annotation: Annotation) -> Annotation:
    """The annotation with stage 1's verdict on near-duplicates: the keeper alone stands for its group."""
    return annotation


def _survivors(layout: Layout, recipe: Recipe, shard: str, thresholds: Thresholds, **how: Any) -> Iterator[Annotation]:
    """The scored samples of a shard that no rule of stages 1 and 2 drops; see `_judged`."""
    judged = _judged(layout, recipe, shard, thresholds, **how)
    return (annotation for annotation, survives in judged if survives)


def _judged(
    layout: Layout,
    recipe: Recipe,
    shard: str,
    thresholds: Thresholds,
    *,
    seen_as: Callable[[Annotation], Annotation] = _as_known,
    with_embeddings: bool = False,
    earlier_than: int | None = None,
) -> Iterator[tuple[Annotation, bool]]:
    """Each sample of a shard, and whether it is scored and no rule of stages 1 and 2 drops it. Raises MissingScores.

    `seen_as` gives the annotation that is judged. With `earlier_than`, only the first rules of stage 2 count.
    """
    rules = rules_of(recipe, SINGLE_MODALITY)
    earlier = {rule.name for rule in rules_of_stage(CROSS_MODALITY)[:earlier_than]}
    scored = [rule for rule in rules_of(recipe, CROSS_MODALITY, thresholds) if rule.name in earlier]
    broken = {letter.key for letter in tables.read_dead_letters(layout.dead_letters(CROSS_MODALITY, shard))}
    for known in tables.read_annotations(layout, shard, with_embeddings=with_embeddings):
        annotation = restrict_to_recipe(known, recipe, rules)
        judged = seen_as(annotation)
        if annotation.key in broken or first_failing(judged, rules) is not None:
            yield annotation, False
            continue
        missing = unscored(annotation, recipe.cross_modality)
        if missing:
            raise MissingScores(f"{annotation.uid} of shard {shard} has no {missing[0]}; run stage cross_modality")
        yield annotation, first_failing(judged, scored) is None


class ReadMembers(beam.PTransform):
    """PCollection[Shard] -> PCollection[Members]: the samples that have near-duplicates, after stage 2."""

    def __init__(self, layout: Layout, recipe: Recipe, thresholds: beam.PCollection) -> None:
        super().__init__()
        self._layout, self._recipe, self._thresholds = layout, recipe, thresholds

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        read = _ReadMembers(self._layout, self._recipe)
        return shards | "Read shard" >> beam.ParDo(read, AsSingleton(self._thresholds))


class _ReadMembers(beam.DoFn):
    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        self._layout, self._recipe = layout, recipe

    def process(self, shard: Shard, thresholds: Thresholds) -> Iterator[Members]:
        if self._recipe.single_modality.near_duplicate is None:
            return
        judged = _judged(self._layout, self._recipe, Shard(*shard).name, thresholds, seen_as=as_contender)
        members = [(a, survives) for a, survives in judged if a.near_duplicate_group is not None]
        if members:
            yield members_of(members)


def members_of(judged: Sequence[tuple[Annotation, bool]]) -> Members:
    """The columns of at least one member of a group, each with whether it survives all other rules. A surviving keeper
    that is judged in another group takes part in both."""
    own = [(a.near_duplicate_group, False, a, survives) for a, survives in judged]
    kept = [
        (a.uid, True, a, survives)
        for a, survives in judged
        if survives and a.near_duplicate_rank == 0 and a.uid != a.near_duplicate_group
    ]
    groups, visits, annotations, survives = zip(*own, *kept, strict=True)
    return Members(
        keepers=np.array(groups, "S32"),
        uids=np.array([a.uid for a in annotations], "S32"),
        shards=np.array([a.shard for a in annotations], "S"),
        duplicate_of=np.array([a.duplicate_of or "" for a in annotations], "S32"),
        visits=np.array(visits, bool),
        scored=np.array([a.near_duplicate_rank is not None for a in annotations], bool),
        survives=np.array(survives, bool),
        pixels=_original_pixels(annotations),
        images=np.array([int((a.image_sha256 or "0")[:16], 16) for a in annotations], np.uint64),
        cosines=np.array([a.flipped_clip_cosine or 0.0 for a in annotations], np.float32),
    )


class ReadCandidates(beam.PTransform):
    """{shard names, changes} -> PCollection[CandidateShard]. Both inputs are keyed by shard name.

    Writes the samples that stages 1 and 2 keep to stage 3's work folder as arrays, which all later steps read.
    """

    SHARDS, CHANGES = "shards", "changes"

    def __init__(self, layout: Layout, recipe: Recipe, work: WorkFolder, thresholds: beam.PCollection) -> None:
        super().__init__()
        self._layout, self._recipe, self._work, self._thresholds = layout, recipe, work, thresholds

    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection:
        read = _ReadCandidates(self._layout, self._recipe, self._work)
        return (
            inputs
            | "Gather changes" >> beam.CoGroupByKey()
            | "Read survivors" >> beam.ParDo(read, AsSingleton(self._thresholds))
        )


class _ReadCandidates(beam.DoFn):
    def __init__(self, layout: Layout, recipe: Recipe, work: WorkFolder) -> None:
        self._layout, self._recipe, self._work = layout, recipe, work

    def process(self, group: tuple[str, dict[str, Any]], thresholds: Thresholds) -> Iterator[CandidateShard]:
        shard, inputs = group
        final = FinalDuplicates(inputs[ReadCandidates.CHANGES])
        survivors = list(_survivors(self._layout, self._recipe, shard, thresholds, seen_as=final, with_embeddings=True))
        if survivors:
            write_candidates(self._work.candidates(shard), candidates_of(survivors))
            yield CandidateShard(shard, len(survivors))


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
