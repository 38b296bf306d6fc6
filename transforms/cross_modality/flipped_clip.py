"""Flipped CLIP: caption and picture must agree even where the picture's text cannot be read."""

from __future__ import annotations

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference

from transforms.core import recipe
from transforms.core.records import Annotation, SampleBatch
from transforms.models.clip import ClipHandler


def keeps(annotation: Annotation, settings: recipe.FlippedClip, min_cosine: float) -> bool:
    """Whether the rule keeps a sample.

        cos(caption, mirrored picture) >= min_cosine        (arXiv 2309.15954, "flipped-CLIP")

    `min_cosine` is the settings' `min`, or what their `keep_fraction` came to over the pool; the
    paper's 0.19 holds for OpenAI's ViT-L/14 only.

    Digit rescue (our choice, off by default): pictures of digits lose by mirroring, so a sample
    with digit probability >= `digit_rescue.min_digit_probability` needs only
    `digit_rescue.min_cosine`.
    """
    cosine = annotation.flipped_clip_cosine
    if cosine is None:
        raise ValueError(f"sample {annotation.uid} has no flipped_clip_cosine")
    if cosine >= min_cosine:
        return True
    rescue = settings.digit_rescue
    digit = annotation.digit_probability
    return (
        rescue is not None
        and digit is not None
        and digit >= rescue.min_digit_probability
        and cosine >= rescue.min_cosine
    )


class FlippedClip(beam.PTransform):
    """Scores caption against mirrored picture, and embeds the picture; where the recipe gives CLIP digit prompts, says
    also how likely it shows digits."""

    def __init__(self, models: recipe.CrossModality) -> None:
        super().__init__()
        prompts = models.digit.clip_prompts if models.digit else None
        self._handler = ClipHandler(models.flipped_clip, models.device, models.precision, prompts)

    def expand(self, batches: beam.PCollection[SampleBatch]) -> beam.PCollection[SampleBatch]:
        return batches | "Score flipped CLIP" >> RunInference(self._handler).with_output_types(SampleBatch)
