"""Image-text matching: the `RunInference` handler for BLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from transforms.core.plain_text import plain_text
from transforms.core.records import Annotation, Sample
from transforms.models.cascade import wanted
from transforms.models.handler import InMemory, SampleBatchHandler
from transforms.models.pictures import Processed, grey, normalised, on_device, pixels_of, settings_of
from transforms.models.precision import dtype_on
from transforms.models.probability import as_float32, of_two
from transforms.models.row_wise import RowWise
from transforms.models.weights import load_pretrained, load_processor

if TYPE_CHECKING:
    from transforms.cross_modality.image_text_matching import ImageTextMatchingSettings

_BUCKETS = (16, 32, 64, 128, 256, 512)


class BlipInput(NamedTuple):
    """The model inputs for one sample.

    `pixels` is uint8 (3, h, w). `tokens` and `mask` are int64 (t,), with t the bucket of the caption; `mask` is 1 for
    caption tokens and 0 for padding.
    """

    pixels: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


class BlipPreparation:
    """The image preprocessing and tokenizer of a BLIP model."""

    def __init__(self, processor: Any, max_tokens: int) -> None:
        self.pictures = Processed(processor)
        self._tokenizer, self._max_tokens = processor.tokenizer, max_tokens
        # The first call sets the tokenizer's truncation. Making that call here keeps one thread from changing the
        # setting while another thread tokenizes.
        self.probe(0)

    @classmethod
    def load(cls, settings: ImageTextMatchingSettings) -> BlipPreparation:
        """Load the processor of the configured model, without its weights."""
        return cls(_load_processor(settings), settings.max_tokens)

    def prepare(self, sample: Sample) -> BlipInput:
        """The model inputs for a decoded sample."""
        return BlipInput(self.pictures(pixels_of(sample)), *self._tokenize(plain_text(sample.annotation.caption)))

    def probe(self, tokens: int) -> BlipInput:
        """A known-good input in the bucket for `tokens` tokens."""
        return BlipInput(self.pictures(grey()), *self._tokenize("a picture", tokens))

    def _tokenize(self, caption: str, min_tokens: int = 0) -> tuple[np.ndarray, np.ndarray]:
        ids = self._tokenizer(caption, truncation=True, max_length=self._max_tokens)["input_ids"]
        padding = bucket(max(len(ids), min_tokens), self._max_tokens) - len(ids)
        return (
            np.array(ids + [self._tokenizer.pad_token_id] * padding),
            np.array([1] * len(ids) + [0] * padding),
        )


@dataclasses.dataclass(frozen=True)
class LoadedBlip(InMemory):
    """A BLIP image-text-matching model in memory, with its preparation.

    `table` is the (3, 256) byte table of the preprocessing (see `pictures.byte_table`), on the model's device and in
    its dtype.
    """

    model: Any
    preparation: BlipPreparation
    table: torch.Tensor

    def prepare(self, sample: Sample) -> BlipInput:
        """See `BlipPreparation.prepare`."""
        return self.preparation.prepare(sample)

    def probe(self, shape: Hashable) -> BlipInput:
        """A known-good input; `shape` is its number of tokens."""
        assert isinstance(shape, int)
        return self.preparation.probe(shape)

    def constants(self) -> None:
        """No constants."""

    def score(self, inputs: list[BlipInput]) -> np.ndarray:
        """Logits, float32 (rows, 2): "does not match", "matches"."""
        pixels, tokens, mask = zip(*inputs, strict=True)
        device = self.table.device
        # The model creates its image mask on torch's default device, so `device` is made the default.
        with self.lock, torch.inference_mode(), device:
            output = self.model(
                input_ids=on_device(np.stack(tokens), device),
                pixel_values=normalised(pixels, self.table),
                attention_mask=on_device(np.stack(mask), device),
            )
            return output.itm_score.float().cpu().numpy()


def preprocessing(settings: ImageTextMatchingSettings) -> dict[str, Any]:
    """The preprocessing settings of the configured model, as recorded in the manifest."""
    return settings_of(_load_processor(settings).image_processor)


class BlipHandler(SampleBatchHandler[LoadedBlip]):
    """Fills in `match_probability` for the samples that the cascade selects.

        match_probability = softmax(itm(image, caption))[1]   (arXiv 2309.15954, "BLIP-ITM")

    A caption is padded to a bucket that depends on its length only, and each bucket is scored in batches of one fixed
    shape. Short captions cost less, and a score does not depend on the other samples of the batch.
    """

    rule: ClassVar[str] = "image_text_matching"

    def __init__(
        self,
        settings: ImageTextMatchingSettings,
        device: str,
        min_cosine: float | None,
        precision: str = "fp32",
    ) -> None:
        super().__init__(settings.batch_size, device)
        self._settings, self._min_cosine, self._precision = settings, min_cosine, precision

    def load_on(self, device: torch.device) -> LoadedBlip:
        from transformers import BlipForImageTextRetrieval  # importing it takes seconds

        dtype = dtype_on(self._precision, device)
        model = load_pretrained(BlipForImageTextRetrieval, self._settings, device, dtype)
        positions = model.config.text_config.max_position_embeddings
        if self._settings.max_tokens > positions:
            raise ValueError(
                f"image_text_matching.max_tokens: got {self._settings.max_tokens}; "
                f"{self._settings.model} takes at most {positions}"
            )
        model.itm_head = RowWise(model.itm_head)
        preparation = BlipPreparation.load(self._settings)
        return LoadedBlip(model, preparation, torch.from_numpy(preparation.pictures.table).to(device, dtype))

    def wants(self, annotation: Annotation) -> bool:
        return annotation.match_probability is None and wanted(annotation, self._min_cosine)

    def shape_of(self, prepared: BlipInput) -> Hashable:
        return len(prepared.tokens)

    def columns(self, scores: np.ndarray, constants: Any) -> dict[str, Any]:
        return {"match_probability": match_probability(scores)}


def bucket(token_count: int, max_tokens: int) -> int:
    """The padded length of a caption in tokens: the smallest bucket that fits it, capped at `max_tokens`."""
    return min([size for size in _BUCKETS if size >= token_count] + [max_tokens])


def match_probability(logits: np.ndarray) -> float:
    """softmax(logits)[1] for logits float32 (2,), rounded to float32."""
    return as_float32(of_two(logits[1], logits[0]))


def _load_processor(settings: ImageTextMatchingSettings) -> Any:
    from transformers import BlipProcessor  # importing it takes seconds

    return load_processor(BlipProcessor, settings)
