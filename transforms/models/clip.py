"""Flipped CLIP: the `RunInference` handler for open_clip models.

`open_clip` and `torchvision` are imported on first use, because importing them takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.func import functional_call
from torch.nn.functional import normalize

from transforms.core.plain_text import plain_text
from transforms.core.records import Annotation, Sample
from transforms.models.handler import InMemory, SampleBatchHandler
from transforms.models.pictures import byte_table, grey, normalised, on_device, pixels_of
from transforms.models.precision import dtype_on, usable_on
from transforms.models.probability import as_float32
from transforms.models.weights import LOCAL, ClipSource, clip_source

if TYPE_CHECKING:
    from transforms.cross_modality.flipped_clip import FlippedClipSettings
    from transforms.models.settings import ClipPromptsSettings

# open_clip scales the shorter side to the input size before it crops, so an image of 1 x 60,000 pixels would take
# gigabytes. A sample with a more extreme aspect ratio becomes a dead letter.
_MAX_ASPECT = 500

# The time of open_clip's tokenizer is quadratic in the length of a word: 20 seconds for 16,000 letters. CLIP's longest
# token has 32 bytes, so its 77 tokens never reach this far into a caption.
_MAX_CHARACTERS = 4096

# Limit on the words in the tokenizer's cache. Without it open_clip's tokenizer caches every word of the pool.
_MAX_CACHED_WORDS = 200_000

# Captions are cut to the shortest of these context lengths that fits them, else to the model's full context.
_BUCKETS = (16, 32, 48)
# One call of the text tower takes batch_size / _TEXT_CALLS rows. Small calls keep the padding of each bucket small.
_TEXT_CALLS = 8


class ClipInput(NamedTuple):
    """The model inputs for one sample.

    `views` is uint8 (v, 3, h, w): the flipped view, then the unflipped one if it is scored too. `tokens` is int64
    (context,).
    """

    views: np.ndarray
    tokens: np.ndarray


class ClipPreparation:
    """The image preprocessing and tokenizer of an open_clip model.

    open_clip's own tokenizer is used because the one of transformers skips ftfy. Raises ValueError if the
    preprocessing is not a resize and crop followed by a normalisation.
    """

    def __init__(
        self,
        preprocess: Callable[[Image.Image], torch.Tensor],
        tokenize: Callable[[str], torch.Tensor],
        score_unflipped: bool,
    ) -> None:
        from open_clip.tokenizer import SimpleTokenizer
        from torchvision.transforms import Compose, Normalize, ToTensor

        *shape, to_tensor, to_normal = preprocess.transforms  # type: ignore[attr-defined]
        if not isinstance(to_tensor, ToTensor) or not isinstance(to_normal, Normalize):
            raise ValueError("this model's preprocessing does not end with ToTensor and Normalize")
        self._shape, self._normalise = Compose(shape), Compose([to_tensor, to_normal])
        self._tokenize, self._score_unflipped = tokenize, score_unflipped
        if isinstance(tokenize, SimpleTokenizer):
            tokenize.cache = _BoundedCache(tokenize.cache)
        self.table = self.table_for(preprocess)
        # The first call sets the padding of a transformers tokenizer. Making that call here keeps one thread from
        # changing the setting while another thread tokenizes.
        self.tokens("a picture")

    @classmethod
    def load(cls, settings: FlippedClipSettings) -> ClipPreparation:
        """Load the preprocessing and tokenizer of the configured model, without its weights."""
        from open_clip import get_tokenizer
        from open_clip.transform import image_transform_v2

        source = clip_source(settings)
        preprocess = image_transform_v2(_preprocess_cfg(source), is_train=False)
        return cls(preprocess, get_tokenizer(source.name), settings.score_unflipped)

    def prepare(self, sample: Sample) -> ClipInput:
        """The model inputs for a decoded sample. Raises ValueError if one side is over 500 times the other."""
        pixels = pixels_of(sample)
        height, width = pixels.shape[:2]
        if max(height, width) > _MAX_ASPECT * min(height, width):
            raise ValueError(f"{width} x {height} pixels: one side is more than {_MAX_ASPECT} times the other")
        upright = Image.fromarray(pixels)
        flipped = upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # four times as fast as a numpy copy
        views = [flipped, upright] if self._score_unflipped else [flipped]
        tokens = self.tokens(plain_text(sample.annotation.caption))
        return ClipInput(np.stack([self._bytes(view) for view in views]), tokens)

    def probe(self) -> ClipInput:
        """A known-good input."""
        view = self._bytes(Image.fromarray(grey()))
        return ClipInput(np.stack([view] * (2 if self._score_unflipped else 1)), self.tokens("a picture"))

    def tokens(self, caption: str) -> np.ndarray:
        """The tokens of a caption, padded to the model's context length: int64 (context,)."""
        return self._tokenize(shortened(caption))[0].numpy()

    def table_for(self, preprocess: Callable[[Image.Image], torch.Tensor]) -> np.ndarray:
        """The byte table (see `pictures.byte_table`). Raises ValueError if `preprocess` gives other values."""
        return byte_table(
            lambda pixels: self._normalise(Image.fromarray(pixels)).numpy(),
            lambda pixels: self._bytes(Image.fromarray(pixels)),
            lambda pixels: preprocess(Image.fromarray(pixels)).numpy(),
        )

    def _bytes(self, picture: Image.Image) -> np.ndarray:
        return np.asarray(self._shape(picture)).transpose(2, 0, 1)


@dataclasses.dataclass(frozen=True)
class LoadedClip(InMemory):
    """An open_clip model in memory, with its preparation.

    `table` is the (3, 256) byte table of the preprocessing (see `pictures.byte_table`), on the model's device and in
    its dtype. `prompts` are CLIP's digit prompts, the positive ones first; empty if they are off.
    """

    model: Any
    preparation: ClipPreparation
    table: torch.Tensor
    prompts: tuple[str, ...] = ()

    def prepare(self, sample: Sample) -> ClipInput:
        """See `ClipPreparation.prepare`."""
        return self.preparation.prepare(sample)

    def probe(self, shape: Hashable = None) -> ClipInput:
        """A known-good input."""
        return self.preparation.probe()

    def score(self, inputs: list[ClipInput]) -> np.ndarray:
        """L2-normalised features, float32 (rows, 1 + v, d): of the caption, then of each view.

        Each view has its own forward pass, so the flipped score is the same whether or not the unflipped view is
        scored too.
        """
        with self.lock, torch.inference_mode():
            features = [self.text(np.stack([row.tokens for row in inputs]))]
            for view in range(len(inputs[0].views)):
                features.append(self.model.encode_image(normalised([row.views[view] for row in inputs], self.table)))
            return torch.stack([normalize(f.float(), dim=-1) for f in features], dim=1).cpu().numpy()

    def constants(self) -> np.ndarray | None:
        """float32 (k, d), one row for each prompt; its product with an image feature gives CLIP's logits.

        None if there are no prompts.
        """
        return self._prompt_logits

    @functools.cached_property
    def _prompt_logits(self) -> np.ndarray | None:
        if not self.prompts:
            return None
        # Each prompt is a batch of its own, so its vector does not depend on the other prompts.
        with self.lock, torch.inference_mode():
            features = [self.text(self.preparation.tokens(prompt)[None]).float() for prompt in self.prompts]
            return (normalize(torch.cat(features), dim=-1) * self.model.logit_scale.exp().float()).cpu().numpy()

    def text(self, tokens: np.ndarray) -> torch.Tensor:
        """Text features (rows, d), not normalised, of tokens int64 (rows, context).

        A causal text tower that pools at the end-of-text token ignores everything after it. For such a model, captions
        are cut to a bucket that depends on their length only, and each bucket is scored in batches of one fixed shape.
        """
        rows, context = tokens.shape
        if not _pools_at_end_of_text(self.model):
            return self.model.encode_text(on_device(tokens, self.table.device))
        lengths = np.array([*(bucket for bucket in _BUCKETS if bucket < context), context])
        buckets = lengths[np.searchsorted(lengths, tokens.argmax(1) + 1)]
        size = max(1, rows // _TEXT_CALLS)
        order: list[int] = []
        features: list[torch.Tensor] = []
        for length in np.unique(buckets):
            members = np.flatnonzero(buckets == length)
            for start in range(0, len(members), size):
                part = members[start : start + size]
                padded = np.resize(part, size)
                order += part.tolist()
                features.append(self._cut_text(tokens[padded, :length])[: len(part)])
        return torch.cat(features)[on_device(np.argsort(order), self.table.device)]

    def _cut_text(self, tokens: np.ndarray) -> torch.Tensor:
        """The model's own `encode_text`, with its context cut to the length of `tokens`."""
        length = tokens.shape[1]
        cut = {
            "clip.positional_embedding": self.model.positional_embedding[:length],
            "clip.attn_mask": self.model.attn_mask[:length, :length],
        }
        tower = _TextTower(self.model)
        return functional_call(tower, cut, (on_device(tokens, self.table.device),), tie_weights=False)


class _TextTower(torch.nn.Module):
    """A CLIP model whose forward pass is `encode_text`."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_text(tokens)


def _pools_at_end_of_text(model: torch.nn.Module) -> bool:
    """Whether text features come from the end-of-text token through a causal mask, so that padding has no influence.

    Not the case for SigLIP, whose text tower attends to the padding.
    """
    from open_clip import CLIP

    return isinstance(model, CLIP) and model.attn_mask is not None and model.text_pool_type == "argmax"


class ClipHandler(SampleBatchHandler[LoadedClip]):
    """Fills in `flipped_clip_cosine`, `embedding` and, by option, `unflipped_clip_cosine` and
    `digit_prompt_probability`.

        cosine = cos(text(caption), image(mirror(image)))     (arXiv 2309.15954, "flipped-CLIP")

    The image is mirrored left to right before any preprocessing. CLIP then cannot match the caption against text in
    the image and has to judge the visual content.

    `embedding` is the L2-normalised image feature as fp16 bytes: of the unflipped view if it is scored, else of the
    flipped view, at no extra cost. Task centroids must be of the same kind (`embedding_identity`). The unflipped view
    is the better choice because mirroring distorts digits and letters: two images that differ in their digits may be
    closer to each other once mirrored.

    With `prompts`, the same image feature also gives a cheap estimate of whether the image shows digits:

        digit_prompt_probability = sum over the positive prompts of softmax(scale * cos(prompt, image))    (our choice)
    """

    rule: ClassVar[str] = "flipped_clip"

    def __init__(
        self,
        settings: FlippedClipSettings,
        device: str,
        precision: str = "fp32",
        prompts: ClipPromptsSettings | None = None,
    ) -> None:
        super().__init__(settings.batch_size, device)
        self._settings, self._precision, self._prompts = settings, precision, prompts

    def load_on(self, device: torch.device) -> LoadedClip:
        from open_clip import create_model_from_pretrained

        source = clip_source(self._settings)
        dtype = dtype_on(self._precision, device)
        model, preprocess = create_model_from_pretrained(
            source.name,
            pretrained=source.pretrained,
            precision=usable_on(self._precision, device),
            device=device,
            force_quick_gelu=source.quick_gelu,
            weights_only=True,
        )
        preparation = ClipPreparation.load(self._settings)
        table = preparation.table_for(preprocess)
        prompts = (*self._prompts.positive, *self._prompts.negative) if self._prompts else ()
        return LoadedClip(model.eval(), preparation, torch.from_numpy(table).to(device, dtype), prompts)

    def wants(self, annotation: Annotation) -> bool:
        if self._prompts is not None and annotation.digit_prompt_probability is None:
            return True
        return annotation.embedding is None

    def columns(self, scores: np.ndarray, constants: np.ndarray | None) -> dict[str, Any]:
        text, flipped, *rest = scores
        image = rest[0] if rest else flipped
        return {
            "flipped_clip_cosine": cosine(text, flipped),
            "unflipped_clip_cosine": cosine(text, rest[0]) if rest else None,
            "digit_prompt_probability": (
                share_of_first(constants, image, len(self._prompts.positive))
                if self._prompts is not None and constants is not None
                else None
            ),
            "embedding": image.astype(np.float16).tobytes(),
        }


def preprocessing(settings: FlippedClipSettings) -> dict[str, Any]:
    """The preprocessing settings of the configured model, as recorded in the manifest."""
    return dataclasses.asdict(_preprocess_cfg(clip_source(settings)))


def embedding_identity(
    settings: FlippedClipSettings, precision: str, weights_sha256: Mapping[str, str]
) -> dict[str, Any]:
    """The identity of the embeddings that `ClipHandler` computes, in JSON types (see `models.embedding_identity`).

    `settings` must name a fixed revision (see `weights.pinned`), and `precision` must not be "auto". `weights_sha256`
    maps the name of each weight file on this machine to its hash.
    """
    source = clip_source(settings)
    model_cfg, _ = _configs(source)
    quick_gelu = source.quick_gelu or bool(model_cfg.get("quick_gelu"))
    identity = {
        "model": settings.model,
        "weights": settings.weights,
        "revision": settings.revision,
        "weights_sha256": sorted(weights_sha256.values()),
        "image_tower": {"embed_dim": model_cfg["embed_dim"], "quick_gelu": quick_gelu, **model_cfg["vision_cfg"]},
        "preprocessing": preprocessing(settings),
        "image": "unflipped" if settings.score_unflipped else "flipped",
        "precision": precision,
    }
    return json.loads(json.dumps(identity))


class _BoundedCache(dict[str, str]):
    """A cache that ignores new words once it is full. It evicts none: another thread may be reading it."""

    def __setitem__(self, word: str, tokens: str) -> None:
        if len(self) < _MAX_CACHED_WORDS:
            super().__setitem__(word, tokens)


def _preprocess_cfg(source: ClipSource) -> Any:
    """The `PreprocessCfg` that open_clip derives for the model, computed without creating the model."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    model_cfg, overlay = _configs(source)
    side = model_cfg["vision_cfg"].get("image_size", 224)
    size = tuple(side) if isinstance(side, list | tuple) else (side, side)
    return PreprocessCfg(**(merge_preprocess_dict(PreprocessCfg(), overlay) | {"size": size}))


def _configs(source: ClipSource) -> tuple[dict[str, Any], dict[str, Any]]:
    """The architecture configuration and the preprocessing configuration of the model."""
    import open_clip

    if source.name.startswith(LOCAL):
        config = json.loads((Path(source.name.removeprefix(LOCAL)) / "open_clip_config.json").read_text())
        return config["model_cfg"], config.get("preprocess_cfg", {})
    name = source.name.replace("/", "-")
    return open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, source.pretrained) or {}


def shortened(caption: str) -> str:
    """The caption, cut to 4096 characters if it is longer; that never changes its tokens.

    Whitespace is collapsed before the cut, as the tokenizer does.
    """
    return caption if len(caption) <= _MAX_CHARACTERS else " ".join(caption.split())[:_MAX_CHARACTERS]


def cosine(text: np.ndarray, image: np.ndarray) -> float:
    """Cosine of two L2-normalised float32 (d,) vectors, rounded to float32.

    Summed in float64 for one row alone: the last bits of a matrix product would depend on the other rows.
    """
    return as_float32(np.sum(text.astype(np.float64) * image.astype(np.float64)))


def share_of_first(prompt_logits: np.ndarray, image: np.ndarray, count: int) -> float:
    """The summed softmax probability of the first `count` prompts, computed in float64 without overflow.

    `prompt_logits` is `LoadedClip.constants()`, float32 (k, d); `image` is an L2-normalised feature (d,).
    """
    logits = np.sum(prompt_logits.astype(np.float64) * image.astype(np.float64), axis=1)
    weights = np.exp(logits - logits.max())
    return as_float32(weights[:count].sum() / weights.sum())
