"""What the three model handlers share: whole batches in, whole batches out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from apache_beam.ml.inference.base import ModelHandler

from pipeline.recipe import CROSS_MODALITY
from pipeline.records import DeadLetter, Sample, SampleBatch, dead_letter
from transforms.models.fixed_batches import Failure

LoadedModel = TypeVar("LoadedModel")


class SampleBatchHandler(ModelHandler[SampleBatch, SampleBatch, LoadedModel], Generic[LoadedModel]):
    """A RunInference handler whose element is a ready-made SampleBatch.

    RunInference's own batching forms other batches on other runners and across shards, so it is skipped: the element
    goes to `run_inference` as it is. A subclass loads its model in `load_on` and fills in columns in `annotate`.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def load_on(self, device: torch.device) -> LoadedModel:
        """The model, ready to score on `device`; it must take a weak reference (a tuple does not)."""
        raise NotImplementedError(type(self))

    def annotate(self, batch: SampleBatch, model: LoadedModel) -> SampleBatch:
        """The batch with this model's columns filled in, and with failed samples moved to its dead letters."""
        raise NotImplementedError(type(self))

    def should_skip_batching(self) -> bool:
        return True

    def load_model(self) -> LoadedModel:
        return self.load_on(available_device(self._device))

    def run_inference(
        self, batch: SampleBatch, model: LoadedModel, inference_args: dict[str, Any] | None = None
    ) -> list[SampleBatch]:
        with torch.inference_mode():
            return [self.annotate(batch, model)]

    def get_num_bytes(self, batch: SampleBatch) -> int:
        return sum(sample.pixels.nbytes for sample in batch if sample.pixels is not None)

    def get_metrics_namespace(self) -> str:
        return type(self).__name__


def available_device(name: str) -> torch.device:
    """The device the recipe asks for. Where it asks for a GPU and there is none, this raises: a run planned for GPUs
    must not go on a hundred times slower in silence."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("the recipe says `device: cuda`, but this machine has no usable CUDA device")
    return torch.device(name)


def pixels_of(sample: Sample) -> np.ndarray:
    """The decoded picture; that it was decoded is the caller's duty, so its absence is no property of the sample."""
    if sample.pixels is None:
        raise AssertionError(f"sample {sample.annotation.uid} came to a model undecoded")
    return sample.pixels


def with_results(
    batch: SampleBatch, rule: str, columns: dict[int, dict[str, Any]], failures: Sequence[Failure]
) -> SampleBatch:
    """The batch with `columns` filled in by row, and without the rows that failed: those become dead letters."""
    failed = {failure.row: failure for failure in failures}
    kept: list[Sample] = []
    letters: list[DeadLetter] = []
    for row, sample in enumerate(batch):
        if row in failed:
            failure = failed[row]
            message = f"{rule}: {failure.message}"
            letters.append(dead_letter(sample.annotation, CROSS_MODALITY, failure.reason, message))
        else:
            kept.append(sample.annotated(**columns[row]) if row in columns else sample)
    return batch.replace(tuple(kept), tuple(letters))
