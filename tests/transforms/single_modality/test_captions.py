"""Caption rules: both sides of each threshold, and counting DISTINCT images."""

from __future__ import annotations

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to

from tests.helpers import whole_sample
from transforms.annotate import Annotate
from transforms.core.records import SampleBatch, Shard
from transforms.single_modality.captions import (
    CAPTION_LENGTH,
    CaptionFrequencySettings,
    CaptionLengthSettings,
    caption_key,
    caption_length,
    keeps_frequency,
    keeps_length,
)


@pytest.mark.parametrize(
    ("caption", "words", "characters"),
    [
        ("", 0, 0),
        ("   ", 0, 3),
        ("a", 1, 1),
        ("a dog runs", 3, 10),
        ("  a\tdog\nruns  ", 3, 14),
        ("a\u00a0dog\u2003runs", 3, 10),
        ("zero\u200bwidth", 1, 9),
        ("<p>a&nbsp;dog</p>", 2, 5),
        ("STRASSE", 1, 7),
        ("Straße", 1, 7),
        ("狗在跑", 1, 3),
        ("e\u0301\U0001f600", 1, 3),
    ],
)
def test_length(caption: str, words: int, characters: int) -> None:
    assert caption_length(caption) == (words, characters)


@pytest.mark.parametrize(
    ("words", "characters", "kept"), [(3, 6, True), (2, 6, False), (3, 5, False), (0, 0, False), (999, 999, True)]
)
def test_length_thresholds(words: int, characters: int, kept: bool) -> None:
    assert keeps_length(words, characters, CaptionLengthSettings()) is kept


def test_a_length_of_zero_may_be_allowed() -> None:
    assert keeps_length(0, 0, CaptionLengthSettings(min_words=0, min_characters=0))


def test_the_length_is_written_on_every_sample() -> None:
    captions = ["", "a dog", "a dog runs"]
    samples = tuple(whole_sample(key=text, caption=text, word_count=None, character_count=None) for text in captions)
    batch = SampleBatch(Shard("s", "p", "f"), 4, False, samples)
    with beam.Pipeline("FnApiRunner") as p:
        counted = (
            p
            | beam.Create([batch])
            | Annotate(CAPTION_LENGTH, CaptionLengthSettings())
            | beam.FlatMap(iter)
            | beam.Map(lambda s: s.annotation)
        )
        assert_that(
            counted | beam.Map(lambda a: (a.caption, a.word_count, a.character_count)),
            equal_to([("", 0, 0), ("a dog", 2, 5), ("a dog runs", 3, 10)]),
        )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A Dog, running!", "a dog running"),
        ("  a   dog ", "A DOG"),
        ("STRASSE", "straße"),
        ("ﬁne①", "fine1"),
        ("a_dog", "a-dog"),
        ("Ａ dog", "a dog"),
        ("cafe\u0301", "café"),
        ("", "!!! ..."),
    ],
)
def test_captions_that_count_as_one(one: str, other: str) -> None:
    assert caption_key(one) == caption_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("a dog", "a cat"), ("a dog", "adog"), ("photo 1", "photo 2"), ("cafe", "café"), ("", "a"), ("狗", "猫")],
)
def test_captions_that_count_apart(one: str, other: str) -> None:
    assert caption_key(one) != caption_key(other)


def test_a_key_is_32_hex_digits_of_anything() -> None:
    for caption in ("", "a", "\ud800 lone", "\x00", "x" * 100_000):
        key = caption_key(caption)
        assert len(key) == 32
        assert int(key, 16) >= 0


@pytest.mark.parametrize(
    ("images", "pool", "kept"),
    [
        (0, 0, True), (10, 1000, True), (11, 1000, False), (10, 10_000_000, True), (11, 10_000_000, False),
        (20, 20_000_000, True), (21, 20_000_000, False), (2000, 2_000_000_000, True), (2001, 2_000_000_000, False),
    ],
)  # fmt: skip
def test_frequency_thresholds(images: int, pool: int, kept: bool) -> None:
    assert keeps_frequency(images, pool, CaptionFrequencySettings()) is kept


def test_a_share_of_zero_leaves_the_count() -> None:
    settings = CaptionFrequencySettings(min_images=1, max_pool_share=0.0)
    assert keeps_frequency(1, 10**9, settings)
    assert not keeps_frequency(2, 10**9, settings)


def test_letter_case_and_html_do_not_change_a_caption_key() -> None:
    same = [
        "top: straße & ıstanbul", "TOP: STRASSE & ISTANBUL", "Top: Straße &amp; ıstanbul",
        "<p>top: straße&nbsp;ıstanbul",
    ]  # fmt: skip
    assert len({caption_key(caption) for caption in same}) == 1
