"""Flipped CLIP: the RunInference handler for open_clip models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.nn.functional import normalize

from pipeline import recipe
from pipeline.records import Sample, SampleBatch
from transforms.models.fixed_batches import FixedBatches
from transforms.models.handler import SampleBatchHandler, with_results
from transforms.models.pictures import grey, pixels_of
from transforms.models.probability import as_float32
from transforms.models.weights import clip_source

# open_clip scales the shorter side to its input size before it crops; a picture of 1 x 60,000
# pixels would then take gigabytes. Such a sample is a dead letter.
_MAX_ASPECT = 500

# open_clip's tokenizer takes time in the square of a word's length, 20 seconds for 16,000 letters.
# CLIP's longest token has 32 bytes, so its 77 tokens never reach this far into a caption.
_MAX_CHARACTERS = 4096


class _Input(NamedTuple):
    """One sample as the model takes it: views (v, 3, h, w), the flipped one first, and tokens."""

    views: torch.Tensor
    tokens: torch.Tensor


@dataclasses.dataclass(frozen=True)
class LoadedClip:
    """An open_clip model with its own preprocessing and tokenizer (transformers' skips ftfy)."""

    model: Any
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenize: Callable[[str], torch.Tensor]
    device: torch.device
    score_unflipped: bool

    def prepare(self, sample: Sample) -> _Input:
        """The sample's views and tokens."""
        pixels = pixels_of(sample)
        height, width = pixels.shape[:2]
        if max(height, width) > _MAX_ASPECT * min(height, width):
            raise ValueError(f"{width} x {height} pixels: one side is more than {_MAX_ASPECT} times the other")
        views = [pixels[:, ::-1], pixels] if self.score_unflipped else [pixels[:, ::-1]]
        images = [self.preprocess(Image.fromarray(np.ascontiguousarray(view))) for view in views]
        return _Input(torch.stack(images), self.tokenize(shortened(sample.annotation.caption))[0])

    def probe(self) -> _Input:
        """What any sound model can score."""
        image = self.preprocess(Image.fromarray(grey()))
        views = torch.stack([image] * (2 if self.score_unflipped else 1))
        return _Input(views, self.tokenize("a picture")[0])

    def score(self, inputs: list[_Input]) -> np.ndarray:
        """L2-normalised float32 features (rows, 1 + v, d): the caption's, then each view's.

        Each view is a forward pass of its own, so that the flipped score is the same whether or not
        the unflipped image is scored too.
        """
        features = [self.model.encode_text(torch.stack([row.tokens for row in inputs]).to(self.device))]
        for view in range(len(inputs[0].views)):
            images = torch.stack([row.views[view] for row in inputs]).to(self.device)
            features.append(self.model.encode_image(images))
        return torch.stack([normalize(f.float(), dim=-1) for f in features], dim=1).cpu().numpy()


class ClipHandler(SampleBatchHandler[LoadedClip]):
    """Fills in `flipped_clip_cosine`, `embedding` and, by option, `unflipped_clip_cosine`.

        cosine = cos(text(caption), image(mirror(picture)))     (arXiv 2309.15954, "flipped-CLIP")

    The picture is mirrored left to right before any preprocessing, so that CLIP cannot read what is
    written in it and must judge what it shows.

    `embedding` is the L2-normalised image feature as fp16 bytes: of the unflipped image where that
    is scored, else of the flipped one, which costs nothing more. The unflipped is the better one,
    because task centroids are made of unflipped images and digits and letters do not survive a
    mirror: two pictures that differ by their digits may lie closer together once mirrored.
    """

    def __init__(self, settings: recipe.FlippedClip, device: str) -> None:
        super().__init__(device)
        self._settings = settings

    def load_on(self, device: torch.device) -> LoadedClip:
        source = clip_source(self._settings)
        model, preprocess = open_clip.create_model_from_pretrained(
            source.name,
            pretrained=source.pretrained,
            precision="fp32",
            device=device,
            force_quick_gelu=source.quick_gelu,
            weights_only=True,
        )
        tokenize = open_clip.get_tokenizer(source.name)
        return LoadedClip(model.eval(), preprocess, tokenize, device, self._settings.score_unflipped)

    def annotate(self, batch: SampleBatch, model: LoadedClip) -> SampleBatch:
        score = FixedBatches(self._settings.batch_size, model.prepare, model.score, model.probe)
        features, failures = score(dict(enumerate(batch)))
        columns = {row: _columns(*of_row) for row, of_row in features.items()}
        return with_results(batch, "flipped_clip", columns, failures)


def shortened(caption: str) -> str:
    """The caption, cut far behind its last token; spaces are collapsed as the tokenizer does."""
    return caption if len(caption) <= _MAX_CHARACTERS else " ".join(caption.split())[:_MAX_CHARACTERS]


def cosine(text: np.ndarray, image: np.ndarray) -> float:
    """Cosine of two L2-normalised float32 vectors, as an exact float32.

    It is summed in float64, row by row: a matrix product's last bits would depend on other rows.
    """
    return as_float32(np.sum(text.astype(np.float64) * image.astype(np.float64)))


def _columns(text: np.ndarray, flipped: np.ndarray, unflipped: np.ndarray | None = None) -> dict[str, Any]:
    return {
        "flipped_clip_cosine": cosine(text, flipped),
        "unflipped_clip_cosine": None if unflipped is None else cosine(text, unflipped),
        "embedding": (flipped if unflipped is None else unflipped).astype(np.float16).tobytes(),
    }
