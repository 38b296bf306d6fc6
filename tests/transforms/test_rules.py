"""Rules: the first failing rule names the verdict, and both sides of every threshold are tested."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest

from tests import helpers
from tests.helpers import annotation, uid
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES, Recipe
from transforms.core.records import Annotation
from transforms.rules import ActiveRule, Thresholds, first_failing, rules_of


def recipe(**changes: Any) -> Recipe:
    """Return the demo recipe with thresholds that `annotation()` passes."""
    for rule, threshold in (("flipped_clip", 0.19), ("image_text_matching", 0.5)):
        if f"cross_modality__{rule}" not in changes:
            changes.setdefault(f"cross_modality__{rule}__min", threshold)
    return helpers.recipe(**changes)


def all_rules(recipe_: Recipe) -> list[ActiveRule]:
    return [rule for stage in STAGES for rule in rules_of(recipe_, stage)]


def dropped_by(recipe_: Recipe, **columns: Any) -> str | None:
    return first_failing(annotation(**columns), all_rules(recipe_))


def test_a_good_sample_passes_all() -> None:
    assert dropped_by(recipe()) is None


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("near_duplicate", {"duplicate_of": None}, {"duplicate_of": uid(7)}),
    ("caption_length", {"word_count": 3}, {"word_count": 2}),
    ("caption_length", {"character_count": 6}, {"character_count": 5}),
    ("language", {"language": "en"}, {"language": "de"}),
    ("language", {"language": "en"}, {"language": "und"}),
    ("pos_pattern", {"pos_tags": "DT NN"}, {"pos_tags": "DT JJ"}),
    ("pos_pattern", {"pos_tags": "NNP NNS"}, {"pos_tags": "NNP CD"}),
    ("pos_pattern", {"pos_tags": "NN"}, {"pos_tags": ""}),
    ("caption_frequency", {"caption_image_count": 10}, {"caption_image_count": 11}),
    ("caption_frequency", {"caption_image_count": 20, "pool_samples": 20_000_000},
     {"caption_image_count": 20, "pool_samples": 19_999_999}),
    ("aspect_ratio", {"original_width_px": 900, "original_height_px": 300},
     {"original_width_px": 901, "original_height_px": 300}),
    ("aspect_ratio", {"original_width_px": 300, "original_height_px": 900},
     {"original_width_px": 300, "original_height_px": 901}),
    ("min_side", {"original_width_px": 200, "original_height_px": 201},
     {"original_width_px": 199, "original_height_px": 201}),
    ("min_side", {"original_width_px": 201, "original_height_px": 200},
     {"original_width_px": 201, "original_height_px": 199}),
    ("face_area", {"face_area_share": 0.4}, {"face_area_share": 0.4000001}),
    ("face_area", {"face_area_share": 0.0}, {"face_area_share": 1.0}),
    ("flipped_clip", {"flipped_clip_cosine": 0.19}, {"flipped_clip_cosine": 0.1899999}),
    ("image_text_matching", {"match_probability": 0.5}, {"match_probability": 0.4999999}),
    ("image_text_matching", {"match_probability": None}, {"match_probability": 0.0}),
    ("semantic_dedup", {"semantic_duplicate_of": None}, {"semantic_duplicate_of": uid(7)}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "kept", "dropped"), CASES)
def test_both_sides_of_every_rule(rule: str, kept: dict[str, Any], dropped: dict[str, Any]) -> None:
    assert dropped_by(recipe(), **kept) is None
    assert dropped_by(recipe(), **dropped) == rule


def test_every_rule_is_tested() -> None:
    assert {case[0] for case in CASES} == set(recipe().active_rules)


@pytest.mark.parametrize("stage", [SINGLE_MODALITY, CROSS_MODALITY, DISTRIBUTION_ALIGNMENT])
def test_rule_that_is_off_drops_nothing(stage: str) -> None:
    for rule, _, dropped in CASES:
        if stage == getattr(rules_by_name()[rule], "stage", None) and rule != "flipped_clip":
            assert dropped_by(recipe(**{f"{stage}__{rule}": ...}), **dropped) is None, rule


def rules_by_name() -> dict[str, ActiveRule]:
    return {rule.name: rule for rule in all_rules(recipe())}


def failing_all_of(names: list[str]) -> Annotation:
    columns: dict[str, Any] = {}
    for name, _, dropped in CASES:
        if name in names:
            columns |= dropped
    if {"aspect_ratio", "min_side"} <= set(names):
        columns |= {"original_width_px": 199, "original_height_px": 900}
    return annotation(**columns)


def test_the_default_order_is_the_recipe_s() -> None:
    names = [rule.name for rule in all_rules(recipe())]
    assert names == recipe().active_rules
    for start in range(len(names)):
        assert first_failing(failing_all_of(names[start:]), all_rules(recipe())) == names[start]


def test_order_of_rules_changes_only_the_name() -> None:
    default = recipe()
    local = [rule.name for rule in rules_of(default, SINGLE_MODALITY)]
    others = default.active_rules[len(local) :]
    cases = [failing_all_of(list(pair)) for pair in itertools.combinations(local, 2)] + [annotation()]
    for order in (local[::-1], local[3:] + local[:3]):
        shuffled = recipe(rule_order=order + others)
        assert [rule.name for rule in rules_of(shuffled, SINGLE_MODALITY)] == order
        for case in cases:
            found = first_failing(case, rules_of(shuffled, SINGLE_MODALITY))
            assert found == next((name for name in order if not rules_by_name()[name].keeps(case)), None)
            assert (found is None) == (first_failing(case, rules_of(default, SINGLE_MODALITY)) is None)


def test_rules_stay_in_their_stage_for_any_order() -> None:
    rules = recipe().active_rules
    shuffled = recipe(rule_order=[*rules[:8][::-1], *rules[8:10][::-1], *rules[10:]])
    scored = [rule.name for rule in rules_of(shuffled, CROSS_MODALITY)]
    assert scored == ["image_text_matching", "flipped_clip"]
    assert [rule.name for rule in rules_of(shuffled, DISTRIBUTION_ALIGNMENT)] == ["semantic_dedup"]
    assert all(rule.stage == stage for stage in STAGES for rule in rules_of(shuffled, stage))


FRACTIONS = {
    "cross_modality__flipped_clip": {"model": "m", "keep_fraction": 0.5},
    "cross_modality__image_text_matching": {"model": "m", "keep_fraction": 0.5},
}


def test_the_threshold_of_a_keep_fraction_is_given() -> None:
    thresholds: Thresholds = {"flipped_clip": 0.25, "image_text_matching": -1.0}
    rules = rules_of(recipe(**FRACTIONS), CROSS_MODALITY, thresholds)
    assert first_failing(annotation(flipped_clip_cosine=0.249), rules) == "flipped_clip"
    assert first_failing(annotation(flipped_clip_cosine=0.25, match_probability=0.0), rules) is None


def test_a_threshold_of_zero_is_a_threshold() -> None:
    with pytest.raises(KeyError, match="flipped_clip"):
        rules_of(recipe(**FRACTIONS), CROSS_MODALITY)
    rules = rules_of(recipe(**FRACTIONS), CROSS_MODALITY, {"flipped_clip": 0.0, "image_text_matching": 0.0})
    assert first_failing(annotation(flipped_clip_cosine=-0.001), rules) == "flipped_clip"
    assert first_failing(annotation(flipped_clip_cosine=0.0, match_probability=0.0), rules) is None
    no_faces = recipe(single_modality__face_area={"max_share": 0.0})
    assert dropped_by(no_faces, face_area_share=0.0) is None
    assert dropped_by(no_faces, face_area_share=1e-9) == "face_area"


@pytest.mark.parametrize(
    ("cosine", "digit", "expected"),
    [
        (0.19, None, None),
        (0.18, 0.5, None),
        (0.15, 0.5, None),
        (0.1499, 0.9, "flipped_clip"),
        (0.18, 0.49, "flipped_clip"),
        (0.18, None, "flipped_clip"),
    ],
)
def test_digit_rescue(cosine: float, digit: float | None, expected: str | None) -> None:
    rescue = {"min_cosine": 0.15, "min_digit_probability": 0.5}
    rescuing = recipe(cross_modality__flipped_clip__min=0.19, cross_modality__flipped_clip__digit_rescue=rescue)
    rules = rules_of(rescuing, CROSS_MODALITY)
    assert first_failing(annotation(flipped_clip_cosine=cosine, digit_probability=digit), rules) == expected


def test_unscored_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no flipped_clip_cosine"):
        dropped_by(recipe(), flipped_clip_cosine=None)


def test_settings_decide() -> None:
    assert dropped_by(recipe(single_modality__language={"allowed": ["de", "en"]}), language="de") is None
    assert dropped_by(recipe(single_modality__caption_length={"min_words": 7}), word_count=6) == "caption_length"
    assert dropped_by(recipe(single_modality__aspect_ratio={"max_ratio": 1.0})) == "aspect_ratio"
    assert dropped_by(recipe(single_modality__min_side={"min_px": 481})) == "min_side"
    assert dropped_by(recipe(single_modality__caption_frequency={"min_images": 11}), caption_image_count=11) is None


def test_no_rules_drop_nothing() -> None:
    assert first_failing(failing_all_of(recipe().active_rules), []) is None


def test_recipe_can_be_pickled_and_rules_are_built_on_workers() -> None:
    there = pickle.loads(pickle.dumps(recipe()))
    assert [rule.name for rule in all_rules(there)] == recipe().active_rules
