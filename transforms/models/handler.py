"""What the three model handlers share: whole batches in, whole batches out."""

from __future__ import annotations

import abc
import functools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from apache_beam.ml.inference.base import ModelHandler

from transforms.core import metrics
from transforms.core.metrics import counter, distribution, timed_ms
from transforms.core.recipe import CROSS_MODALITY
from transforms.core.records import Annotation, DeadLetter, Sample, SampleBatch, dead_letter
from transforms.models.fixed_batches import PREPARATION_FAILED, Failure, FixedBatches, describe
from transforms.models.pictures import pixels_of


class LoadedModel(Protocol):
    """A model in its worker's memory, or a proxy of one in another process's: numpy in, numpy out."""

    def load(self) -> bool:
        """Load the model where that is not done yet; whether it was not."""

    def prepare(self, sample: Sample) -> Any:
        """What the model looks at, made of a decoded sample."""

    def probe(self, shape: Hashable) -> Any:
        """What any sound model can score, of the given shape."""

    def score(self, inputs: list[Any]) -> np.ndarray:
        """Scores of inputs of one shape, the first axis over the inputs."""

    def constants(self) -> Any:
        """What making columns of scores takes beside them; None where that is nothing."""


class InMemory:
    """A model that is loaded already."""

    def load(self) -> bool:
        """Nothing is left to do."""
        return False


class OnDemand:
    """A model that is loaded when it is first asked for: over shards whose tables are there, nothing is loaded.

    RunInference loads at setup, which comes before a worker knows whether any shard needs work.
    """

    def __init__(self, make: Callable[[], LoadedModel]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._model: LoadedModel | None = None

    def load(self) -> bool:
        """As `LoadedModel.load`."""
        with self._lock:
            if self._model is not None:
                return False
            self._model = self._make()
            return True

    def prepare(self, sample: Sample) -> Any:
        """As `LoadedModel.prepare`."""
        return self._loaded().prepare(sample)

    def probe(self, shape: Hashable) -> Any:
        """As `LoadedModel.probe`."""
        return self._loaded().probe(shape)

    def score(self, inputs: list[Any]) -> np.ndarray:
        """As `LoadedModel.score`.

        Out of memory is tried once more after freed blocks are given back: another model on the same GPU may have had
        its peak just then, and which shape a score comes from should not hang on that.
        """
        model = self._loaded()
        try:
            return model.score(inputs)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return model.score(inputs)

    def constants(self) -> Any:
        """As `LoadedModel.constants`."""
        return self._loaded().constants()

    def _loaded(self) -> LoadedModel:
        self.load()
        assert self._model is not None
        return self._model


Loaded = TypeVar("Loaded", bound=LoadedModel)


class SampleBatchHandler(ModelHandler[SampleBatch, SampleBatch, LoadedModel], Generic[Loaded], abc.ABC):
    """A RunInference handler whose element is a ready-made SampleBatch.

    RunInference's own batching forms other batches on other runners and across shards, so it is skipped: the element
    goes to `run_inference` as it is. A subclass loads its model in `load_on` and makes columns of its scores.
    """

    rule: ClassVar[str]
    """The rule (or score) that the model serves; its inputs stand under this name in `Sample.inputs`."""

    def __init__(self, batch_size: int, device: str) -> None:
        super().__init__()
        self._batch_size, self._device = batch_size, device

    @abc.abstractmethod
    def load_on(self, device: torch.device) -> Loaded:
        """The model, ready to score on `device`; Beam takes a weak reference (so no tuple)."""

    def wants(self, annotation: Annotation) -> bool:
        """Whether the model is asked about a sample."""
        return True

    def shape_of(self, prepared: Any) -> Hashable:
        """What must be equal among the inputs of one call of the model; a function of the input alone."""
        return None

    @abc.abstractmethod
    def columns(self, scores: np.ndarray, constants: Any) -> dict[str, Any]:
        """What the scores of one input, with the model's constants, say of the sample."""

    def should_skip_batching(self) -> bool:
        return True

    def share_model_across_processes(self) -> bool:
        """A GPU holds one copy, however many worker processes there are; on CPUs each process has its own."""
        return self._device == "cuda"

    def load_model(self) -> LoadedModel:
        device = available_device(self._device)
        return OnDemand(lambda: self.load_on(device))

    def run_inference(
        self, batch: SampleBatch, model: LoadedModel, inference_args: dict[str, Any] | None = None
    ) -> list[SampleBatch]:
        if batch.attempt.out_of_memory:
            return [batch]
        wanted = {row: sample for row, sample in enumerate(batch) if self.wants(sample.annotation)}
        if not wanted:
            return [batch]
        started = time.perf_counter()
        if model.load():  # were that to fail below, samples or shapes would get the blame
            counter(metrics.MODELS_LOADED).inc()
            distribution(metrics.load_ms(self.rule)).update(round(1000 * (time.perf_counter() - started)))
        constants = model.constants()
        halvings = batch.attempt.halvings.get(self.rule, 0)
        size = max(1, self._batch_size >> halvings)
        try:
            return [self._annotated(batch, wanted, model, constants, size)]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        logging.warning("%s: out of GPU memory at %d rows; shard %s starts again", self.rule, size, batch.shard.name)
        batch.attempt.out_of_memory = self.rule
        return [batch]

    def get_num_bytes(self, batch: SampleBatch) -> int:
        """Only for Beam's metrics; its own way pickles every batch."""
        return batch.nbytes

    def get_metrics_namespace(self) -> str:
        return metrics.NAMESPACE

    def override_metrics(self, metrics_namespace: str = "") -> bool:
        """`transforms.core.metrics` says why."""
        return True

    def _annotated(
        self, batch: SampleBatch, wanted: dict[int, Sample], model: LoadedModel, constants: Any, size: int
    ) -> SampleBatch:
        by_shape: dict[Hashable, dict[int, Any]] = {}
        failures: list[Failure] = []
        for row, sample in wanted.items():
            prepared = sample.inputs.get(self.rule)
            if prepared is None:
                pixels_of(sample)  # to come undecoded is no sample's fault
                prepared = prepared_or_error(model, sample)
            if isinstance(prepared, Exception):
                failures.append(Failure(row, PREPARATION_FAILED, describe(prepared)))
            else:
                by_shape.setdefault(self.shape_of(prepared), {})[row] = prepared
        columns: dict[int, dict[str, Any]] = {}
        counter(metrics.samples(self.rule)).inc(len(wanted))

        def score(inputs: list[Any]) -> np.ndarray:
            with timed_ms(metrics.batch_ms(self.rule)):
                return model.score(inputs)

        for shape, rows in by_shape.items():
            for start in range(0, len(rows), size):
                distribution(metrics.batch_samples(self.rule)).update(min(size, len(rows) - start))
            scores, failed = FixedBatches(size, score, functools.partial(model.probe, shape))(rows)
            columns |= {row: self.columns(of_row, constants) for row, of_row in scores.items()}
            failures += failed
        return _with_results(batch, self.rule, columns, failures)


def prepared_or_error(model: LoadedModel | Any, sample: Sample) -> Any:
    """What the model looks at, or the error that making it gave: a property of this sample, kept with it."""
    try:
        return model.prepare(sample)
    except MemoryError:  # no sample's fault
        raise
    except Exception as error:  # whatever a library makes of this sample; becomes its dead letter
        # Its traceback would hold the decoded picture for as long as the batch waits.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return error


def available_device(name: str) -> torch.device:
    """The device the recipe asks for; raises where that is a GPU and there is none.

    A run planned for GPUs must not go on a hundred times slower in silence.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("the recipe says `device: cuda`, but this machine has no usable CUDA device")
    return torch.device(name)


def _with_results(
    batch: SampleBatch, rule: str, columns: dict[int, dict[str, Any]], failures: Sequence[Failure]
) -> SampleBatch:
    """The batch with `columns` filled in by row, and without the model's inputs; rows that failed become dead
    letters."""
    failed = {failure.row: failure for failure in failures}
    kept: list[Sample] = []
    letters: list[DeadLetter] = []
    for row, sample in enumerate(batch):
        if row in failed:
            failure = failed[row]
            message = f"{rule}: {failure.message}"
            letters.append(dead_letter(sample.annotation, CROSS_MODALITY, failure.reason, message))
        else:
            kept.append(sample.without_input(rule).annotated(**columns.get(row, {})))
    return batch.replace(tuple(kept), tuple(letters))
