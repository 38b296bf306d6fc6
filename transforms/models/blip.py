"""Image-text matching: the RunInference handler for BLIP."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BlipForImageTextRetrieval, BlipProcessor

from pipeline import recipe
from pipeline.records import Sample, SampleBatch
from transforms.cross_modality.cascade import wanted
from transforms.models.fixed_batches import PREPARATION_FAILED, Failure, FixedBatches, describe
from transforms.models.handler import SampleBatchHandler, with_results
from transforms.models.pictures import grey, pixels_of, processed
from transforms.models.probability import as_float32, of_two
from transforms.models.weights import load_pretrained

_BUCKETS = (16, 32, 64, 128, 256, 512)


class _Captioned(NamedTuple):
    """A sample with its caption's tokens, padded to their bucket."""

    sample: Sample
    tokens: torch.Tensor
    mask: torch.Tensor


class _Input(NamedTuple):
    pixels: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor


@dataclasses.dataclass(frozen=True)
class LoadedBlip:
    """A BLIP image-text-matching model with its own preprocessing."""

    model: Any
    processor: Any
    device: torch.device
    max_tokens: int

    def captioned(self, sample: Sample) -> _Captioned:
        """The sample with its tokens, whose number names its bucket."""
        return _Captioned(sample, *self._tokenize(sample.annotation.caption))

    def prepare(self, captioned: _Captioned) -> _Input:
        """The picture beside the tokens."""
        return _Input(processed(self.processor, pixels_of(captioned.sample)), captioned.tokens, captioned.mask)

    def probe(self, tokens: int) -> _Input:
        """What any sound model can score, in the bucket of so many tokens."""
        ids, mask = self._tokenize("a picture", tokens)
        return _Input(processed(self.processor, grey()), ids, mask)

    def score(self, inputs: list[_Input]) -> np.ndarray:
        """Match logits (rows, 2), float32: of "does not match" and of "matches"."""
        pixels, tokens, mask = (torch.stack(column).to(self.device) for column in zip(*inputs, strict=True))
        # the model makes its image mask on torch's default device
        with self.device:
            output = self.model(input_ids=tokens, pixel_values=pixels, attention_mask=mask)
        return output.itm_score.float().cpu().numpy()

    def _tokenize(self, caption: str, at_least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        ids = tokenizer(caption, truncation=True, max_length=self.max_tokens)["input_ids"]
        padding = bucket(max(len(ids), at_least), self.max_tokens) - len(ids)
        return (
            torch.tensor(ids + [tokenizer.pad_token_id] * padding),
            torch.tensor([1] * len(ids) + [0] * padding),
        )


class BlipHandler(SampleBatchHandler[LoadedBlip]):
    """Fills in `match_probability` of the samples that pass the cascade.

        match_probability = softmax(itm(picture, caption))[1]   (arXiv 2309.15954, "BLIP-ITM")

    A caption is padded to a bucket chosen by its own length, and each bucket has its own fixed
    batches: computing is saved on short captions, and a score still does not depend on the
    batch-mates.
    """

    def __init__(self, settings: recipe.ImageTextMatching, device: str, min_cosine: float | None) -> None:
        super().__init__(device)
        self._settings = settings
        self._min_cosine = min_cosine

    def load_on(self, device: torch.device) -> LoadedBlip:
        model, processor = load_pretrained(BlipForImageTextRetrieval, BlipProcessor, self._settings, device)
        positions = model.config.text_config.max_position_embeddings
        if self._settings.max_tokens > positions:
            raise ValueError(
                f"image_text_matching.max_tokens: got {self._settings.max_tokens}; "
                f"{self._settings.model} takes at most {positions}"
            )
        loaded = LoadedBlip(model, processor, device, self._settings.max_tokens)
        # The tokenizer takes its truncation from the first call. Made here, no thread makes that
        # change while another one is reading.
        loaded.probe(0)
        return loaded

    def annotate(self, batch: SampleBatch, model: LoadedBlip) -> SampleBatch:
        buckets: dict[int, dict[int, _Captioned]] = {}
        failures: list[Failure] = []
        for row, sample in enumerate(batch):
            if wanted(sample.annotation, self._min_cosine):
                try:
                    captioned = model.captioned(sample)
                # whatever the tokenizer makes of this caption is recorded with it
                except Exception as error:
                    failures.append(Failure(row, PREPARATION_FAILED, describe(error)))
                else:
                    buckets.setdefault(len(captioned.tokens), {})[row] = captioned

        columns: dict[int, dict[str, Any]] = {}
        for tokens, members in buckets.items():
            probe = functools.partial(model.probe, tokens)
            logits, failed = FixedBatches(self._settings.batch_size, model.prepare, model.score, probe)(members)
            for row, pair in logits.items():
                columns[row] = {"match_probability": match_probability(pair)}
            failures += failed
        return with_results(batch, "image_text_matching", columns, failures)


def bucket(token_count: int, max_tokens: int) -> int:
    """The padded length of a caption: the smallest bucket that holds it, at most `max_tokens`."""
    return min([size for size in _BUCKETS if size >= token_count] + [max_tokens])


def match_probability(logits: np.ndarray) -> float:
    """softmax(logits)[1]."""
    return as_float32(of_two(logits[1], logits[0]))
