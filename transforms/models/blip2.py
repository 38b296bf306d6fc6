"""The digit question: the RunInference handler for BLIP-2."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from transforms.core.records import Annotation, Sample
from transforms.models.cascade import prompt_floor, wanted
from transforms.models.handler import InMemory, SampleBatchHandler
from transforms.models.pictures import Processed, grey, normalised, pixels_of, settings_of
from transforms.models.precision import dtype_on
from transforms.models.probability import as_float32, of_two
from transforms.models.weights import load_pretrained, load_processor

if TYPE_CHECKING:
    from transforms.cross_modality.digit import DigitSettings


class Blip2Preparation:
    """A BLIP-2 model's own preprocessing; the prompts are the same for every sample."""

    def __init__(self, processor: Any) -> None:
        self.pictures = Processed(processor)

    @classmethod
    def load(cls, settings: DigitSettings) -> Blip2Preparation:
        """The preprocessing that belongs to the model; its weights are not looked at."""
        return cls(load_processor(Blip2Processor, settings))

    def prepare(self, sample: Sample) -> np.ndarray:
        """The picture as bytes (3, h, w)."""
        return self.pictures(pixels_of(sample))


@dataclasses.dataclass(frozen=True)
class LoadedBlip2(InMemory):
    """A BLIP-2 model with its own preparation, the prompts and the two answers as tokens."""

    model: Any
    preparation: Blip2Preparation
    table: torch.Tensor
    prompts: tuple[torch.Tensor, ...]
    yes: int
    no: int
    one_at_a_time: Any = dataclasses.field(default_factory=threading.Lock)  # so that a batch finds the memory it needs

    def prepare(self, sample: Sample) -> np.ndarray:
        """As `Blip2Preparation.prepare`."""
        return self.preparation.prepare(sample)

    def probe(self, shape: Hashable = None) -> np.ndarray:
        """What any sound model can score."""
        return self.preparation.pictures(grey())

    def constants(self) -> None:
        """None needed."""

    def score(self, pixels: list[np.ndarray]) -> np.ndarray:
        """Logits (rows, prompts, 2), float32: of "yes" and of "no" as the answer's first token.

        The picture goes through the vision tower once for all prompts.
        """
        with self.one_at_a_time, torch.inference_mode():
            image = self.model.get_image_features(normalised(pixels, self.table), return_dict=True)
            logits = [self._first_answer_logits(prompt.repeat(len(pixels), 1), image) for prompt in self.prompts]
            return torch.stack(logits, dim=1)[..., [self.yes, self.no]].float().cpu().numpy()

    def _first_answer_logits(self, prompts: torch.Tensor, image: Any) -> torch.Tensor:
        answer: dict[str, Any] = {"logits_to_keep": 1}
        if not self.model.config.use_decoder_only_language_model:  # as FLAN-T5
            start = self.model.config.text_config.decoder_start_token_id
            answer = {"decoder_input_ids": torch.full((len(prompts), 1), start, device=prompts.device)}
        output = self.model(
            pixel_values=None,
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            mm_encoder_outputs={"image": image},
            **answer,
        )
        return output.logits[:, -1]


def preprocessing(settings: DigitSettings) -> dict[str, Any]:
    """What the model's own preprocessing does to a picture, for the manifest."""
    return settings_of(load_processor(Blip2Processor, settings).image_processor)


class Blip2Handler(SampleBatchHandler[LoadedBlip2]):
    """Fills in `digit_probability` of the samples that pass the cascade.

        digit_probability = mean over prompts of p(yes) / (p(yes) + p(no))

    That BLIP-2 is asked is arXiv 2309.15954's; this score is our choice. p is the distribution of
    the first token of the answer, read from one forward pass instead of from `generate`. The
    answers are the tokens of " yes" and " no", with the space: a prompt ends in "Answer:", and
    OPT's tokenizer keeps the space before a word in the word's own token, so these are the tokens
    with which a generated "yes" or "no" begins. "Yes" and "No" are not added in: to prompts of this
    form BLIP-2 answers in lower case (the library's own example: "two"). A prompt has the same
    tokens for every sample, so nothing is padded.
    """

    rule: ClassVar[str] = "digit"

    def __init__(
        self,
        settings: DigitSettings,
        device: str,
        min_cosine: float | None,
        min_match_probability: float | None = None,
        precision: str = "fp32",
    ) -> None:
        super().__init__(settings.batch_size, device)
        self._settings, self._precision = settings, precision
        self._floors = (min_cosine, min_match_probability, prompt_floor(settings))

    def load_on(self, device: torch.device) -> LoadedBlip2:
        dtype = dtype_on(self._precision, device)
        model = load_pretrained(Blip2ForConditionalGeneration, self._settings, device, dtype)
        processor = load_processor(Blip2Processor, self._settings)
        if processor.num_query_tokens is None:  # saved before the processor knew of them
            processor.num_query_tokens = model.config.num_query_tokens
        preparation = Blip2Preparation(processor)
        return LoadedBlip2(
            model,
            preparation,
            torch.from_numpy(preparation.pictures.table).to(device, dtype),
            tuple(_prompt_tokens(model, processor, prompt).to(device) for prompt in self._settings.prompts),
            _answer_token(processor.tokenizer, " yes"),
            _answer_token(processor.tokenizer, " no"),
        )

    def wants(self, annotation: Annotation) -> bool:
        return annotation.digit_probability is None and wanted(annotation, *self._floors)

    def columns(self, scores: np.ndarray, constants: Any) -> dict[str, Any]:
        return {"digit_probability": digit_probability(scores)}


def digit_probability(logits: np.ndarray) -> float:
    """The mean over prompts of p(yes) / (p(yes) + p(no)), from logits (prompts, 2)."""
    return as_float32(np.mean(of_two(logits[:, 0], logits[:, 1])))


def _prompt_tokens(model: Any, processor: Any, prompt: str) -> torch.Tensor:
    """The tokens of `prompt`, led by the placeholders that the image features take the place of."""
    blank = np.zeros((8, 8, 3), np.uint8)
    tokens = processor(images=blank, text=prompt, return_tensors="pt")["input_ids"][0]
    placeholders = int((tokens == model.config.image_token_id).sum())
    if placeholders != model.config.num_query_tokens:
        raise ValueError(
            f"the tokenizer gives {placeholders} image placeholders and the model takes "
            f"{model.config.num_query_tokens}: tokenizer and model are not of one revision"
        )
    return tokens


def _answer_token(tokenizer: Any, word: str) -> int:
    tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise ValueError(f"the tokenizer splits {word!r} into {len(tokens)} tokens; the digit question needs one")
    return int(tokens[0])
