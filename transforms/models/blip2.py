"""The digit question: the RunInference handler for BLIP-2."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from pipeline import recipe
from pipeline.records import Sample, SampleBatch
from transforms.cross_modality.cascade import wanted
from transforms.models.fixed_batches import FixedBatches
from transforms.models.handler import SampleBatchHandler, with_results
from transforms.models.pictures import grey, pixels_of, processed
from transforms.models.probability import as_float32, of_two
from transforms.models.weights import load_pretrained


@dataclasses.dataclass(frozen=True)
class LoadedBlip2:
    """A BLIP-2 model with its own preprocessing, the prompts and the two answers as tokens."""

    model: Any
    processor: Any
    device: torch.device
    prompts: tuple[torch.Tensor, ...]
    yes: int
    no: int

    def prepare(self, sample: Sample) -> torch.Tensor:
        """The picture; the prompts are the same for every sample."""
        return processed(self.processor, pixels_of(sample))

    def probe(self) -> torch.Tensor:
        """What any sound model can score."""
        return processed(self.processor, grey())

    def score(self, pixels: list[torch.Tensor]) -> np.ndarray:
        """Logits (rows, prompts, 2), float32: of "yes" and of "no" as the answer's first token.

        The picture goes through the vision tower once for all prompts.
        """
        image = self.model.get_image_features(torch.stack(pixels).to(self.device), return_dict=True)
        logits = [self._first_answer_logits(prompt.repeat(len(pixels), 1), image) for prompt in self.prompts]
        return torch.stack(logits, dim=1)[..., [self.yes, self.no]].float().cpu().numpy()

    def _first_answer_logits(self, prompts: torch.Tensor, image: Any) -> torch.Tensor:
        answer: dict[str, Any] = {"logits_to_keep": 1}
        if not self.model.config.use_decoder_only_language_model:  # as FLAN-T5
            start = self.model.config.text_config.decoder_start_token_id
            answer = {"decoder_input_ids": torch.full((len(prompts), 1), start, device=self.device)}
        output = self.model(
            pixel_values=None,
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            mm_encoder_outputs={"image": image},
            **answer,
        )
        return output.logits[:, -1]


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

    def __init__(
        self,
        settings: recipe.Digit,
        device: str,
        min_cosine: float | None,
        min_match_probability: float | None = None,
    ) -> None:
        super().__init__(device)
        self._settings = settings
        self._min_cosine = min_cosine
        self._min_match_probability = min_match_probability

    def load_on(self, device: torch.device) -> LoadedBlip2:
        model, processor = load_pretrained(Blip2ForConditionalGeneration, Blip2Processor, self._settings, device)
        if processor.num_query_tokens is None:  # saved before the processor knew of them
            processor.num_query_tokens = model.config.num_query_tokens
        return LoadedBlip2(
            model,
            processor,
            device,
            tuple(_prompt_tokens(model, processor, prompt).to(device) for prompt in self._settings.prompts),
            _answer_token(processor.tokenizer, " yes"),
            _answer_token(processor.tokenizer, " no"),
        )

    def annotate(self, batch: SampleBatch, model: LoadedBlip2) -> SampleBatch:
        asked = {
            row: sample
            for row, sample in enumerate(batch)
            if wanted(sample.annotation, self._min_cosine, self._min_match_probability)
        }
        score = FixedBatches(self._settings.batch_size, model.prepare, model.score, model.probe)
        logits, failures = score(asked)
        columns = {row: {"digit_probability": digit_probability(of)} for row, of in logits.items()}
        return with_results(batch, "digit", columns, failures)


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
