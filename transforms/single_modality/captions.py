"""Rules on the caption alone: its length, and how many images it stands with."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Any

import apache_beam as beam

from transforms.annotate import AnnotateSamples
from transforms.core import recipe
from transforms.core.records import Sample

# Caption length ---------------------------------------------------------------------------------------------------


def caption_length(caption: str) -> tuple[int, int]:
    """Words (split at white space) and characters of a caption, as DataComp's basic filter counts them."""
    return len(caption.split()), len(caption)


def keeps_length(word_count: int, character_count: int, settings: recipe.CaptionLength) -> bool:
    """Whether the caption is long enough: word_count >= min_words and character_count >= min_characters.

    Source: DataComp's basic filter (more than 2 words and more than 5 characters).
    """
    return word_count >= settings.min_words and character_count >= settings.min_characters


class CaptionLength(beam.PTransform):
    """Adds `word_count` and `character_count`."""

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        return batches | "Count words" >> beam.ParDo(_CountWords())


class _CountWords(AnnotateSamples):
    stage, reason = recipe.SINGLE_MODALITY, "caption_length_failed"

    def columns(self, sample: Sample) -> dict[str, Any]:
        words, characters = caption_length(sample.annotation.caption)
        return {"word_count": words, "character_count": characters}


# Caption frequency ------------------------------------------------------------------------------------------------

_NOT_WORD = re.compile(r"[\W_]+")


def caption_key(caption: str) -> str:
    """What captions are counted by: 32 hex digits of the normalised caption (our choice: NFKC, case folded, every run
    of anything but letters and digits as one space)."""
    text = unicodedata.normalize("NFKC", caption).casefold()
    text = _NOT_WORD.sub(" ", text).strip()
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def max_images(pool_samples: int, settings: recipe.CaptionFrequency) -> float:
    """With how many distinct images a caption may stand: max(min_images, max_pool_share * pool_samples).

    Source: paper (high-frequency text is removed); the bound is our choice.
    """
    return max(settings.min_images, settings.max_pool_share * pool_samples)


def keeps_frequency(image_count: int, pool_samples: int, settings: recipe.CaptionFrequency) -> bool:
    """Whether a caption stands with few enough distinct images: image_count <= `max_images`."""
    return image_count <= max_images(pool_samples, settings)
