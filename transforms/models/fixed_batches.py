"""Scoring in batches of one fixed shape, so that a row's score never depends on the other rows.

Libraries split a matrix product by the shape of its operands, and the last bits of the result depend on the split: most
images get different last bits in a batch of 7 than in a batch of 32. Here every call of the model gets exactly `size`
rows, including the last batch and the halves that isolate a failing row, so a row's score is a function of the row
alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from transforms.models.cascade import MODEL_FAILED, NOT_FINITE

Prepared = TypeVar("Prepared")

# Running out of memory is never blamed on a row: every batch of a fixed shape needs the same memory.
_OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
# Messages of RuntimeErrors that mean the same.
_OUT_OF_MEMORY_MESSAGES = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class Failure(NamedTuple):
    """A row without a score: its index, a reason code and the error message."""

    row: int
    reason: str
    message: str


class Scores(NamedTuple):
    """The outcome for a set of rows. Each row index is either a key of `by_row` or in exactly one failure."""

    by_row: dict[int, np.ndarray]
    failures: list[Failure]


def _joined(parts: Iterable[Scores]) -> Scores:
    joined = Scores({}, [])
    for by_row, failures in parts:
        joined.by_row.update(by_row)
        joined.failures.extend(failures)
    return joined


@dataclasses.dataclass(frozen=True)
class FixedBatches(Generic[Prepared]):
    """Scores prepared rows, `size` at a time.

    `score` takes exactly `size` inputs and returns an array with one entry for each along its first axis. `probe`
    returns a known-good input. Where a row fails on its own, scoring the probe shows whether the row is bad (it becomes
    a failure) or the model is broken (RuntimeError; otherwise the whole pool would become dead letters). Out of memory
    is raised as `torch.OutOfMemoryError` or `MemoryError`.

    `calls` calls of `score` run at once, each in a thread of its own; a single one runs in the caller's thread.
    """

    size: int
    score: Callable[[list[Prepared]], np.ndarray]
    probe: Callable[[], Prepared]
    calls: int = 1

    def __call__(self, rows: Mapping[int, Prepared]) -> Scores:
        items = list(rows.items())
        groups = (items[start : start + self.size] for start in range(0, len(items), self.size))
        if self.calls == 1:
            return _joined(map(self._scored, groups))
        with ThreadPoolExecutor(self.calls) as threads:
            return _joined(threads.map(self._scored, groups))

    def _scored(self, group: list[tuple[int, Prepared]]) -> Scores:
        scores = Scores({}, [])
        self._score_or_halve(group, scores)
        return scores

    def _score_or_halve(self, prepared: list[tuple[int, Prepared]], scores: Scores) -> None:
        """Scores up to `size` rows. Where the model fails, it scores each half on its own, down to single rows."""
        if not prepared:
            return
        try:
            results = self._score_padded([row for _, row in prepared])
        except _OUT_OF_MEMORY:
            raise
        except Exception as error:  # any failure of the model: traced to single rows, or raised
            if len(prepared) > 1:
                middle = len(prepared) // 2
                self._score_or_halve(prepared[:middle], scores)
                self._score_or_halve(prepared[middle:], scores)
                return
            self._raise_if_broken(error)
            try:
                results = self._score_padded([prepared[0][1]])  # the failure may have been transient
            except _OUT_OF_MEMORY:
                raise
            except Exception as again:  # caused by the row, because the model could score the probe
                logging.warning("The model fails on one sample, which becomes a dead letter: %s", describe(again))
                scores.failures.append(Failure(prepared[0][0], MODEL_FAILED, describe(again)))
                return
        for (index, _), result in zip(prepared, results, strict=True):
            if np.isfinite(result).all():
                scores.by_row[index] = result
            else:
                scores.failures.append(Failure(index, NOT_FINITE, "the model gave NaN or infinity"))

    def _score_padded(self, rows: list[Prepared]) -> np.ndarray:
        """The scores of `rows`, computed in a batch that repeats the last row up to `size`."""
        padded = rows + rows[-1:] * (self.size - len(rows))
        try:
            results = self.score(padded)
        except RuntimeError as error:
            if any(message in str(error) for message in _OUT_OF_MEMORY_MESSAGES):
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        if len(results) != self.size:
            raise AssertionError(f"the model gave {len(results)} results for {self.size} rows")
        return results[: len(rows)]

    def _raise_if_broken(self, error: Exception) -> None:
        try:
            self._score_padded([self.probe()])
        except _OUT_OF_MEMORY:
            raise
        except Exception as probe_error:
            raise RuntimeError(f"the model fails on every input: {describe(probe_error)}") from error


def describe(error: BaseException) -> str:
    """The type and message of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
