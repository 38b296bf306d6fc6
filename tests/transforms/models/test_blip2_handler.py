from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
import torch
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to
from PIL import Image
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, T5Config

from tests.transforms.models.model_batches import (
    EVERYTHING,
    assert_one_poisoned_row_is_isolated,
    assert_scores_ignore_batch_mates,
    make_batch,
    make_sample,
    scores,
)
from tests.transforms.models.tiny_models import PROMPT
from transforms.core import recipe
from transforms.cross_modality.digit import DIGIT, DigitSettings
from transforms.models.blip2 import Blip2Handler, LoadedBlip2, digit_probability
from transforms.models.pictures import pixels_of
from transforms.models.score import ScoreByModel
from transforms.models.weights import load_processor

OTHER_PROMPT = "is there a number? Answer:"


def settings_for(folder: Path, **changes: Any) -> DigitSettings:
    return DigitSettings(**{"model": str(folder), "batch_size": 4, "prompts": [PROMPT], **changes})


@pytest.fixture
def handler(digit_folder: Path) -> Blip2Handler:
    return Blip2Handler(settings_for(digit_folder), "cpu", None)


@pytest.fixture
def model(handler: Blip2Handler) -> LoadedBlip2:
    return handler.load_on(torch.device("cpu"))


@functools.cache
def plain_model(folder: Path) -> tuple:
    model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    return model, Blip2Processor.from_pretrained(folder, backend="pil")


def generated(folder: Path, pixels: np.ndarray, prompt: str, allowed: list[int]) -> tuple[int, torch.Tensor]:
    """The answer of `generate` restricted to the tokens `allowed`, and the logits of its first token."""
    model, processor = plain_model(folder)
    inputs = processor(images=Image.fromarray(pixels), text=prompt, return_tensors="pt")
    answer = model.generate(
        **inputs,
        max_new_tokens=1,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda row, tokens: allowed,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return int(answer.sequences[0, -1]), answer.logits[0][0]


def test_the_score_agrees_with_generate(digit_folder: Path, handler: Blip2Handler, model: LoadedBlip2):
    (scored,) = handler.run_inference(make_batch(make_sample(i) for i in range(8)), model)
    answers = set()
    for sample in scored:
        token, logits = generated(digit_folder, pixels_of(sample), PROMPT, [model.yes, model.no])
        p = torch.softmax(logits[[model.yes, model.no]].double(), 0)[0]
        found = sample.annotation.digit_probability
        assert found is not None
        assert found == pytest.approx(float(p), abs=1e-5)
        assert (found > 0.5) == (token == model.yes)
        answers.add(token)
    assert answers == {model.yes, model.no}  # both answers must occur for the test to be meaningful


def test_an_encoder_decoder_is_read_at_the_first_decoder_token():
    """For a model such as FLAN-T5, the first token of the answer comes from the decoder."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        qformer_config={**vision, "vocab_size": 10, "encoder_hidden_size": 32},
        text_config=T5Config(
            vocab_size=40, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=39,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).eval()
    prompt = torch.tensor([39] * 4 + [5, 6, 1])
    table = torch.linspace(-2, 2, 256).repeat(3, 1)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    found = LoadedBlip2(model, None, table, (prompt,), 7, 8).score(list(pixels))
    with torch.inference_mode():
        answer = model.generate(
            pixel_values=table[0][torch.from_numpy(pixels).int()],
            input_ids=prompt.repeat(3, 1),
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    np.testing.assert_allclose(found[:, 0], answer.logits[0][:, [7, 8]], atol=1e-5)


def test_the_answer_tokens_are_the_words_after_the_colon(digit_folder: Path, model: LoadedBlip2):
    tokenizer = load_processor(Blip2Processor, settings_for(digit_folder)).tokenizer
    for word, token in (("yes", model.yes), ("no", model.no)):
        assert tokenizer(f"Answer: {word}", add_special_tokens=False)["input_ids"][-1] == token


def test_prompts_are_averaged(digit_folder: Path, handler: Blip2Handler, model: LoadedBlip2):
    batch = make_batch(make_sample(i) for i in range(3))
    other = Blip2Handler(settings_for(digit_folder, prompts=[OTHER_PROMPT]), "cpu", None)
    both = Blip2Handler(settings_for(digit_folder, prompts=[PROMPT, OTHER_PROMPT]), "cpu", None)
    by_handler = [
        [s.annotation.digit_probability for s in h.run_inference(batch, h.load_model())[0]]
        for h in (handler, other, both)
    ]
    first, second, mean = np.array(by_handler)
    assert mean == pytest.approx((first + second) / 2, abs=1e-6)
    assert np.abs(first - second).max() > 1e-3


def test_digit_probability_by_hand():
    assert digit_probability(np.float32([[0, 0]])) == 0.5
    assert digit_probability(np.float32([[np.log(3), 0], [0, 0]])) == pytest.approx(0.625)
    assert digit_probability(np.float32([[-1e30, 1e30]])) == 0.0


def test_a_score_does_not_depend_on_the_rest_of_the_batch(handler: Blip2Handler, model: LoadedBlip2):
    assert_scores_ignore_batch_mates(lambda batch: handler.run_inference(batch, model)[0])


def test_one_poisoned_sample_is_isolated(handler: Blip2Handler, model: LoadedBlip2, monkeypatch: pytest.MonkeyPatch):
    def poison(bad) -> None:
        features = model.model.get_image_features

        def features_or_fail(pixel_values: torch.Tensor, **arguments):
            if any(bad(image) for image in pixel_values):
                raise RuntimeError("poisoned")
            return features(pixel_values, **arguments)

        monkeypatch.setattr(model.model, "get_image_features", features_or_fail)

    assert_one_poisoned_row_is_isolated(lambda batch: handler.run_inference(batch, model)[0], poison)


def test_only_samples_that_pass_the_cascade_are_scored(digit_folder: Path, model: LoadedBlip2):
    handler = Blip2Handler(settings_for(digit_folder), "cpu", 0.15, 0.4)
    batch = make_batch(
        [
            make_sample(0, cosine=0.14, probability=None),  # below the rescue value
            make_sample(1, cosine=0.16, probability=0.39),  # below the match floor
            make_sample(2, cosine=0.16, probability=0.4),  # between the rescue value and `min`: scored
            make_sample(3, cosine=0.9, probability=0.9),
        ]
    )
    (scored,) = handler.run_inference(batch, model)
    assert [s.annotation.digit_probability is not None for s in scored] == [False, False, True, True]


def test_a_tokenizer_of_another_revision_is_an_error(digit_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        Blip2Processor,
        "from_pretrained",
        lambda *given, load=Blip2Processor.from_pretrained, **named: _with_five_queries(load(*given, **named)),
    )
    with pytest.raises(ValueError, match="5 image placeholders, but the model expects 4"):
        Blip2Handler(settings_for(digit_folder), "cpu", None).load_on(torch.device("cpu"))


def _with_five_queries(processor: Blip2Processor) -> Blip2Processor:
    processor.num_query_tokens = 5
    return processor


def test_the_transform_scores_whole_batches(digit_folder: Path, handler: Blip2Handler, model: LoadedBlip2):
    batch = make_batch(make_sample(i) for i in range(3))
    expected = scores(handler.run_inference(batch, model)[0])
    models = recipe.CrossModalitySettings(flipped_clip=EVERYTHING, digit=settings_for(digit_folder))
    with TestPipeline("FnApiRunner") as p:
        scored = p | beam.Create([batch]) | ScoreByModel(DIGIT, models)
        assert_that(scored | beam.Map(scores), equal_to([expected]))
