from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import open_clip
import pytest
import torch
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to
from PIL import Image

from benchmarks import random_models
from tests.transforms.models.model_batches import (
    assert_one_poisoned_row_is_isolated,
    assert_scores_ignore_batch_mates,
    make_batch,
    make_sample,
    scores,
)
from transforms.core import recipe
from transforms.core.records import Sample, SampleBatch
from transforms.cross_modality.digit import DigitSettings
from transforms.cross_modality.flipped_clip import FLIPPED_CLIP, FlippedClipSettings
from transforms.cross_modality.join_wanted import JoinWanted
from transforms.models.clip import (
    ClipHandler,
    ClipPreparation,
    LoadedClip,
    _preprocess_cfg,
    cosine,
    share_of_first,
    shortened,
)
from transforms.models.pictures import pixels_of
from transforms.models.score import ScoreByModel
from transforms.models.settings import ClipPromptsSettings
from transforms.models.weights import ClipSource


def settings_for(folder: Path, **changes: Any) -> FlippedClipSettings:
    return FlippedClipSettings(
        **{"model": str(folder), "min": 0.0, "batch_size": 4, "score_unflipped": True, **changes}
    )


@pytest.fixture
def handler(clip_folder: Path) -> ClipHandler:
    return ClipHandler(settings_for(clip_folder), "cpu")


@pytest.fixture
def model(handler: ClipHandler) -> LoadedClip:
    return handler.load_on(torch.device("cpu"))


@functools.cache
def plain_model(folder: Path) -> tuple:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


def plain_features(folder: Path, picture: Image.Image, caption: str) -> tuple[np.ndarray, np.ndarray]:
    """Text and image features computed as documented by open_clip, one sample at a time."""
    model, preprocess, tokenizer = plain_model(folder)
    with torch.no_grad():
        text = model.encode_text(tokenizer([caption]), normalize=True)
        image = model.encode_image(preprocess(picture).unsqueeze(0), normalize=True)
    return text[0].numpy(), image[0].numpy()


def embedding_of(sample: Sample) -> np.ndarray:
    assert sample.annotation.embedding is not None
    return np.frombuffer(sample.annotation.embedding, np.float16).astype(np.float32)


def test_scores_do_not_depend_on_how_many_calls_run_at_once(handler: ClipHandler, clip_folder: Path) -> None:
    batch = make_batch([make_sample(i) for i in range(13)])
    expected = scores(handler.run_inference(batch, handler.load_model())[0])
    several = ClipHandler(settings_for(clip_folder), "cpu")
    several.calls = 3
    assert scores(several.run_inference(batch, several.load_model())[0]) == expected
    assert len(set(expected.values())) == 13


def test_a_call_on_a_cpu_has_one_thread(handler: ClipHandler) -> None:
    torch.set_num_threads(2)  # the fixture restores it
    handler.load_model()
    assert torch.get_num_threads() == 1


def test_a_twin_shares_the_weights(model: LoadedClip) -> None:
    twin = model.twin()
    for ours, theirs in zip(model.model.parameters(), twin.model.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    assert twin.model is not model.model and twin.lock is not model.lock


def test_scores_equal_those_of_open_clip_on_the_mirrored_image(
    clip_folder: Path, handler: ClipHandler, model: LoadedClip
):
    (scored,) = handler.run_inference(make_batch(make_sample(i) for i in range(6)), model)
    for sample in scored:
        picture = Image.fromarray(pixels_of(sample))
        text, mirrored = plain_features(
            clip_folder, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), sample.annotation.caption
        )
        _, upright = plain_features(clip_folder, picture, sample.annotation.caption)
        assert sample.annotation.flipped_clip_cosine == pytest.approx(float(text @ mirrored), abs=2e-6)
        assert sample.annotation.unflipped_clip_cosine == pytest.approx(float(text @ upright), abs=2e-6)
        assert abs(float(text @ mirrored) - float(text @ upright)) > 1e-4  # must differ for the test to be meaningful
        embedding = embedding_of(sample)
        np.testing.assert_allclose(embedding, upright, atol=1e-3)
        assert np.linalg.norm(embedding) == pytest.approx(1, abs=2e-3)


def test_without_the_unflipped_score_the_embedding_is_that_of_the_mirrored_image(
    clip_folder: Path, handler: ClipHandler, model: LoadedClip
):
    batch = make_batch(make_sample(i) for i in range(3))
    (both,) = handler.run_inference(batch, model)
    alone = ClipHandler(settings_for(clip_folder, score_unflipped=False), "cpu")
    (flipped,) = alone.run_inference(batch, alone.load_model())
    for one, other in zip(both, flipped, strict=True):
        assert one.annotation.flipped_clip_cosine == other.annotation.flipped_clip_cosine
        assert other.annotation.unflipped_clip_cosine is None
        _, mirrored = plain_features(clip_folder, Image.fromarray(pixels_of(one)[:, ::-1].copy()), "")
        embedding = embedding_of(other)
        np.testing.assert_allclose(embedding, mirrored, atol=1e-3)


def test_a_score_does_not_depend_on_the_rest_of_the_batch(handler: ClipHandler, model: LoadedClip):
    assert_scores_ignore_batch_mates(lambda batch: handler.run_inference(batch, model)[0])


def test_one_poisoned_sample_is_isolated(handler: ClipHandler, model: LoadedClip, monkeypatch: pytest.MonkeyPatch):
    def poison(bad) -> None:
        encode = model.model.encode_image

        def encode_or_fail(images: torch.Tensor) -> torch.Tensor:
            if any(bad(image) for image in images):
                raise RuntimeError("poisoned")
            return encode(images)

        monkeypatch.setattr(model.model, "encode_image", encode_or_fail)

    assert_one_poisoned_row_is_isolated(lambda batch: handler.run_inference(batch, model)[0], poison)


def test_nan_is_a_dead_letter_and_other_samples_keep_their_scores(
    handler: ClipHandler, model: LoadedClip, monkeypatch: pytest.MonkeyPatch
):
    samples = [make_sample(i) for i in range(4)]
    (sound,) = handler.run_inference(make_batch(samples), model)
    encode = model.model.encode_text
    poisoned = torch.from_numpy(model.preparation.tokens(samples[2].annotation.caption))

    def encode_or_nan(tokens: torch.Tensor) -> torch.Tensor:
        hit = (tokens == poisoned[: tokens.shape[1]]).all(1, keepdim=True)
        return encode(tokens).masked_fill(hit, float("nan"))

    monkeypatch.setattr(model.model, "encode_text", encode_or_nan)
    (scored,) = handler.run_inference(make_batch(samples), model)
    expected = scores(sound)
    del expected[samples[2].annotation.uid]
    assert scores(scored) == expected
    assert [(d.uid, d.reason) for d in scored.dead_letters] == [(samples[2].annotation.uid, "not_finite")]


def test_an_extreme_aspect_ratio_is_a_dead_letter(handler: ClipHandler, model: LoadedClip):
    thread = Sample(make_sample(1).annotation, {}, b"", np.zeros((1, 600, 3), np.uint8))
    (scored,) = handler.run_inference(make_batch([thread]), model)
    assert len(scored) == 0
    assert "600 x 1 pixels" in scored.dead_letters[0].message


def test_an_undecoded_sample_is_a_programming_error(handler: ClipHandler, model: LoadedClip):
    undecoded = Sample(make_sample(1).annotation, {}, b"", None)
    with pytest.raises(AssertionError, match="without being decoded"):
        handler.run_inference(make_batch([undecoded]), model)


@pytest.mark.parametrize("caption", ["a red square " * 2000, "a" + " " * 9000 + "b", "&amp;" * 3000, "é" * 9000])
def test_cutting_a_long_caption_does_not_change_its_tokens(caption: str):
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    assert len(shortened(caption)) <= 4096
    assert torch.equal(tokenizer([caption]), tokenizer([shortened(caption)]))


def test_cosine_is_a_float32_and_does_not_depend_on_batching():
    text, image = np.eye(4, dtype=np.float32)[:2]
    assert cosine(text, text) == 1.0
    assert cosine(text, image) == 0.0
    value = cosine(np.float32([0.6, 0.8]), np.float32([0.8, 0.6]))
    assert value == float(np.float32(value)) == pytest.approx(0.96)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_raises(clip_folder: Path):
    with pytest.raises(RuntimeError, match="no usable CUDA device"):
        ClipHandler(settings_for(clip_folder), "cuda").load_model()


def test_an_architecture_without_weights_raises():
    settings = FlippedClipSettings(model="ViT-B-32", min=0.2)
    with pytest.raises(ValueError, match="needs `weights`"):
        ClipHandler(settings, "cpu").load_on(torch.device("cpu"))


def test_the_transform_scores_whole_batches(clip_folder: Path, handler: ClipHandler, model: LoadedClip):
    batches = [make_batch([make_sample(0), make_sample(1)]), make_batch([make_sample(2)])]
    expected = [scores(handler.run_inference(batch, model)[0]) for batch in batches]

    def check(batch: SampleBatch) -> dict:
        assert isinstance(batch, SampleBatch)
        return scores(batch)

    with TestPipeline("FnApiRunner") as p:
        models = recipe.CrossModalitySettings(flipped_clip=settings_for(clip_folder))
        scored = p | beam.Create(batches) | ScoreByModel(FLIPPED_CLIP, models) | beam.Map(check)
        assert_that(scored, equal_to(expected))


PROMPTS = ClipPromptsSettings(
    positive=["digits", "a number"], negative=["a field", "a face", "no"], min_probability=0.5
)


@pytest.mark.parametrize("unflipped", [False, True])
def test_the_probability_of_the_positive_prompts_equals_that_of_clip(clip_folder: Path, unflipped: bool):
    handler = ClipHandler(settings_for(clip_folder, score_unflipped=unflipped), "cpu", prompts=PROMPTS)
    (scored,) = handler.run_inference(make_batch(make_sample(i) for i in range(3)), handler.load_model())
    plain, _, tokenizer = plain_model(clip_folder)
    for sample in scored:
        pixels = pixels_of(sample) if unflipped else pixels_of(sample)[:, ::-1].copy()
        _, image = plain_features(clip_folder, Image.fromarray(pixels), "")
        with torch.no_grad():
            prompts = plain.encode_text(tokenizer([*PROMPTS.positive, *PROMPTS.negative]), normalize=True).numpy()
            scale = float(plain.logit_scale.exp())
        shares = torch.softmax(torch.from_numpy(scale * prompts @ image), 0)
        assert sample.annotation.digit_prompt_probability == pytest.approx(float(shares[:2].sum()), abs=1e-5)


def test_without_prompts_there_is_no_prompt_probability(handler: ClipHandler, model: LoadedClip):
    (scored,) = handler.run_inference(make_batch([make_sample(0)]), model)
    assert scored.samples[0].annotation.digit_prompt_probability is None


def test_share_of_first_without_overflow():
    image = np.float32([1, 0])
    assert share_of_first(np.float32([[1000, 0], [-1000, 0]]), image, 1) == 1.0
    assert share_of_first(np.float32([[5, 1], [5, 2], [5, 3], [5, 4]]), image, 1) == 0.25


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_every_precision_a_score_does_not_depend_on_the_rest_of_the_batch(clip_folder: Path, precision: str):
    handler = ClipHandler(settings_for(clip_folder), "cpu", precision)
    model = handler.load_model()
    assert_scores_ignore_batch_mates(lambda batch: handler.run_inference(batch, model)[0])


def test_bf16_scores_are_close_to_fp32_but_not_equal(clip_folder: Path):
    batch = make_batch(make_sample(i) for i in range(8))
    found = []
    for precision in ("fp32", "bf16"):
        handler = ClipHandler(settings_for(clip_folder), "cpu", precision)
        (scored,) = handler.run_inference(batch, handler.load_model())
        found.append(np.array([s.annotation.flipped_clip_cosine for s in scored]))
    drift = np.abs(found[0] - found[1]).max()
    assert 0 < drift < 0.02


def test_the_tokenizer_cache_is_bounded(clip_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transforms.models.clip._MAX_CACHED_WORDS", 5)
    prepare = ClipPreparation.load(settings_for(clip_folder))
    plain = open_clip.get_tokenizer("ViT-B-32")
    for start in range(0, 60, 6):
        caption = " ".join(f"wordthat{chr(97 + (start + i) % 26)}xq" for i in range(3))
        assert np.array_equal(prepare.tokens(caption), plain([caption], context_length=24)[0].numpy())
    assert len(prepare._tokenize.cache) == 5  # type: ignore[attr-defined]


def test_preprocessing_of_another_model_is_rejected(clip_folder: Path):
    _, _, other = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}", image_mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="does more than"):
        ClipPreparation.load(settings_for(clip_folder)).table_for(other)


@pytest.mark.parametrize(
    ("name", "tag"), [("ViT-B-32", "openai"), ("ViT-L-14", "openai"), ("ViT-B-16-SigLIP", "webli"), ("RN50", "openai")]
)
def test_preprocessing_without_the_model_equals_that_of_open_clip(name: str, tag: str):
    cfg = _preprocess_cfg(ClipSource(name, tag, False))
    known = open_clip.get_pretrained_cfg(name, tag)
    side = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    assert (cfg.size, tuple(cfg.mean), tuple(cfg.std)) == ((side, side), tuple(known["mean"]), tuple(known["std"]))
    assert (cfg.interpolation, cfg.resize_mode) == (
        known.get("interpolation", "bicubic"), known.get("resize_mode", "shortest")
    )  # fmt: skip


def test_text_buckets_do_not_change_the_features(clip_folder: Path, handler: ClipHandler, model: LoadedClip):
    captions = ["a cat", "a red square " * 5, "and so on " * 60]
    seen: list[tuple[int, ...]] = []
    hook = model.model.transformer.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    tokens = np.stack([model.preparation.tokens(caption) for caption in [*captions, "a dog"] * 4 + ["a dog"]])
    with torch.inference_mode():
        cut = model.text(tokens)
        hook.remove()
        whole = model.model.encode_text(torch.from_numpy(tokens))
    np.testing.assert_allclose(cut.numpy(), whole.numpy(), atol=1e-5)
    context = tokens.shape[1]
    assert {length for _, length in seen} == {16, context}
    assert {rows for rows, _ in seen} == {2}, "one fixed shape a bucket, whatever the captions are"


def test_beam_does_not_pickle_batches_to_measure_their_size(clip_folder: Path):
    models = recipe.CrossModalitySettings(flipped_clip=settings_for(clip_folder))
    batches = TestPipeline() | beam.Create([make_batch([make_sample(0)])])
    for found in (
        batches | ScoreByModel(FLIPPED_CLIP, models),
        batches | JoinWanted(models.model_copy(update={"digit": DigitSettings(model="m")})),
    ):
        assert found.element_type is SampleBatch
    coder, batch = beam.coders.registry.get_coder(SampleBatch), make_batch([make_sample(0), make_sample(1)])
    assert coder.estimate_size(batch) == batch.nbytes == sum(pixels_of(sample).nbytes for sample in batch)
    prepared = make_batch(Sample(s.annotation, {}, b"ab", inputs={"m": (np.zeros(5), None)}) for s in batch)
    assert prepared.nbytes == 2 * (2 + 40)


def test_siglip_text_features_equal_those_of_open_clip_with_many_threads(tmp_path: Path):
    small_tower = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
    folder = tmp_path / "siglip"
    random_models.save_siglip(
        folder, embed_dim=64, vision_cfg=small_tower, text_cfg={"width": 64, "heads": 2, "layers": 2}
    )
    handler = ClipHandler(settings_for(folder), "cpu")
    model = handler.load_on(torch.device("cpu"))
    with ThreadPoolExecutor(8) as threads:
        tokens = list(threads.map(model.preparation.tokens, [f"a picture of {'a ' * (n % 40)}" for n in range(200)]))
    assert {len(of_one) for of_one in tokens} == {64}
    (scored,) = handler.run_inference(make_batch(make_sample(i) for i in range(4)), model)
    for sample in scored:
        caption, upright = plain_features(folder, Image.fromarray(pixels_of(sample)), sample.annotation.caption)
        assert sample.annotation.unflipped_clip_cosine == pytest.approx(float(caption @ upright), abs=2e-6)
