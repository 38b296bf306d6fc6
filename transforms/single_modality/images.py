"""Features of the image that several rules need: its original size, its hashes."""

from __future__ import annotations

import hashlib
from typing import Any

import apache_beam as beam

from transforms.annotate import AnnotateSamples
from transforms.core import recipe
from transforms.core.records import Sample
from transforms.single_modality.image_shape import original_size_px
from transforms.single_modality.near_duplicate import perceptual_hash


class ImageFeatures(beam.PTransform):
    """Adds `original_width_px`, `original_height_px`, `image_sha256` and `perceptual_hash`."""

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        return batches | "Hash and measure" >> beam.ParDo(_HashAndMeasure())


class _HashAndMeasure(AnnotateSamples):
    stage, reason = recipe.SINGLE_MODALITY, "image_features_failed"

    def columns(self, sample: Sample) -> dict[str, Any]:
        stored = sample.annotation
        assert stored.width_px and stored.height_px and sample.pixels is not None  # decoded by the reader
        width, height = original_size_px(sample.metadata, (stored.width_px, stored.height_px))
        return {
            "original_width_px": width,
            "original_height_px": height,
            "image_sha256": hashlib.sha256(sample.image_bytes).hexdigest(),
            "perceptual_hash": perceptual_hash(sample.pixels),
        }
