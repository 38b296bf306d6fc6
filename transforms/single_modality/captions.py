"""Rules on the caption alone: its length, and the number of images that it occurs with."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import TYPE_CHECKING, Any

from pydantic import Field

from transforms.core.catalogue import SINGLE_MODALITY, Rule
from transforms.core.plain_text import plain_text
from transforms.core.settings import Settings, Share

if TYPE_CHECKING:
    from transforms.core.records import Annotation, Sample

# Caption length ---------------------------------------------------------------------------------------------------


class CaptionLengthSettings(Settings):
    """The shortest caption that is kept (DataComp's basic filter: more than 2 words and more than 5 characters)."""

    only_decide = frozenset({"min_words", "min_characters"})

    min_words: int = Field(3, ge=0)
    min_characters: int = Field(6, ge=0)


def caption_length(caption: str) -> tuple[int, int]:
    """Words (split at white space) and characters of a caption's plain text.

    Source: DataComp's basic filter, which counts the caption as it is, with any HTML. The plain text is our choice.
    """
    text = plain_text(caption)
    return len(text.split()), len(text)


def keeps_length(word_count: int, character_count: int, settings: CaptionLengthSettings) -> bool:
    """Whether the caption is long enough: word_count >= min_words and character_count >= min_characters.

    Source: DataComp's basic filter (more than 2 words and more than 5 characters).
    """
    return word_count >= settings.min_words and character_count >= settings.min_characters


class CaptionLengthAnnotator:
    """Adds `word_count` and `character_count`."""

    def __init__(self, settings: CaptionLengthSettings) -> None:
        del settings  # they only decide

    def load(self) -> None:
        """Nothing to load."""

    def columns(self, sample: Sample) -> dict[str, Any]:
        """See the class."""
        words, characters = caption_length(sample.annotation.caption)
        return {"word_count": words, "character_count": characters}


def _keeps_length(annotation: Annotation, settings: CaptionLengthSettings) -> bool:
    return keeps_length(annotation.word_count, annotation.character_count, settings)


CAPTION_LENGTH = Rule(
    name="caption_length",
    stage=SINGLE_MODALITY,
    settings=CaptionLengthSettings,
    summary="more than 2 words and more than 5 characters",
    source="DataComp",
    columns={"word_count": "int32", "character_count": "int32"},
    value="word_count",
    threshold="min_words",
    keeps_if="at_least",
    order=20,
    annotator=CaptionLengthAnnotator,
    keeps=_keeps_length,
)

# Caption frequency ------------------------------------------------------------------------------------------------


class CaptionFrequencySettings(Settings):
    """A normalised caption with more than max(`min_images`, `max_pool_share` of the pool) distinct images is
    high-frequency text."""

    min_images: int = Field(10, ge=1)
    max_pool_share: Share = 1e-6


_NOT_WORD = re.compile(r"[\W_]+")


def caption_key(caption: str) -> str:
    """32 hex digits that identify the normalised caption (our choice: its plain text in NFKC, case folded, and every
    run of characters other than letters and digits as one space)."""
    text = unicodedata.normalize("NFKC", plain_text(caption)).casefold()
    text = _NOT_WORD.sub(" ", text).strip()
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def max_images(pool_samples: int, settings: CaptionFrequencySettings) -> float:
    """The largest number of distinct images that a caption may have: max(min_images, max_pool_share * pool_samples).

    Source: paper (high-frequency text is removed); the bound is our choice.
    """
    return max(settings.min_images, settings.max_pool_share * pool_samples)


def keeps_frequency(image_count: int, pool_samples: int, settings: CaptionFrequencySettings) -> bool:
    """Whether a caption has few enough distinct images: image_count <= `max_images`."""
    return image_count <= max_images(pool_samples, settings)


def _keeps_frequency(annotation: Annotation, settings: CaptionFrequencySettings) -> bool:
    return keeps_frequency(annotation.caption_image_count, annotation.pool_samples, settings)


CAPTION_FREQUENCY = Rule(
    name="caption_frequency",
    stage=SINGLE_MODALITY,
    settings=CaptionFrequencySettings,
    summary="its caption has at most max(10, one in a million of the pool) distinct images",
    source="paper: the rule; ours: the threshold",
    columns={"caption_image_count": "int64"},
    value="caption_image_count",
    threshold="min_images",
    keeps_if="at_most",
    order=50,
    pool_wide=True,
    keeps=_keeps_frequency,
)
