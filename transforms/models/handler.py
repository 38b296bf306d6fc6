"""The base class of the model handlers. Its element is a `SampleBatch`: one batch in, one batch out."""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from queue import SimpleQueue
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from apache_beam.ml.inference.base import ModelHandler

from transforms.core import metrics
from transforms.core.metrics import counter, distribution
from transforms.core.recipe import CROSS_MODALITY
from transforms.core.records import Annotation, DeadLetter, Sample, SampleBatch, dead_letter
from transforms.models.cascade import PREPARATION_FAILED
from transforms.models.fixed_batches import Failure, FixedBatches, describe
from transforms.models.pictures import pixels_of


class LoadedModel(Protocol):
    """A model in this process, or a proxy of a model in another process. Takes and returns numpy arrays."""

    def load(self) -> bool:
        """Load the model if it is not loaded yet. Returns whether this call loaded it."""

    def prepare(self, sample: Sample) -> Any:
        """The model inputs for a decoded sample."""

    def probe(self, shape: Hashable) -> Any:
        """A known-good input of the given shape."""

    def score(self, inputs: list[Any]) -> np.ndarray:
        """Scores of inputs of one shape; the first axis is over the inputs."""

    def constants(self) -> Any:
        """What `SampleBatchHandler.columns` needs besides the scores; None if it needs nothing."""


class LocalModel(LoadedModel, Protocol):
    """A model in this process."""

    def twin(self) -> Self:
        """A model with the same weights in memory, which can score at the same time as this one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InMemory:
    """Base class of models that are loaded when they are constructed.

    One call of `score` runs at a time, which bounds peak memory.
    """

    model: Any
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def load(self) -> bool:
        """Does nothing; returns False."""
        return False

    def twin(self) -> Self:
        """See `LocalModel.twin`.

        Libraries change modules during a call (`torch.func.functional_call` does), so two calls need two of them.
        """
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        module = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
        return dataclasses.replace(self, model=module, lock=threading.Lock())


class OnDemand:
    """A model that is loaded on first use.

    RunInference loads models at setup, before a worker knows whether any of its shards needs work. Where all tables
    exist already, nothing is loaded. `calls` calls of `score` can run at once, each on a twin of the model.
    """

    def __init__(self, make: Callable[[], LocalModel], calls: int = 1) -> None:
        self._make, self._calls, self._lock = make, calls, threading.Lock()
        self._model: LocalModel | None = None
        self._idle: SimpleQueue[LocalModel] = SimpleQueue()

    def load(self) -> bool:
        """See `LoadedModel.load`."""
        with self._lock:
            if self._model is not None:
                return False
            model = self._make()
            for one in (model, *(model.twin() for _ in range(self._calls - 1))):
                self._idle.put(one)
            self._model = model
            return True

    def prepare(self, sample: Sample) -> Any:
        """See `LoadedModel.prepare`."""
        return self._loaded().prepare(sample)

    def probe(self, shape: Hashable) -> Any:
        """See `LoadedModel.probe`."""
        return self._loaded().probe(shape)

    def score(self, inputs: list[Any]) -> np.ndarray:
        """See `LoadedModel.score`.

        Where the GPU runs out of memory, cached blocks are released and the call is retried once. The peak of another
        model on the same GPU may have been the cause, and that should not change the batch shape that scores come from.
        """
        self.load()
        model = self._idle.get()
        try:
            return model.score(inputs)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return model.score(inputs)
        finally:
            self._idle.put(model)

    def constants(self) -> Any:
        """See `LoadedModel.constants`."""
        return self._loaded().constants()

    def _loaded(self) -> LocalModel:
        self.load()
        assert self._model is not None
        return self._model


Loaded = TypeVar("Loaded", bound=LocalModel)


class SampleBatchHandler(ModelHandler[SampleBatch, SampleBatch, LoadedModel], Generic[Loaded], abc.ABC):
    """A `RunInference` handler whose element is a complete `SampleBatch`.

    RunInference's own batching is skipped: it mixes shards, and its batches differ from runner to runner. A subclass
    loads its model in `load_on` and turns scores into annotation columns in `columns`.

    `batch_size` is the number of rows in each call of the model. It is halved if a GPU runs out of memory.
    """

    calls: int = 1
    """How many calls of the model run at once on a CPU, each in one thread. Scores do not depend on it."""

    rule: ClassVar[str]
    """The rule (or score) that the model computes; also the key of its inputs in `Sample.inputs`."""

    def __init__(self, batch_size: int, device: str) -> None:
        super().__init__()
        self._batch_size, self._device = batch_size, device

    @abc.abstractmethod
    def load_on(self, device: torch.device) -> Loaded:
        """Load the model onto `device`. Not a tuple: Beam keeps a weak reference to the returned object."""

    def wants(self, annotation: Annotation) -> bool:
        """Whether the model scores this sample."""
        return True

    def shape_of(self, prepared: Any) -> Hashable:
        """The shape of an input, a function of the input alone. One call of the model has inputs of one shape."""
        return None

    @abc.abstractmethod
    def columns(self, scores: np.ndarray, constants: Any) -> dict[str, Any]:
        """The annotation columns computed from the scores of one input and the model's constants."""

    def should_skip_batching(self) -> bool:
        return True

    def share_model_across_processes(self) -> bool:
        """On a GPU all worker processes share one copy of the model; on CPUs each process has its own."""
        return self._device == "cuda"

    def load_model(self) -> LoadedModel:
        device = available_device(self._device)
        if device.type == "cuda":
            return OnDemand(lambda: self.load_on(device))
        # The last bits of a score depend on the number of threads of a call, so it is the same on every machine.
        torch.set_num_threads(1)
        return OnDemand(lambda: self.load_on(device), self.calls)

    def run_inference(
        self, batch: SampleBatch, model: LoadedModel, inference_args: dict[str, Any] | None = None
    ) -> list[SampleBatch]:
        if batch.attempt.out_of_memory:
            return [batch]
        wanted = {row: sample for row, sample in enumerate(batch) if self.wants(sample.annotation)}
        if not wanted:
            return [batch]
        started = time.perf_counter()
        if model.load():  # loaded here, so that a failure to load is not blamed on a sample or on the batch shape
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
        logging.warning("%s: out of GPU memory at %d rows; restarting shard %s", self.rule, size, batch.shard.name)
        batch.attempt.out_of_memory = self.rule
        return [batch]

    def get_num_bytes(self, batch: SampleBatch) -> int:
        """The size of a batch, for Beam's metrics. Beam's default would pickle every batch."""
        return batch.nbytes

    def get_metrics_namespace(self) -> str:
        return metrics.NAMESPACE

    def override_metrics(self, metrics_namespace: str = "") -> bool:
        """True, so that RunInference updates none of its own metrics; `transforms.core.metrics` has the reason."""
        return True

    def _annotated(
        self, batch: SampleBatch, wanted: dict[int, Sample], model: LoadedModel, constants: Any, size: int
    ) -> SampleBatch:
        by_shape: dict[Hashable, dict[int, Any]] = {}
        failures: list[Failure] = []
        for row, sample in wanted.items():
            prepared = sample.inputs.get(self.rule)
            if prepared is None:
                pixels_of(sample)  # an undecoded sample is a bug of the pipeline, so it raises here
                prepared = prepared_or_error(model, sample)
            if isinstance(prepared, Exception):
                failures.append(Failure(row, PREPARATION_FAILED, describe(prepared)))
            else:
                by_shape.setdefault(self.shape_of(prepared), {})[row] = prepared
        columns: dict[int, dict[str, Any]] = {}
        counter(metrics.samples(self.rule)).inc(len(wanted))

        seconds: list[float] = []  # Beam ignores metrics of other threads

        def score(inputs: list[Any]) -> np.ndarray:
            started = time.perf_counter()
            scores = model.score(inputs)
            seconds.append(time.perf_counter() - started)
            return scores

        for shape, rows in by_shape.items():
            for start in range(0, len(rows), size):
                distribution(metrics.batch_samples(self.rule)).update(min(size, len(rows) - start))
            scores, failed = FixedBatches(size, score, functools.partial(model.probe, shape), self.calls)(rows)
            columns |= {row: self.columns(row_scores, constants) for row, row_scores in scores.items()}
            failures += failed
        for taken in seconds:
            distribution(metrics.batch_ms(self.rule)).update(round(1000 * taken))
        return _with_results(batch, self.rule, columns, failures)


def prepared_or_error(model: LoadedModel | Any, sample: Sample) -> Any:
    """The model inputs for a sample, or the exception that preparing it raised. MemoryError is raised."""
    try:
        return model.prepare(sample)
    except MemoryError:  # not caused by this sample
        raise
    except Exception as error:  # any failure of a library on this sample; it becomes a dead letter
        # The traceback would keep the decoded image in memory until the batch is scored.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return error


def available_device(name: str) -> torch.device:
    """The device that the recipe names. Raises RuntimeError if it is "cuda" and no GPU is usable.

    There is no fallback to the CPU: a run planned for GPUs would silently be a hundred times slower.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("the recipe says `device: cuda`, but this machine has no usable CUDA device")
    return torch.device(name)


def _with_results(
    batch: SampleBatch, rule: str, columns: dict[int, dict[str, Any]], failures: Sequence[Failure]
) -> SampleBatch:
    """The batch with the `columns` of each row filled in and the model's inputs removed.

    Failed rows become dead letters.
    """
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
