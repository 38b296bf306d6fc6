from __future__ import annotations

from typing import Any

import pytest

from transforms.core import recipe
from transforms.core.records import Annotation
from transforms.cross_modality import flipped_clip, image_text_matching
from transforms.cross_modality.digit import DigitSettings, has_digits
from transforms.cross_modality.flipped_clip import DigitRescueSettings, FlippedClipSettings
from transforms.cross_modality.image_text_matching import ImageTextMatchingSettings
from transforms.models.cascade import asked, match_floor, prompt_floor, unscored, wanted
from transforms.models.settings import ClipPromptsSettings


def annotation(**scores: Any) -> Annotation:
    return Annotation("0" * 32, "shard", "key", "caption", **scores)


@pytest.mark.parametrize(
    ("cosine", "probability", "min_cosine", "min_probability", "expected"),
    [
        (0.1, None, None, None, True),
        (0.1, None, 0.1, None, True),
        (0.0999, None, 0.1, None, False),
        (-0.1, None, 0.0, None, False),  # a floor of 0 is not "no floor"
        (0.0, None, 0.0, None, True),
        (None, None, 0.1, None, False),
        (0.2, 0.5, 0.1, 0.5, True),
        (0.2, 0.4999, 0.1, 0.5, False),
        (0.2, None, 0.1, 0.5, False),
        (0.05, 0.9, 0.1, 0.5, False),
    ],
)
def test_wanted(cosine, probability, min_cosine, min_probability, expected):
    sample = annotation(flipped_clip_cosine=cosine, match_probability=probability)
    assert wanted(sample, min_cosine, min_probability) is expected


CLIP = FlippedClipSettings(model="m", min=0.19)
RESCUE = FlippedClipSettings(
    model="m", min=0.19, digit_rescue=DigitRescueSettings(min_cosine=0.1, min_digit_probability=0.5)
)
ITM = ImageTextMatchingSettings(model="m", min=0.3)


@pytest.mark.parametrize(
    ("settings", "cosine", "digit", "expected"),
    [
        (CLIP, 0.19, None, True),
        (CLIP, 0.1899, 1.0, False),  # no rescue without a digit section
        (RESCUE, 0.1899, 0.5, True),
        (RESCUE, 0.1899, 0.4999, False),
        (RESCUE, 0.1899, None, False),
        (RESCUE, 0.1, 0.9, True),
        (RESCUE, 0.0999, 0.9, False),
        (RESCUE, 0.19, None, True),
    ],
)
def test_flipped_clip_keeps(settings: FlippedClipSettings, cosine: float, digit: float | None, expected: bool):
    sample = annotation(flipped_clip_cosine=cosine, digit_probability=digit)
    assert flipped_clip.keeps(sample, settings) is expected


def test_flipped_clip_raises_for_an_unscored_sample():
    with pytest.raises(ValueError, match="has no flipped_clip_cosine"):
        flipped_clip.keeps(annotation(), CLIP)


@pytest.mark.parametrize(("probability", "expected"), [(0.3, True), (0.2999, False), (None, True)])
def test_image_text_matching_keeps(probability: float | None, expected: bool):
    assert image_text_matching.keeps(annotation(match_probability=probability), ITM) is expected


@pytest.mark.parametrize(("probability", "expected"), [(0.5, True), (0.4999, False), (None, False)])
def test_has_digits(probability: float | None, expected: bool):
    assert has_digits(annotation(digit_probability=probability), 0.5) is expected


def stage(**sections) -> recipe.CrossModalitySettings:
    return recipe.CrossModalitySettings(**{"flipped_clip": RESCUE, "image_text_matching": ITM} | sections)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({}, ["flipped_clip_cosine"]),
        ({"flipped_clip_cosine": 0.09}, []),
        ({"flipped_clip_cosine": 0.15}, ["match_probability"]),
        ({"flipped_clip_cosine": 0.15, "match_probability": 0.2}, []),
        ({"flipped_clip_cosine": 0.15, "match_probability": 0.3}, ["digit_probability"]),
        ({"flipped_clip_cosine": 0.15, "match_probability": 0.3, "digit_probability": 0.0}, []),
    ],
)
def test_unscored(scores: dict[str, float], expected: list[str]):
    assert unscored(annotation(**scores), stage(digit=DigitSettings(model="m"))) == expected


def test_unscored_without_floors_lists_every_score():
    clip = FlippedClipSettings(model="m", keep_fraction=0.3)
    itm = ImageTextMatchingSettings(model="m", keep_fraction=0.3)
    settings = stage(flipped_clip=clip, image_text_matching=itm, digit=DigitSettings(model="m"))
    assert match_floor(settings) is None
    assert unscored(annotation(flipped_clip_cosine=-1.0, match_probability=0.0), settings) == ["digit_probability"]
    assert unscored(annotation(flipped_clip_cosine=-1.0), settings) == ["match_probability"]


PROMPTED = DigitSettings(model="m", clip_prompts=ClipPromptsSettings(min_probability=0.4))


@pytest.mark.parametrize(
    ("probability", "missing", "wanted_columns"),
    [
        (None, ["digit_prompt_probability"], ["match_probability"]),
        (0.3999, [], ["match_probability"]),
        (0.4, ["digit_probability"], ["match_probability", "digit_probability"]),
    ],
)
def test_clip_prompts_select_the_samples_for_the_digit_question(
    probability: float | None, missing: list[str], wanted_columns: list[str]
):
    scored = annotation(flipped_clip_cosine=0.3, match_probability=0.9, digit_prompt_probability=probability)
    assert unscored(scored, stage(digit=PROMPTED)) == missing
    assert asked(scored, stage(digit=PROMPTED)) == wanted_columns
    assert prompt_floor(PROMPTED) == 0.4


def test_without_prompts_all_samples_that_pass_get_the_digit_question():
    scored = annotation(flipped_clip_cosine=0.3, match_probability=0.9)
    assert prompt_floor(DigitSettings(model="m")) is None
    assert unscored(scored, stage(digit=DigitSettings(model="m"))) == ["digit_probability"]
