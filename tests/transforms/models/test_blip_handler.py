from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
import torch
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to
from PIL import Image
from transformers import BlipForImageTextRetrieval, BlipProcessor

from tests.transforms.models.model_batches import (
    EVERYTHING,
    assert_one_poisoned_row_is_isolated,
    assert_scores_ignore_batch_mates,
    make_batch,
    make_sample,
    scores,
)
from transforms.core import recipe
from transforms.core.plain_text import plain_text
from transforms.core.records import Sample
from transforms.cross_modality.image_text_matching import IMAGE_TEXT_MATCHING, ImageTextMatchingSettings
from transforms.models.blip import BlipHandler, LoadedBlip, bucket, match_probability
from transforms.models.pictures import pixels_of
from transforms.models.score import ScoreByModel


def settings_for(folder: Path, **changes: Any) -> ImageTextMatchingSettings:
    return ImageTextMatchingSettings(**{"model": str(folder), "min": 0.5, "batch_size": 4, **changes})


@pytest.fixture
def handler(itm_folder: Path) -> BlipHandler:
    return BlipHandler(settings_for(itm_folder), "cpu", None)


@pytest.fixture
def model(handler: BlipHandler) -> LoadedBlip:
    return handler.load_on(torch.device("cpu"))


@functools.cache
def plain_model(folder: Path, backend: str) -> tuple:
    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    return model, BlipProcessor.from_pretrained(folder, backend=backend)


def plain_probability(folder: Path, sample: Sample, backend: str) -> float:
    """Scores computed as documented by transformers, one sample at a time, without padding."""
    model, processor = plain_model(folder, backend)
    picture = Image.fromarray(pixels_of(sample))
    inputs = processor(
        images=picture, text=plain_text(sample.annotation.caption), return_tensors="pt", truncation=True, max_length=64
    )
    with torch.no_grad():
        return float(model(**inputs).itm_score.softmax(-1)[0, 1])


@pytest.mark.parametrize(("backend", "tolerance"), [("pil", 2e-6), ("torchvision", 0.02)])
def test_scores_equal_those_of_transformers(
    itm_folder: Path, handler: BlipHandler, model: LoadedBlip, backend: str, tolerance: float
):
    (scored,) = handler.run_inference(make_batch(make_sample(i) for i in range(6)), model)
    found = [sample.annotation.match_probability or 0.0 for sample in scored]
    assert found == pytest.approx([plain_probability(itm_folder, s, backend) for s in scored], abs=tolerance)
    assert max(found) - min(found) > 0.01  # the scores must differ for the test to be meaningful


def test_a_score_does_not_depend_on_the_rest_of_the_batch(handler: BlipHandler, model: LoadedBlip):
    assert_scores_ignore_batch_mates(lambda batch: handler.run_inference(batch, model)[0])


def test_threads_share_the_model(handler: BlipHandler, model: LoadedBlip):
    batches = [make_batch([make_sample(i), make_sample(i + 1)]) for i in range(8)]
    expected = [scores(handler.run_inference(batch, model)[0]) for batch in batches]
    fresh = handler.load_model()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda batch: scores(handler.run_inference(batch, fresh)[0]), batches))
    assert found == expected


def test_one_poisoned_sample_is_isolated(handler: BlipHandler, model: LoadedBlip, monkeypatch: pytest.MonkeyPatch):
    def poison(bad) -> None:
        forward = model.model.vision_model.forward

        def forward_or_fail(pixel_values: torch.Tensor, **arguments):
            if any(bad(image) for image in pixel_values):
                raise RuntimeError("poisoned")
            return forward(pixel_values, **arguments)

        monkeypatch.setattr(model.model.vision_model, "forward", forward_or_fail)

    assert_one_poisoned_row_is_isolated(lambda batch: handler.run_inference(batch, model)[0], poison)


def test_an_image_3_pixels_high_is_not_taken_for_channels_first(handler: BlipHandler, model: LoadedBlip):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
    (scored,) = handler.run_inference(make_batch([Sample(make_sample(0).annotation, {}, b"", pixels)]), model)
    assert scored.samples[0].annotation.match_probability is not None


def test_a_caption_that_is_not_text_is_a_dead_letter(handler: BlipHandler, model: LoadedBlip):
    sample = make_sample(1)
    broken = Sample(sample.annotation.with_columns(caption="a \ud800 b"), {}, b"", sample.pixels)
    (scored,) = handler.run_inference(make_batch([broken, make_sample(0)]), model)
    assert [s.annotation.key for s in scored] == ["0"]
    assert [(d.key, d.reason) for d in scored.dead_letters] == [("1", "preparation_failed")]


def test_only_samples_that_pass_the_cascade_are_scored(itm_folder: Path, model: LoadedBlip):
    handler = BlipHandler(settings_for(itm_folder), "cpu", 0.2)
    batch = make_batch([make_sample(0, cosine=0.1999), make_sample(1, cosine=0.2), make_sample(2, cosine=0.3)])
    (scored,) = handler.run_inference(batch, model)
    assert [s.annotation.match_probability is not None for s in scored] == [False, True, True]
    assert not scored.dead_letters


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "expected"),
    [(1, 64, 16), (16, 64, 16), (17, 64, 32), (33, 40, 40), (64, 64, 64), (9, 9, 9)],
)
def test_buckets(tokens: int, max_tokens: int, expected: int):
    assert bucket(tokens, max_tokens) == expected


def test_long_captions_are_cut_at_max_tokens(itm_folder: Path):
    handler = BlipHandler(settings_for(itm_folder, max_tokens=20), "cpu", None)
    model = handler.load_on(torch.device("cpu"))
    sample = make_sample(1)
    assert len(model.prepare(sample).tokens) == 20
    with pytest.raises(ValueError, match="takes at most 64"):
        BlipHandler(settings_for(itm_folder, max_tokens=65), "cpu", None).load_on(torch.device("cpu"))


def test_probability_is_the_softmax_without_overflow():
    assert match_probability(np.float32([1.0, 1.0])) == 0.5
    assert match_probability(np.float32([1e30, -1e30])) == 0.0
    assert match_probability(np.float32([-1e30, 1e30])) == 1.0


def test_the_transform_scores_whole_batches(itm_folder: Path, handler: BlipHandler, model: LoadedBlip):
    batch = make_batch(make_sample(i) for i in range(3))
    expected = scores(handler.run_inference(batch, model)[0])
    models = recipe.CrossModalitySettings(flipped_clip=EVERYTHING, image_text_matching=settings_for(itm_folder))
    with TestPipeline("FnApiRunner") as p:
        scored = p | beam.Create([batch]) | ScoreByModel(IMAGE_TEXT_MATCHING, models)
        assert_that(scored | beam.Map(scores), equal_to([expected]))
