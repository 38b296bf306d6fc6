from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from transforms.models.fixed_batches import FixedBatches


class FakeModel:
    """Scores numbers by their square; fails on batches with a poisoned number."""

    def __init__(self, poison: tuple[float, ...] = (), error: Exception | None = None) -> None:
        self.poison = poison
        self.error = error or ValueError("cannot look at this")
        self.batches: list[list[float]] = []

    def score(self, rows: list[float]) -> np.ndarray:
        self.batches.append(rows)
        if any(row in self.poison for row in rows):
            raise self.error
        return np.array([[row * row] for row in rows], np.float32)

    def run(self, rows: list[str], size: int = 4):
        score = FixedBatches(size, self.score, lambda: 100.0)
        return score({i: float(row) for i, row in enumerate(rows)})


def test_every_call_has_the_fixed_shape_and_every_row_has_an_outcome():
    model = FakeModel(poison=(3.0,))
    by_row, failures = model.run([str(i) for i in range(10)])
    assert {len(batch) for batch in model.batches} == {4}
    assert {row: float(score[0]) for row, score in by_row.items()} == {i: i * i for i in range(10) if i != 3}
    assert [(f.row, f.reason, f.message) for f in failures] == [(3, "model_failed", "ValueError: cannot look at this")]


@pytest.mark.parametrize("poisoned", [(0.0,), (5.0, 6.0), (0.0, 1.0, 2.0, 3.0)])
def test_halving_finds_exactly_the_poisoned_rows(poisoned: tuple[float, ...]):
    by_row, failures = FakeModel(poisoned).run([str(i) for i in range(7)])
    assert {float(f.row) for f in failures} == set(poisoned)
    assert set(by_row) == set(range(7)) - {f.row for f in failures}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_score_that_is_not_finite_is_a_failure(value: str):
    by_row, failures = FakeModel().run(["2", value])
    assert set(by_row) == {0}
    assert [(f.row, f.reason) for f in failures] == [(1, "not_finite")]


def test_a_broken_model_raises_instead_of_filling_the_dead_letters():
    with pytest.raises(RuntimeError, match="fails on every input"):
        FakeModel(poison=(100.0, 2.0)).run(["2"])


def test_a_transient_failure_loses_no_sample():
    class Flaky(FakeModel):
        def score(self, rows: list[float]) -> np.ndarray:
            if rows == [100.0] * 4:  # the probe: the model works again
                self.poison = ()
            return super().score(rows)

    by_row, failures = Flaky(poison=(2.0,)).run(["2", "3"])
    assert {row: float(score[0]) for row, score in by_row.items()} == {0: 4.0, 1: 9.0}
    assert failures == []


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublas"])
def test_every_out_of_memory_message_is_recognised(message: str):
    with pytest.raises(torch.OutOfMemoryError, match=message):
        FakeModel(poison=(2.0,), error=RuntimeError(message)).run(["2", "3"])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError()])
def test_out_of_memory_is_not_blamed_on_a_row(error: Exception):
    with pytest.raises(type(error)):
        FakeModel(poison=(2.0,), error=error).run(["2", "3"])


def test_a_wrong_number_of_results_is_an_error():
    score = FixedBatches(2, lambda rows: np.zeros((1, 1)), lambda: 0.0)
    with pytest.raises(RuntimeError, match="1 results for 2 rows"):
        score({0: 1.0, 1: 2.0})


def test_without_rows_the_model_is_not_called():
    model = FakeModel()
    assert model.run([]) == ({}, [])
    assert not model.batches


def test_calls_run_at_once_and_every_row_is_scored_once():
    together = threading.Barrier(3, timeout=20)

    def score(rows):
        together.wait()
        return np.array([[row] for row in rows])

    scores = FixedBatches(2, score, lambda: 100.0, calls=3)({row: float(row) for row in range(6)})
    assert {row: value.item() for row, value in scores.by_row.items()} == {row: float(row) for row in range(6)}
    assert list(scores.by_row) == list(range(6)) and scores.failures == []
