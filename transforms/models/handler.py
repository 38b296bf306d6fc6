"""What the three model handlers share: whole batches in, whole batches out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from apache_beam.ml.inference.base import ModelHandler

from pipeline.recipe import CROSS_MODALITY
from pipeline.records import DeadLetter, Sample, SampleBatch, dead_letter
from transforms.models.fixed_batches import Failure
from transforms.models.pictures import pixels_of

LoadedModel = TypeVar("LoadedModel")


class SampleBatchHandler(ModelHandler[SampleBatch, SampleBatch, LoadedModel], Generic[LoadedModel]):
    """A RunInference handler whose element is a ready-made SampleBatch.

    RunInference's own batching forms other batches on other runners and across shards, so it is
    skipped: the element goes to `run_inference` as it is. A subclass loads its model in `load_on`
    and fills in columns in `annotate`.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def load_on(self, device: torch.device) -> LoadedModel:
        """The model, ready to score on `device`; Beam takes a weak reference (so no tuple)."""
        raise NotImplementedError(type(self))

    def annotate(self, batch: SampleBatch, model: LoadedModel) -> SampleBatch:
        """The batch with this model's columns, its failed samples moved to the dead letters."""
        raise NotImplementedError(type(self))

    def should_skip_batching(self) -> bool:
        return True

    def load_model(self) -> LoadedModel:
        return self.load_on(available_device(self._device))

    def run_inference(
        self, batch: SampleBatch, model: LoadedModel, inference_args: dict[str, Any] | None = None
    ) -> list[SampleBatch]:
        for sample in batch:
            pixels_of(sample)
        with torch.inference_mode():
            return [self.annotate(batch, model)]

    def get_num_bytes(self, batch: SampleBatch) -> int:
        return sum(pixels_of(sample).nbytes for sample in batch)

    def get_metrics_namespace(self) -> str:
        return type(self).__name__


def available_device(name: str) -> torch.device:
    """The device the recipe asks for; raises where that is a GPU and there is none.

    A run planned for GPUs must not go on a hundred times slower in silence.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("the recipe says `device: cuda`, but this machine has no usable CUDA device")
    return torch.device(name)


def with_results(
    batch: SampleBatch, rule: str, columns: dict[int, dict[str, Any]], failures: Sequence[Failure]
) -> SampleBatch:
    """The batch with `columns` filled in by row; the rows that failed become dead letters."""
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
