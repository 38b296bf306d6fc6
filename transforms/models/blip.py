"""Image-text matching: the RunInference handler for BLIP."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from transformers import BlipForImageTextRetrieval, BlipProcessor

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
    """One sample as the model takes it: bytes (3, h, w), and the caption's tokens, padded to their bucket."""

    pixels: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


class BlipPreparation:
    """A BLIP model's own preprocessing and tokenizer."""

    def __init__(self, processor: Any, max_tokens: int) -> None:
        self.pictures = Processed(processor)
        self._tokenizer, self._max_tokens = processor.tokenizer, max_tokens
        # The tokenizer takes its truncation from the first call. Made here, no thread makes that
        # change while another one is reading.
        self.probe(0)

    @classmethod
    def load(cls, settings: ImageTextMatchingSettings) -> BlipPreparation:
        """The preprocessing and the tokenizer that belong to the model; its weights are not looked at."""
        return cls(load_processor(BlipProcessor, settings), settings.max_tokens)

    def prepare(self, sample: Sample) -> BlipInput:
        """The picture beside the caption's tokens, whose number names the bucket."""
        return BlipInput(self.pictures(pixels_of(sample)), *self._tokenize(sample.annotation.caption))

    def probe(self, tokens: int) -> BlipInput:
        """What any sound model can score, in the bucket of so many tokens."""
        return BlipInput(self.pictures(grey()), *self._tokenize("a picture", tokens))

    def _tokenize(self, caption: str, at_least: int = 0) -> tuple[np.ndarray, np.ndarray]:
        ids = self._tokenizer(caption, truncation=True, max_length=self._max_tokens)["input_ids"]
        padding = bucket(max(len(ids), at_least), self._max_tokens) - len(ids)
        return (
            np.array(ids + [self._tokenizer.pad_token_id] * padding),
            np.array([1] * len(ids) + [0] * padding),
        )


@dataclasses.dataclass(frozen=True)
class LoadedBlip(InMemory):
    """A BLIP image-text-matching model with its own preparation."""

    model: Any
    preparation: BlipPreparation
    table: torch.Tensor
    one_at_a_time: Any = dataclasses.field(default_factory=threading.Lock)  # so that a batch finds the memory it needs

    def prepare(self, sample: Sample) -> BlipInput:
        """As `BlipPreparation.prepare`."""
        return self.preparation.prepare(sample)

    def probe(self, shape: Hashable) -> BlipInput:
        """What any sound model can score, in the bucket of so many tokens."""
        assert isinstance(shape, int)
        return self.preparation.probe(shape)

    def constants(self) -> None:
        """None needed."""

    def score(self, inputs: list[BlipInput]) -> np.ndarray:
        """Match logits (rows, 2), float32: of "does not match" and of "matches"."""
        pixels, tokens, mask = zip(*inputs, strict=True)
        device = self.table.device
        # the model makes its image mask on torch's default device
        with self.one_at_a_time, torch.inference_mode(), device:
            output = self.model(
                input_ids=on_device(np.stack(tokens), device),
                pixel_values=normalised(pixels, self.table),
                attention_mask=on_device(np.stack(mask), device),
            )
            return output.itm_score.float().cpu().numpy()


def preprocessing(settings: ImageTextMatchingSettings) -> dict[str, Any]:
    """What the model's own preprocessing does to a picture, for the manifest."""
    return settings_of(load_processor(BlipProcessor, settings).image_processor)


class BlipHandler(SampleBatchHandler[LoadedBlip]):
    """Fills in `match_probability` of the samples that pass the cascade.

        match_probability = softmax(itm(picture, caption))[1]   (arXiv 2309.15954, "BLIP-ITM")

    A caption is padded to a bucket chosen by its own length, and each bucket has its own fixed
    batches: computing is saved on short captions, and a score still does not depend on the
    batch-mates.
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
    """The padded length of a caption: the smallest bucket that holds it, at most `max_tokens`."""
    return min([size for size in _BUCKETS if size >= token_count] + [max_tokens])


def match_probability(logits: np.ndarray) -> float:
    """softmax(logits)[1]."""
    return as_float32(of_two(logits[1], logits[0]))
