"""Full-size architectures with random weights in the real file formats: the real code loads them, with exact scores."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from benchmarks import random_models
from tests.transforms.models.model_batches import make_batch, make_sample, scores
from transforms.cross_modality.digit import DigitSettings
from transforms.cross_modality.flipped_clip import FlippedClipSettings
from transforms.cross_modality.image_text_matching import ImageTextMatchingSettings
from transforms.models.blip import BlipHandler
from transforms.models.blip2 import Blip2Handler
from transforms.models.clip import ClipHandler
from transforms.models.handler import SampleBatchHandler
from transforms.models.precision import resolve


def assert_bits_stay(handler: SampleBatchHandler) -> None:
    """Check that scores are identical for a sample alone, with other samples and in another order."""
    model = handler.load_model()
    samples = [make_sample(i) for i in range(3)]
    together = scores(handler.run_inference(make_batch(samples), model)[0])
    assert scores(handler.run_inference(make_batch(samples[::-1]), model)[0]) == together
    alone = scores(handler.run_inference(make_batch(samples[1:2]), model)[0])
    assert alone == {uid: together[uid] for uid in alone}
    assert len(set(together.values())) == len(samples)


@pytest.fixture(autouse=True)
def _all_threads(_one_thread: None) -> None:
    torch.set_num_threads(2)


FASTEST = resolve("auto", "cpu")
# A CPU without native bf16 emulates it: minutes for each of these models. Such a machine tests fp32 here, and bf16 in
# `make test-large`.
PRECISIONS = [FASTEST] if FASTEST == "bf16" else [FASTEST, pytest.param("bf16", marks=pytest.mark.large)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ["ViT-B-32", pytest.param("ViT-L-14", marks=pytest.mark.slow)])
def test_clip(tmp_path: Path, architecture: str, precision: str):
    random_models.save_open_clip(tmp_path / "clip", open_clip.get_model_config(architecture))
    settings = FlippedClipSettings(model=str(tmp_path / "clip"), min=0.0, batch_size=4)
    assert_bits_stay(ClipHandler(settings, "cpu", precision))


@pytest.mark.skipif(FASTEST == "fp32", reason="test_clip has it")
def test_clip_in_fp32(tmp_path: Path):
    random_models.save_open_clip(tmp_path / "clip", open_clip.get_model_config("ViT-B-32"))
    settings = FlippedClipSettings(model=str(tmp_path / "clip"), min=0.0, batch_size=4)
    assert_bits_stay(ClipHandler(settings, "cpu", "fp32"))


@pytest.mark.slow
def test_siglip(tmp_path: Path):
    random_models.save_siglip(tmp_path / "siglip")
    settings = FlippedClipSettings(model=str(tmp_path / "siglip"), min=-1.0, batch_size=4)
    assert_bits_stay(ClipHandler(settings, "cpu", "bf16"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("vision", [pytest.param({}, id="base"), pytest.param(random_models.LARGE_VISION, id="large")])
def test_blip_itm(tmp_path: Path, vision: dict, precision: str):
    random_models.save_itm(tmp_path / "itm", ["a", "red", "square", "number", "picture", "of"], **vision)
    settings = ImageTextMatchingSettings(model=str(tmp_path / "itm"), min=0.0, batch_size=2)
    assert_bits_stay(BlipHandler(settings, "cpu", None, precision))


@pytest.mark.large
def test_blip2_opt_2_7b(tmp_path: Path):
    random_models.save_digit(tmp_path / "digit", random_models.word_tokenizer())
    settings = DigitSettings(model=str(tmp_path / "digit"), prompts=[random_models.PROMPT], batch_size=2)
    assert_bits_stay(Blip2Handler(settings, "cpu", None, None, "bf16"))
