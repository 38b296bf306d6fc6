"""Features of the image that several rules need: its original size, its hashes and its thumbnail."""

from __future__ import annotations

import hashlib
from typing import Any

import apache_beam as beam

from transforms.annotate import AnnotateSamples
from transforms.core.catalogue import SINGLE_MODALITY
from transforms.core.records import SIZE_NOT_USED, Sample, SampleBatch
from transforms.single_modality.image_shape import original_size_px
from transforms.single_modality.perceptual_hash import perceptual_hash, small_copy, thumbnail

VERSION = 2
"""Part of the cache key of stage 1. Raise it when a feature changes."""


class ImageFeatures(beam.PTransform):
    """PCollection[SampleBatch] -> the same with `original_width_px`, `original_height_px`, `image_sha256`,
    `perceptual_hash`, `image_thumbnail`, and a note in `pool_notes` where the pool's original size cannot be true."""

    def expand(self, batches: beam.PCollection[SampleBatch]) -> beam.PCollection[SampleBatch]:
        annotate = AnnotateSamples("image_features", SINGLE_MODALITY, ImageAnnotator, thread_safe=True)
        return batches | "Annotate" >> beam.ParDo(annotate).with_output_types(SampleBatch)


class ImageAnnotator:
    """Computes the columns of `ImageFeatures` from a decoded sample."""

    def load(self) -> None:
        """Nothing to load."""

    def columns(self, sample: Sample) -> dict[str, Any]:
        """See the class."""
        stored = sample.annotation
        assert stored.width_px and stored.height_px and sample.pixels is not None  # the reader decodes
        size = stored.width_px, stored.height_px
        original = original_size_px(sample.metadata, size)
        width, height = original or size
        small = small_copy(sample.pixels)
        notes = () if original else (SIZE_NOT_USED,)
        return {
            "original_width_px": width,
            "original_height_px": height,
            "pool_notes": " ".join([*(stored.pool_notes or "").split(), *notes]) or None,
            "image_sha256": hashlib.sha256(sample.image_bytes).hexdigest(),
            "perceptual_hash": perceptual_hash(small),
            "image_thumbnail": thumbnail(small),
        }
