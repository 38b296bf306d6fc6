"""The digit question: the `RunInference` handler for BLIP-2."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

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
    """The image preprocessing of a BLIP-2 model. The prompts are the same for every sample, so no text is prepared."""

    def __init__(self, processor: Any) -> None:
        self.pictures = Processed(processor)

    @classmethod
    def load(cls, settings: DigitSettings) -> Blip2Preparation:
        """Load the processor of the configured model, without its weights."""
        return cls(_load_processor(settings))

    def prepare(self, sample: Sample) -> np.ndarray:
        """The preprocessed image of a decoded sample, uint8 (3, h, w)."""
        return self.pictures(pixels_of(sample))


@dataclasses.dataclass(frozen=True)
class LoadedBlip2(InMemory):
    """A BLIP-2 model in memory, with its preparation.

    `table` is the (3, 256) byte table of the preprocessing (see `pictures.byte_table`), on the model's device and in
    its dtype. `prompts` are int64 (t,) token tensors; `yes` and `no` are the token ids of the two answers.
    """

    model: Any
    preparation: Blip2Preparation
    table: torch.Tensor
    prompts: tuple[torch.Tensor, ...]
    yes: int
    no: int

    def prepare(self, sample: Sample) -> np.ndarray:
        """See `Blip2Preparation.prepare`."""
        return self.preparation.prepare(sample)

    def probe(self, shape: Hashable = None) -> np.ndarray:
        """A known-good input."""
        return self.preparation.pictures(grey())

    def constants(self) -> None:
        """No constants."""

    def score(self, pixels: list[np.ndarray]) -> np.ndarray:
        """Logits of "yes" and "no" as the first token of the answer, float32 (rows, prompts, 2).

        Each image passes the vision tower once; all prompts reuse its features.
        """
        with self.lock, torch.inference_mode():
            image = self.model.get_image_features(normalised(pixels, self.table), return_dict=True)
            logits = [self._first_answer_logits(prompt.repeat(len(pixels), 1), image) for prompt in self.prompts]
            return torch.stack(logits, dim=1)[..., [self.yes, self.no]].float().cpu().numpy()

    def _first_answer_logits(self, prompts: torch.Tensor, image: Any) -> torch.Tensor:
        answer: dict[str, Any] = {"logits_to_keep": 1}
        if not self.model.config.use_decoder_only_language_model:  # an encoder-decoder such as FLAN-T5
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
    """The preprocessing settings of the configured model, as recorded in the manifest."""
    return settings_of(_load_processor(settings).image_processor)


class Blip2Handler(SampleBatchHandler[LoadedBlip2]):
    """Fills in `digit_probability` for the samples that the cascade selects.

        digit_probability = mean over prompts of p(yes) / (p(yes) + p(no))

    Prompting BLIP-2 comes from arXiv 2309.15954; this score is our choice. p is the distribution of the first token of
    the answer, taken from one forward pass instead of from `generate`. The answer tokens are " yes" and " no", with the
    space: a prompt ends in "Answer:", and OPT's tokenizer makes the space before a word part of the word's token, so
    these are the tokens that a generated "yes" or "no" starts with. "Yes" and "No" do not count: BLIP-2 answers prompts
    of this form in lower case (the library's own example is "two"). A prompt has the same tokens for every sample, so
    nothing is padded.
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
        from transformers import Blip2ForConditionalGeneration  # importing it takes seconds

        dtype = dtype_on(self._precision, device)
        model = load_pretrained(Blip2ForConditionalGeneration, self._settings, device, dtype)
        processor = _load_processor(self._settings)
        if processor.num_query_tokens is None:  # saved by a version without this attribute
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
    """The mean over prompts of p(yes) / (p(yes) + p(no)), from logits (prompts, 2) in the order yes, no."""
    return as_float32(np.mean(of_two(logits[:, 0], logits[:, 1])))


def _prompt_tokens(model: Any, processor: Any, prompt: str) -> torch.Tensor:
    """Token ids int64 (t,) of `prompt`, preceded by the placeholders that the image features replace.

    Raises ValueError if the number of placeholders is not the model's number of query tokens.
    """
    blank = np.zeros((8, 8, 3), np.uint8)
    tokens = processor(images=blank, text=prompt, return_tensors="pt")["input_ids"][0]
    placeholders = int((tokens == model.config.image_token_id).sum())
    if placeholders != model.config.num_query_tokens:
        raise ValueError(
            f"the tokenizer produces {placeholders} image placeholders, but the model expects "
            f"{model.config.num_query_tokens}: tokenizer and model come from different revisions"
        )
    return tokens


def _answer_token(tokenizer: Any, word: str) -> int:
    tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise ValueError(f"the tokenizer splits {word!r} into {len(tokens)} tokens; the digit question needs one")
    return int(tokens[0])


def _load_processor(settings: DigitSettings) -> Any:
    from transformers import Blip2Processor  # importing it takes seconds

    return load_processor(Blip2Processor, settings)
