"""Scoring rows in batches of one fixed shape: a row's score never depends on its neighbours.

Matrix products are split by the shape of their operands, and the last bits of a result depend on
the split: in most rows the same picture scored in a batch of 7 and in a batch of 32 differs. Here
every call of the model sees exactly `size` rows, the short last batch and the halves that isolate a
failing row included, and so a row's score is a function of the row alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

Prepared = TypeVar("Prepared")

PREPARATION_FAILED = "preparation_failed"
MODEL_FAILED = "model_failed"
NOT_FINITE = "not_finite"

# Out of memory is never one row's fault: at a fixed shape every batch needs the same.
_NOT_A_ROWS_FAULT = (MemoryError, torch.OutOfMemoryError)
_ALSO_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class Failure(NamedTuple):
    """A row that has no score: its index, a reason code and the message."""

    row: int
    reason: str
    message: str


class Scores(NamedTuple):
    """What became of rows: the index of each stands either in `by_row` or in one failure."""

    by_row: dict[int, np.ndarray]
    failures: list[Failure]


@dataclasses.dataclass(frozen=True)
class FixedBatches(Generic[Prepared]):
    """Scores prepared rows, `size` at a time.

    `score` takes exactly `size` of them and returns an array whose first axis runs over them. `probe` is an input that
    a sound model can score: where a row fails on its own, the probe tells a poisoned row (a failure) from a broken
    model (which raises, because otherwise a whole pool would end in the dead letters).
    """

    size: int
    score: Callable[[list[Prepared]], np.ndarray]
    probe: Callable[[], Prepared]

    def __call__(self, rows: Mapping[int, Prepared]) -> Scores:
        scores = Scores({}, [])
        items = list(rows.items())
        for start in range(0, len(items), self.size):
            self._score_or_halve(items[start : start + self.size], scores)
        return scores

    def _score_or_halve(self, prepared: list[tuple[int, Prepared]], scores: Scores) -> None:
        """Scores up to `size` rows; where the model fails, each half alone, down to one row."""
        if not prepared:
            return
        try:
            results = self._score_padded([row for _, row in prepared])
        except _NOT_A_ROWS_FAULT:
            raise
        except Exception as error:  # any failure of the model: narrowed down to a row, or raised
            if len(prepared) > 1:
                middle = len(prepared) // 2
                self._score_or_halve(prepared[:middle], scores)
                self._score_or_halve(prepared[middle:], scores)
                return
            self._raise_if_broken(error)
            try:
                results = self._score_padded([prepared[0][1]])  # the failure may have been a passing one
            except _NOT_A_ROWS_FAULT:
                raise
            except Exception as again:  # the row's own, now that the model has proved sound
                logging.warning("A sample made the model fail; it goes to the dead letters: %s", describe(again))
                scores.failures.append(Failure(prepared[0][0], MODEL_FAILED, describe(again)))
                return
        for (index, _), result in zip(prepared, results, strict=True):
            if np.isfinite(result).all():
                scores.by_row[index] = result
            else:
                scores.failures.append(Failure(index, NOT_FINITE, "the model gave NaN or infinity"))

    def _score_padded(self, rows: list[Prepared]) -> np.ndarray:
        """The scores of `rows`, padded to `size` by repeating the last; the padding's are
        dropped."""
        padded = rows + rows[-1:] * (self.size - len(rows))
        try:
            results = self.score(padded)
        except RuntimeError as error:
            if any(told in str(error) for told in _ALSO_OUT_OF_MEMORY):
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        if len(results) != self.size:
            raise AssertionError(f"the model gave {len(results)} results for {self.size} rows")
        return results[: len(rows)]

    def _raise_if_broken(self, error: Exception) -> None:
        try:
            self._score_padded([self.probe()])
        except _NOT_A_ROWS_FAULT:
            raise
        except Exception as probe_error:
            raise RuntimeError(f"the model fails on every input: {describe(probe_error)}") from error


def describe(error: BaseException) -> str:
    """The error on one line, its type first."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
