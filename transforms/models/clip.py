"""Flipped CLIP: the RunInference handler for open_clip models."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch.func import functional_call
from torch.nn.functional import normalize
from torchvision.transforms import Compose, Normalize, ToTensor

from transforms.core.records import Annotation, Sample
from transforms.models.handler import InMemory, SampleBatchHandler
from transforms.models.pictures import byte_table, grey, normalised, on_device, pixels_of
from transforms.models.precision import DTYPES, dtype_on
from transforms.models.probability import as_float32
from transforms.models.weights import LOCAL, ClipSource, clip_source

if TYPE_CHECKING:
    from transforms.cross_modality.flipped_clip import FlippedClipSettings
    from transforms.models.settings import ClipPromptsSettings

# open_clip scales the shorter side to its input size before it crops; a picture of 1 x 60,000
# pixels would then take gigabytes. Such a sample is a dead letter.
_MAX_ASPECT = 500

# open_clip's tokenizer takes time in the square of a word's length, 20 seconds for 16,000 letters.
# CLIP's longest token has 32 bytes, so its 77 tokens never reach this far into a caption.
_MAX_CHARACTERS = 4096


# Words whose tokens open_clip's tokenizer keeps; left to itself it keeps every word of the pool for good.
_MAX_CACHED_WORDS = 200_000


# Context lengths that captions are cut to, by their own number of tokens, before the model's whole context.
_BUCKETS = (16, 32, 48)
# A call of the text tower takes a batch's rows by this: few rows a call, so that little of a bucket's last is padding.
_TEXT_CALLS = 8


class ClipInput(NamedTuple):
    """One sample as the model takes it: bytes (v, 3, h, w), the flipped view first, and tokens."""

    views: np.ndarray
    tokens: np.ndarray


class ClipPreparation:
    """An open_clip model's own preprocessing and tokenizer (transformers' skips ftfy)."""

    def __init__(
        self,
        preprocess: Callable[[Image.Image], torch.Tensor],
        tokenize: Callable[[str], torch.Tensor],
        score_unflipped: bool,
    ) -> None:
        *shape, to_tensor, to_normal = preprocess.transforms  # type: ignore[attr-defined]
        if not isinstance(to_tensor, ToTensor) or not isinstance(to_normal, Normalize):
            raise ValueError("this model's preprocessing does not end in normalising")
        self._shape, self._normalise = Compose(shape), Compose([to_tensor, to_normal])
        self._tokenize, self._score_unflipped = tokenize, score_unflipped
        if isinstance(tokenize, SimpleTokenizer):
            tokenize.cache = _BoundedCache(tokenize.cache)
        self.table = self.table_for(preprocess)
        # A transformers tokenizer takes its padding from the first call. Made here, no thread makes that change while
        # another one is reading.
        self.tokens("a picture")

    @classmethod
    def load(cls, settings: FlippedClipSettings) -> ClipPreparation:
        """The preprocessing and the tokenizer that belong to the model; its weights are not looked at."""
        source = clip_source(settings)
        preprocess = image_transform_v2(_preprocess_cfg(source), is_train=False)
        return cls(preprocess, open_clip.get_tokenizer(source.name), settings.score_unflipped)

    def prepare(self, sample: Sample) -> ClipInput:
        """The sample's views and tokens."""
        pixels = pixels_of(sample)
        height, width = pixels.shape[:2]
        if max(height, width) > _MAX_ASPECT * min(height, width):
            raise ValueError(f"{width} x {height} pixels: one side is more than {_MAX_ASPECT} times the other")
        upright = Image.fromarray(pixels)
        flipped = upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # a quarter of the time that numpy's copy takes
        views = [flipped, upright] if self._score_unflipped else [flipped]
        return ClipInput(np.stack([self._bytes(view) for view in views]), self.tokens(sample.annotation.caption))

    def probe(self) -> ClipInput:
        """What any sound model can score."""
        view = self._bytes(Image.fromarray(grey()))
        return ClipInput(np.stack([view] * (2 if self._score_unflipped else 1)), self.tokens("a picture"))

    def tokens(self, caption: str) -> np.ndarray:
        """The caption's tokens, padded to the model's context."""
        return self._tokenize(shortened(caption))[0].numpy()

    def table_for(self, preprocess: Callable[[Image.Image], torch.Tensor]) -> np.ndarray:
        """See `pictures.byte_table`. Raises ValueError where `preprocess` is another one than this."""
        return byte_table(
            lambda pixels: self._normalise(Image.fromarray(pixels)).numpy(),
            lambda pixels: self._bytes(Image.fromarray(pixels)),
            lambda pixels: preprocess(Image.fromarray(pixels)).numpy(),
        )

    def _bytes(self, picture: Image.Image) -> np.ndarray:
        return np.asarray(self._shape(picture)).transpose(2, 0, 1)


@dataclasses.dataclass(frozen=True)
class LoadedClip(InMemory):
    """An open_clip model with its own preparation."""

    model: Any
    preparation: ClipPreparation
    table: torch.Tensor
    prompts: tuple[str, ...] = ()
    one_at_a_time: Any = dataclasses.field(default_factory=threading.Lock)  # so that a batch finds the memory it needs

    def prepare(self, sample: Sample) -> ClipInput:
        """As `ClipPreparation.prepare`."""
        return self.preparation.prepare(sample)

    def probe(self, shape: Hashable = None) -> ClipInput:
        """What any sound model can score."""
        return self.preparation.probe()

    def score(self, inputs: list[ClipInput]) -> np.ndarray:
        """L2-normalised float32 features (rows, 1 + v, d): the caption's, then each view's.

        Each view is a forward pass of its own, so that the flipped score is the same whether or not
        the unflipped image is scored too.
        """
        with self.one_at_a_time, torch.inference_mode():
            features = [self.text(np.stack([row.tokens for row in inputs]))]
            for view in range(len(inputs[0].views)):
                features.append(self.model.encode_image(normalised([row.views[view] for row in inputs], self.table)))
            return torch.stack([normalize(f.float(), dim=-1) for f in features], dim=1).cpu().numpy()

    def constants(self) -> np.ndarray | None:
        """float32 (k, d): whose product with an image feature is CLIP's logit for each of the prompts."""
        return self._prompt_logits

    @functools.cached_property
    def _prompt_logits(self) -> np.ndarray | None:
        if not self.prompts:
            return None
        # A prompt has a batch to itself, so its vector does not depend on the others.
        with self.one_at_a_time, torch.inference_mode():
            features = [self.text(self.preparation.tokens(prompt)[None]).float() for prompt in self.prompts]
            return (normalize(torch.cat(features), dim=-1) * self.model.logit_scale.exp().float()).cpu().numpy()

    def text(self, tokens: np.ndarray) -> torch.Tensor:
        """Features (rows, d), not normalised, of tokens (rows, context).

        A causal text tower that is read at the caption's end never looks behind it, so there a caption is cut to a
        bucket chosen by its own length. Each bucket has batches of one fixed shape, as images have.
        """
        rows, context = tokens.shape
        if not _reads_to_the_end_only(self.model):
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
        """The model's own `encode_text`, its context cut to the tokens'."""
        length = tokens.shape[1]
        cut = {
            "clip.positional_embedding": self.model.positional_embedding[:length],
            "clip.attn_mask": self.model.attn_mask[:length, :length],
        }
        return functional_call(_TextOf(self.model), cut, (on_device(tokens, self.table.device),), tie_weights=False)


class _TextOf(torch.nn.Module):
    """A CLIP whose forward pass is its text's."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_text(tokens)


def _reads_to_the_end_only(model: torch.nn.Module) -> bool:
    """Whether a caption's features come from its last token, which no later one has an influence on. SigLIP's do not:
    its text tower looks at the padding too."""
    return isinstance(model, open_clip.CLIP) and model.attn_mask is not None and model.text_pool_type == "argmax"


class ClipHandler(SampleBatchHandler[LoadedClip]):
    """Fills in `flipped_clip_cosine`, `embedding` and, by option, `unflipped_clip_cosine` and
    `digit_prompt_probability`.

        cosine = cos(text(caption), image(mirror(picture)))     (arXiv 2309.15954, "flipped-CLIP")

    The picture is mirrored left to right before any preprocessing, so that CLIP cannot read what is
    written in it and must judge what it shows.

    `embedding` is the L2-normalised image feature as fp16 bytes: of the unflipped image where that
    is scored, else of the flipped one, which costs nothing more. Task centroids are made of the same
    kind (`embedding_identity`). The unflipped is the better one, because digits and letters do not
    survive a mirror: two pictures that differ by their digits may lie closer together once mirrored.

    With `prompts`, the same image feature also tells how likely the digit question is worth asking:

        digit_prompt_probability = sum over the positive prompts of softmax(scale * cos(prompt, picture))    (ours)
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
        source = clip_source(self._settings)
        dtype = dtype_on(self._precision, device)
        model, preprocess = open_clip.create_model_from_pretrained(
            source.name,
            pretrained=source.pretrained,
            precision=next(name for name, known in DTYPES.items() if known is dtype),
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
    """What the model's own preprocessing does to a picture, for the manifest."""
    return dataclasses.asdict(_preprocess_cfg(clip_source(settings)))


def embedding_identity(
    settings: FlippedClipSettings, precision: str, weights_sha256: Mapping[str, str]
) -> dict[str, Any]:
    """What decides the embeddings that `ClipHandler` makes, as JSON has it (see `models.embedding_identity`).

    The settings' hub revision and the precision are settled; `weights_sha256` are the hashes of the weight files on
    this machine, by name.
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
    """Takes no further word once it is full. It never lets one go: another thread may be about to read it."""

    def __setitem__(self, word: str, tokens: str) -> None:
        if len(self) < _MAX_CACHED_WORDS:
            super().__setitem__(word, tokens)


def _preprocess_cfg(source: ClipSource) -> PreprocessCfg:
    """What open_clip would put together for the model, without making the model."""
    model_cfg, overlay = _configs(source)
    side = model_cfg["vision_cfg"].get("image_size", 224)
    size = tuple(side) if isinstance(side, list | tuple) else (side, side)
    return PreprocessCfg(**(merge_preprocess_dict(PreprocessCfg(), overlay) | {"size": size}))


def _configs(source: ClipSource) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model is made of, and what it says of its preprocessing."""
    if source.name.startswith(LOCAL):
        config = json.loads((Path(source.name.removeprefix(LOCAL)) / "open_clip_config.json").read_text())
        return config["model_cfg"], config.get("preprocess_cfg", {})
    name = source.name.replace("/", "-")
    return open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, source.pretrained) or {}


def shortened(caption: str) -> str:
    """The caption, cut far behind its last token; spaces are collapsed as the tokenizer does."""
    return caption if len(caption) <= _MAX_CHARACTERS else " ".join(caption.split())[:_MAX_CHARACTERS]


def cosine(text: np.ndarray, image: np.ndarray) -> float:
    """Cosine of two L2-normalised float32 vectors, as an exact float32.

    It is summed in float64, row by row: a matrix product's last bits would depend on other rows.
    """
    return as_float32(np.sum(text.astype(np.float64) * image.astype(np.float64)))


def share_of_first(prompt_logits: np.ndarray, image: np.ndarray, count: int) -> float:
    """The share that the first `count` prompts have in the softmax over all, in float64 and without overflow."""
    logits = np.sum(prompt_logits.astype(np.float64) * image.astype(np.float64), axis=1)
    weights = np.exp(logits - logits.max())
    return as_float32(weights[:count].sum() / weights.sum())
