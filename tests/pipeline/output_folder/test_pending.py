"""The caches: results are computed again only if the shard, a feature or a model has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.pending import FeatureCache, PoolWideCache, ScoreCache, restrict_to_recipe
from tests.helpers import annotation, recipe, uid
from transforms.core.recipe import CROSS_MODALITY, SINGLE_MODALITY, STAGES
from transforms.core.records import DeadLetter, Shard
from transforms.rules import rules_of

SHARD = Shard("00000", "/p/00000.tar", "1")
KNOWN: dict[str, Any] = {stage: {} for stage in STAGES}
PROMPTS = {"min_probability": 0.5}


def single(**changes: Any) -> dict[str, str]:
    return FeatureCache(recipe(**changes), Layout("/out"), KNOWN).cache_key(SHARD)


def cross(**changes: Any) -> dict[str, str]:
    return ScoreCache(recipe(**changes), Layout("/out"), KNOWN).cache_key(SHARD)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, set()),
        ({"pool": {"max_image_bytes": 10}}, {"shard"}),
        ({"single_modality__language": {"allowed": ["en"], "model": "other.bin"}}, {"language"}),
        ({"single_modality__pos_pattern__max_words": 3}, {"pos_pattern"}),
        ({"single_modality__face_area": ...}, {"face_area"}),
        # settings that only decide
        ({"single_modality__caption_length": {"min_words": 1, "min_characters": 1}}, set()),
        ({"single_modality__language": {"allowed": ["de"]}}, set()),
        ({"single_modality__pos_pattern": {"tagger": "bundled", "any_of": ["JJ"], "only_of": []}}, set()),
        ({"single_modality__face_area": {"max_share": 0.1}}, set()),
        ({"single_modality__near_duplicate": {"max_hamming": 1}, "single_modality__min_side": ...}, set()),
        ({"seed": 5, "name": "other", "cross_modality__flipped_clip__min": 0.3}, set()),
    ],
)
def test_settings_that_change_the_features(changes: dict[str, Any], names: set[str]) -> None:
    assert changed(single(), single(**changes)) == names


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"pool": {"max_image_pixels": 10}}, {"shard"}),
        ({"cross_modality__precision": "bf16"}, {"shard"}),
        ({"cross_modality__flipped_clip__batch_size": 3}, {"flipped_clip"}),
        ({"cross_modality__flipped_clip__score_unflipped": False}, {"flipped_clip"}),
        ({"cross_modality__image_text_matching": {"model": "other", "min": 0.0071}}, {"image_text_matching"}),
        ({"cross_modality__image_text_matching": {"model": "bundled:itm", "min": 0.1, "max_tokens": 9}},
         {"image_text_matching"}),
        ({"cross_modality__digit": {"model": "bundled:digit", "prompts": ["?"]}}, {"digit"}),
        ({"cross_modality__digit": {"model": "bundled:digit", "clip_prompts": PROMPTS}}, {"digit_prompts"}),
        # settings that only decide
        ({"cross_modality__flipped_clip__min": 0.1}, set()),
        ({"cross_modality__flipped_clip__digit_rescue": {"min_cosine": 0.1}}, set()),
        ({"cross_modality__image_text_matching": {"model": "bundled:itm", "keep_fraction": 0.5}}, set()),
        ({"single_modality__face_area": ..., "distribution_alignment__max_copies": 20, "seed": 3}, set()),
    ],
)  # fmt: skip
def test_settings_that_change_the_scores(changes: dict[str, Any], names: set[str]) -> None:
    assert changed(cross(), cross(**changes)) == names


def test_minimum_prompt_probability_does_not_change_the_cache_key() -> None:
    one, other = (
        cross(cross_modality__digit={"model": "bundled:digit", "clip_prompts": {"min_probability": share}})
        for share in (0.1, 0.5)
    )
    assert changed(one, other) == set()


def test_another_file_with_the_same_name_is_another_model() -> None:
    known = KNOWN | {CROSS_MODALITY: {"digit": {"sha256": "x"}}, SINGLE_MODALITY: {"pos_pattern": {"sha256": "x"}}}
    layout = Layout("/out")
    assert changed(cross(), ScoreCache(recipe(), layout, known).cache_key(SHARD)) == {"digit"}
    assert changed(single(), FeatureCache(recipe(), layout, known).cache_key(SHARD)) == {"pos_pattern"}


def test_cache_key_depends_on_the_shard_and_not_on_paths() -> None:
    cache, elsewhere = (FeatureCache(recipe(), Layout(output), KNOWN) for output in ("/out", "/elsewhere"))
    assert changed(cache.cache_key(SHARD), cache.cache_key(SHARD._replace(fingerprint="2"))) == {"shard"}
    assert elsewhere.cache_key(SHARD._replace(path="/elsewhere/00000.tar")) == cache.cache_key(SHARD)


def test_pool_wide_columns_depend_on_every_shard_and_on_the_thresholds_of_stage_1() -> None:
    def over(*shards: Shard, **changes: Any) -> dict[str, str]:
        return PoolWideCache(recipe(**changes), Layout("/out"), KNOWN, shards).cache_key

    other = Shard("00001", "/p/00001.tar", "1")
    assert over(SHARD, other) == over(other, SHARD) == over(SHARD, other, seed=4)
    assert over(SHARD) != over(SHARD, other)
    assert over(SHARD) != over(SHARD, single_modality__aspect_ratio={"max_ratio": 2.0})


# Stage 2 on a shard -----------------------------------------------------------------------------------------------


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A shard of 6 samples. Stage 1 keeps k0, k2 and k4, and also k1 and k3 if one word is enough.

    k5 has no pool-wide row, because its uid is repeated in another shard.
    """
    layout = Layout(str(tmp_path))
    rows = [annotation(uid=uid(n), shard="00000", key=f"k{n}", word_count=6 if n % 2 == 0 else 1) for n in range(6)]
    written = [tables.annotation_row(row) for row in rows]
    tables.write_table(layout.single_modality("00000"), written, tables.single_modality_schema())
    tables.write_table(layout.pool_wide("00000"), written[:5], tables.pool_wide_schema())
    return layout


ONE_WORD: dict[str, Any] = {"single_modality__caption_length": {"min_words": 1, "min_characters": 1}}
HIGH: dict[str, Any] = {"cross_modality__flipped_clip__min": 0.5}
LOW: dict[str, Any] = {"cross_modality__flipped_clip__min": 0.1}


def scored(layout: Layout, key: str, **scores: Any) -> dict[str, Any]:
    known = {"uid": uid(int(key[1:])), "key": key, "flipped_clip_cosine": 0.25, "embedding": b"e" + key.encode()}
    return dict.fromkeys(tables.cross_modality_schema().names) | known | scores


def write(
    layout: Layout, rows: list[dict[str, Any]], letters: tuple[DeadLetter, ...] = (), **changes: Any
) -> ScoreCache:
    """Write the table of stage 2 for `rows`."""
    cache = ScoreCache(recipe(**changes), layout, KNOWN)
    table = cache.table(SHARD, rows, list(letters), {})
    tables.write_dead_letters(layout.dead_letters(CROSS_MODALITY, "00000"), table.dead_letters)
    tables.write_table(layout.cross_modality("00000"), table.rows, tables.cross_modality_schema(), table.cache_key)
    return cache


def cache(layout: Layout, **changes: Any) -> ScoreCache:
    return ScoreCache(recipe(**changes), layout, KNOWN)


def test_stage_2_needs_the_samples_that_stage_1_kept(layout: Layout) -> None:
    wanted = cache(layout).wanted(SHARD)
    assert {key: a.uid for key, a in wanted.items()} == {"k0": uid(0), "k2": uid(2), "k4": uid(4)}
    assert not cache(layout).is_complete(SHARD)


def test_only_samples_without_scores_are_needed(layout: Layout) -> None:
    done = write(layout, [scored(layout, key) for key in ("k0", "k2", "k4")], **HIGH)
    assert done.is_complete(SHARD)
    assert not done.is_complete(SHARD._replace(fingerprint="2"))
    assert set(cache(layout, **HIGH, **ONE_WORD).wanted(SHARD)) == {"k1", "k3"}
    assert set(cache(layout, **LOW).wanted(SHARD)) == {"k0", "k2", "k4"}
    assert {a.flipped_clip_cosine for a in cache(layout, **LOW).wanted(SHARD).values()} == {0.25}
    assert cache(layout, **HIGH, distribution_alignment__max_copies=20, seed=3).is_complete(SHARD)


def test_merged_table_equals_one_written_at_once(layout: Layout, tmp_path: Path) -> None:
    whole = {"match_probability": 0.75, "digit_probability": 0.5}
    write(layout, [scored(layout, key) for key in ("k4", "k0", "k2")], **HIGH)
    more = [scored(layout, "k0", **whole), scored(layout, "k3", **whole), scored(layout, "k1", **whole)]
    table = cache(layout, **LOW, **ONE_WORD).table(SHARD, more, [], {})
    assert table.samples_back == 2
    at_once = [scored(layout, f"k{n}", **(whole if n in (0, 1, 3) else {})) for n in range(5)]
    assert table.rows == at_once
    write(layout, more, **LOW, **ONE_WORD)
    merged = Path(layout.cross_modality("00000")).read_bytes()
    Path(layout.cross_modality("00000")).unlink()
    write(layout, at_once, **LOW, **ONE_WORD)
    assert Path(layout.cross_modality("00000")).read_bytes() == merged


def test_halvings_are_kept_until_their_model_changes(layout: Layout) -> None:
    def table(halvings: dict[str, int], **changes: Any) -> dict[str, int]:
        found = cache(layout, **changes).table(SHARD, [scored(layout, "k0")], [], halvings)
        path = layout.cross_modality("00000")
        tables.write_table(path, found.rows, tables.cross_modality_schema(), found.cache_key, found.halvings)
        return dict(found.halvings)

    assert table({"flipped_clip": 2}) == {"flipped_clip": 2}
    assert table({"flipped_clip": 1, "digit": 1}) == {"flipped_clip": 2, "digit": 1}
    assert table({}, cross_modality__flipped_clip__batch_size=3) == {"digit": 1}


def test_another_model_invalidates_only_its_own_scores(layout: Layout) -> None:
    whole = {"match_probability": 0.75, "digit_probability": 0.5}
    write(layout, [scored(layout, key, **whole) for key in ("k0", "k2", "k4")], **LOW)
    other = {"cross_modality__image_text_matching": {"model": "other", "min": 0.0071}}
    wanted = cache(layout, **LOW, **other).wanted(SHARD)
    assert {(a.flipped_clip_cosine, a.match_probability, a.digit_probability) for a in wanted.values()} == {
        (0.25, None, 0.5)
    }
    without = cache(layout, **LOW, cross_modality__image_text_matching=...)
    assert without.is_complete(SHARD)
    assert without.table(SHARD, [], [], {}).rows[0]["match_probability"] == 0.75


@pytest.mark.parametrize(
    ("reason", "wanted_again"), [("undecodable_image", set()), ("model_failed", {"k2"}), ("preparation_failed", {"k2"})]
)
def test_failed_sample_is_retried_only_if_another_model_may_score_it(
    layout: Layout, reason: str, wanted_again: set[str]
) -> None:
    letter = DeadLetter("00000", "k2", uid(2), CROSS_MODALITY, reason, "m")
    done = write(layout, [scored(layout, key) for key in ("k0", "k4")], (letter,), **HIGH)
    assert done.is_complete(SHARD)
    higher = cache(layout, cross_modality__flipped_clip__min=0.6)
    assert set(higher.wanted(SHARD)) == wanted_again
    assert higher.is_complete(SHARD) is not bool(wanted_again)


def test_dead_letter_is_removed_if_stage_1_now_drops_the_sample(layout: Layout) -> None:
    letter = DeadLetter("00000", "k1", uid(1), CROSS_MODALITY, "undecodable_image", "m")
    write(layout, [scored(layout, key) for key in ("k0", "k2", "k3", "k4")], (letter,), **HIGH, **ONE_WORD)
    stricter = cache(layout, **HIGH)
    assert not stricter.is_complete(SHARD)
    assert stricter.wanted(SHARD) == {}
    write(layout, [], **HIGH)
    assert stricter.is_complete(SHARD)
    assert set(cache(layout, **HIGH, **ONE_WORD).wanted(SHARD)) == {"k1"}


def test_sample_that_failed_on_a_rule_that_is_now_off_has_no_features_yet(layout: Layout) -> None:
    with_language = FeatureCache(recipe(), layout, KNOWN)
    tables.write_table(
        layout.single_modality("00000"), [], tables.single_modality_schema(), with_language.cache_key(SHARD)
    )
    without = FeatureCache(recipe(single_modality__language=...), layout, KNOWN)
    assert without.is_complete(SHARD)
    letter = DeadLetter("00000", "k2", uid(2), SINGLE_MODALITY, "language_failed", "m")
    tables.write_dead_letters(layout.dead_letters(SINGLE_MODALITY, "00000"), [letter])
    assert with_language.is_complete(SHARD)
    assert not without.is_complete(SHARD)


# What a recipe did not ask for is not shown ------------------------------------------------------------------------

WHOLE = annotation(digit_prompt_probability=0.5, embedding=b"e", unflipped_clip_cosine=0.2)


@pytest.mark.parametrize(
    ("changes", "unknown"),
    [
        ({}, {"digit_prompt_probability"}),
        ({"cross_modality__digit": {"model": "m", "clip_prompts": PROMPTS}}, set()),
        ({"cross_modality__digit": {"model": "m", "clip_prompts": {"min_probability": 0.6}}}, {"digit_probability"}),
        (HIGH, {"digit_prompt_probability", "match_probability", "digit_probability"}),
        ({"cross_modality__image_text_matching": {"model": "m", "min": 0.95}},
         {"digit_prompt_probability", "digit_probability"}),
        ({"cross_modality__image_text_matching": ...}, {"digit_prompt_probability", "match_probability"}),
        ({"single_modality__language": ...},
         {"digit_prompt_probability", "language", "language_probability"}),
        ({"single_modality__caption_length": {"min_words": 9}},
         {"flipped_clip_cosine", "unflipped_clip_cosine", "match_probability", "digit_prompt_probability",
          "digit_probability", "embedding"}),
    ],
)  # fmt: skip
def test_restricted_annotation_has_only_the_columns_of_the_recipe(changes: dict[str, Any], unknown: set[str]) -> None:
    changes = {"cross_modality__flipped_clip__min": 0.3} | changes
    if "cross_modality__digit" not in changes and "distribution_alignment" not in changes:
        changes.setdefault("cross_modality__digit", {"model": "m"})
    settled = recipe(**changes)
    found = restrict_to_recipe(WHOLE, settled, rules_of(settled, SINGLE_MODALITY))
    before, after = WHOLE.row, found.row
    assert before.keys() - after.keys() == unknown
    assert all(before[name] == value for name, value in after.items())
