"""Image-text matching: BLIP looks at picture and caption together."""

from __future__ import annotations

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference

from transforms.core import recipe
from transforms.core.records import Annotation, SampleBatch
from transforms.models.blip import BlipHandler


def keeps(annotation: Annotation, settings: recipe.ImageTextMatching, min_probability: float) -> bool:
    """Whether the rule keeps a sample.

        p(match | picture, caption) >= min_probability      (arXiv 2309.15954, "BLIP-ITM")

    `min_probability` is the settings' `min`, or what their `keep_fraction` came to over the pool. A
    sample that the model was not asked about, because it had failed flipped CLIP, is not judged
    here: it is kept by this rule and dropped by the one it failed, whichever of them comes first.
    (That none is left unscored for another reason is checked before anything is decided, by
    `cascade.unscored`.)
    """
    return annotation.match_probability is None or annotation.match_probability >= min_probability


class ImageTextMatching(beam.PTransform):
    """Scores how well caption and picture match, for what flipped CLIP does not drop already."""

    def __init__(self, models: recipe.CrossModality) -> None:
        super().__init__()
        assert models.image_text_matching
        floor = models.flipped_clip.cascade_min_cosine
        self._handler = BlipHandler(models.image_text_matching, models.device, floor, models.precision)

    def expand(self, batches: beam.PCollection[SampleBatch]) -> beam.PCollection[SampleBatch]:
        return batches | "Score image-text matching" >> RunInference(self._handler).with_output_types(SampleBatch)
