"""Scores from prepared bytes compared with the plain path of each library, on images of every mode found in pools."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageOps
from transformers import Blip2ForConditionalGeneration, Blip2Processor, BlipForImageTextRetrieval, BlipProcessor

from pipeline.decoding.images import decode
from tests.helpers import encode
from tests.transforms.models.model_batches import make_batch, make_sample, scores
from tests.transforms.models.tiny_models import PROMPT
from transforms.core import recipe
from transforms.core.plain_text import plain_text
from transforms.core.records import Sample, SampleBatch
from transforms.cross_modality.digit import DigitSettings
from transforms.cross_modality.flipped_clip import FlippedClipSettings
from transforms.cross_modality.image_text_matching import ImageTextMatchingSettings
from transforms.models.blip import BlipHandler
from transforms.models.blip2 import Blip2Handler
from transforms.models.clip import ClipHandler, ClipPreparation
from transforms.models.prepare import load_prepare

# Float32 sums have another order in a padded batch than in a batch of one; nothing else differs.
BOUND = 2e-6
PER_MODE = 8


def noisy(seed: int) -> Image.Image:
    """An image with detail at every scale; its size depends on the number."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    width, height = rng.integers(40, 160, 2).tolist()
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + rng.integers(-20, 20, pixels.shape)).clip(0, 255).astype(np.uint8))


def rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, "JPEG", exif=exif)


def deep_grey(image: Image.Image) -> bytes:
    return encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(image.convert("L"))
    return image


MODES = {
    "RGB": lambda image: encode(image, "JPEG"),
    "L": lambda image: encode(image.convert("L"), "JPEG"),
    "CMYK": lambda image: encode(image.convert("CMYK"), "JPEG"),
    "palette": lambda image: encode(image.convert("P"), "PNG"),
    "alpha": lambda image: encode(with_alpha(image), "PNG"),
    "webp": lambda image: encode(image, "WEBP"),
    "16 bit": deep_grey,
    "EXIF-rotated": rotated,
}
FILES = [(mode, make(noisy(100 * i + j))) for i, (mode, make) in enumerate(MODES.items()) for j in range(PER_MODE)]


def plain_picture(mode: str, content: bytes) -> Image.Image:
    """The image as Pillow opens it, upright and on white; 16-bit grey, which Pillow clips to white, is scaled."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if mode == "alpha":
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if mode == "16 bit":
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


@pytest.fixture(scope="module")
def settings(clip_folder: Path, itm_folder: Path, digit_folder: Path) -> recipe.CrossModalitySettings:
    return recipe.CrossModalitySettings(
        flipped_clip=FlippedClipSettings(model=str(clip_folder), min=-1.0, batch_size=8, score_unflipped=True),
        image_text_matching=ImageTextMatchingSettings(model=str(itm_folder), min=0.0, batch_size=8),
        digit=DigitSettings(model=str(digit_folder), prompts=[PROMPT], batch_size=8),
    )


@pytest.fixture(scope="module")
def handlers(settings: recipe.CrossModalitySettings) -> list:
    assert settings.image_text_matching and settings.digit
    return [
        ClipHandler(settings.flipped_clip, "cpu"),
        BlipHandler(settings.image_text_matching, "cpu", None),
        Blip2Handler(settings.digit, "cpu", None),
    ]


def through(handlers: list, batch: SampleBatch) -> SampleBatch:
    for handler in handlers:
        (batch,) = handler.run_inference(batch, handler.load_model())
    return batch


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    pictures = [decode(content, 10**7)[0] for _, content in FILES]
    return [Sample(make_sample(i).annotation, {}, b"x", pixels) for i, pixels in enumerate(pictures)]


@pytest.fixture(scope="module")
def prepared(settings: recipe.CrossModalitySettings, samples: list[Sample]) -> list[Sample]:
    return [*map(load_prepare(settings), samples)]


@pytest.fixture(scope="module")
def scored(handlers: list, prepared: list[Sample]) -> list[Sample]:
    batch = through(handlers, make_batch(prepared))
    assert not batch.dead_letters
    return list(batch)


def test_there_are_enough_images():
    assert len(FILES) >= 50


def test_prepared_and_decoded_samples_have_identical_scores(
    handlers: list, samples: list[Sample], scored: list[Sample]
):
    assert scores(make_batch(scored)) == scores(through(handlers, make_batch(samples)))


def test_prepared_samples_have_no_pixels_or_file_and_scored_samples_have_no_inputs(
    prepared: list[Sample], scored: list[Sample]
):
    assert all(s.pixels is None and s.image_bytes == b"" and len(s.inputs) == 3 for s in prepared)
    assert not any(s.inputs for s in scored)


def largest(found: list[float | None], expected: list[float]) -> float:
    return max(abs((a or 0.0) - b) for a, b in zip(found, expected, strict=True))


def test_clip(clip_folder: Path, scored: list[Sample]):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    expected: dict[bool, list[float]] = {False: [], True: []}
    with torch.no_grad():
        for sample, (mode, content) in zip(scored, FILES, strict=True):
            text = model.eval().encode_text(tokenizer([sample.annotation.caption]), normalize=True)
            picture = plain_picture(mode, content)
            for flipped, view in ((False, picture), (True, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
                image = model.encode_image(preprocess(view).unsqueeze(0), normalize=True)
                expected[flipped].append(float(text @ image.T))
    assert largest([s.annotation.flipped_clip_cosine for s in scored], expected[True]) <= BOUND
    assert largest([s.annotation.unflipped_clip_cosine for s in scored], expected[False]) <= BOUND


def test_itm(itm_folder: Path, scored: list[Sample]):
    model = BlipForImageTextRetrieval.from_pretrained(itm_folder).eval()
    processor = BlipProcessor.from_pretrained(itm_folder, backend="pil")
    expected = []
    with torch.no_grad():
        for sample, (mode, content) in zip(scored, FILES, strict=True):
            inputs = processor(
                images=plain_picture(mode, content), text=plain_text(sample.annotation.caption), return_tensors="pt",
                truncation=True, max_length=64,
            )  # fmt: skip
            expected.append(float(model(**inputs).itm_score.softmax(-1)[0, 1]))
    assert largest([s.annotation.match_probability for s in scored], expected) <= BOUND


def test_digit(digit_folder: Path, scored: list[Sample]):
    model = Blip2ForConditionalGeneration.from_pretrained(digit_folder).eval()
    processor = Blip2Processor.from_pretrained(digit_folder, backend="pil")
    answers = [processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" yes", " no")]
    expected = []
    with torch.no_grad():
        for mode, content in FILES:
            inputs = processor(images=plain_picture(mode, content), text=PROMPT, return_tensors="pt")
            expected.append(float(model(**inputs).logits[0, -1, answers].softmax(-1)[0]))
    assert largest([s.annotation.digit_probability for s in scored], expected) <= BOUND


def test_flipping_is_horizontal(settings: recipe.CrossModalitySettings):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :32] = 255  # the upper left
    prepare = ClipPreparation.load(settings.flipped_clip)
    flipped, upright = prepare.prepare(Sample(make_sample(0).annotation, {}, b"", pixels)).views
    middle = flipped.shape[1] // 2
    assert upright[:, : middle - 2, : middle - 2].min() == 255 == flipped[:, : middle - 2, middle + 2 :].min()
    left, right = np.s_[:, : middle - 2, : middle - 2], np.s_[:, : middle - 2, middle + 2 :]
    assert upright[right].max() == 0 == flipped[left].max()
    assert upright[:, middle + 2 :].max() == 0 == flipped[:, middle + 2 :].max()
