"""Annotating a batch in several threads."""

import threading
import time
from typing import Any

import pytest

from tests.helpers import whole_sample
from transforms import annotate
from transforms.annotate import AnnotateSamples
from transforms.core.records import Sample, SampleBatch, Shard

NAMES = [f"k{number}" for number in range(11)]


class Counted:
    """Takes the number of a sample's key as its word count. The first sample of each thread waits for the others."""

    def __init__(self) -> None:
        self._together = threading.Barrier(annotate.THREADS, timeout=20)
        self._thread = threading.local()

    def load(self) -> None:
        pass

    def columns(self, sample: Sample) -> dict[str, Any]:
        if not getattr(self._thread, "met", False):
            self._thread.met = True
            self._together.wait()
        number = int(sample.annotation.key[1:])
        if number % 4 == 3:
            raise ValueError(f"no {number}")
        return {"word_count": number}


def batch_of(names: list[str]) -> SampleBatch:
    samples = tuple(whole_sample(key=name, word_count=None) for name in names)
    return SampleBatch(Shard("s", "s.tar", ""), 0, True, samples)


def test_threads_work_on_one_batch_and_its_order_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotate, "THREADS", 3)
    annotate._threads.cache_clear()
    step = AnnotateSamples("caption_length", "single_modality", Counted, thread_safe=True)
    (found,) = step.process(batch_of(NAMES))
    annotate._threads.cache_clear()
    assert [sample.annotation.word_count for sample in found] == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert [letter.key for letter in found.dead_letters] == ["k3", "k7"]
    assert {letter.reason for letter in found.dead_letters} == {"caption_length_failed"}


def test_an_annotator_that_is_not_thread_safe_meets_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotate, "THREADS", 3)
    annotate._threads.cache_clear()
    inside: list[Sample] = []
    most = 0

    class Alone(Counted):
        def columns(self, sample: Sample) -> dict[str, Any]:
            nonlocal most
            inside.append(sample)
            time.sleep(0.01)  # lets another thread come in
            most = max(most, len(inside))
            inside.remove(sample)
            return {}

    list(AnnotateSamples("caption_length", "single_modality", Alone).process(batch_of(NAMES)))
    annotate._threads.cache_clear()
    assert most == 1


def test_running_out_of_memory_is_no_samples_fault() -> None:
    class Exhausted(Counted):
        def columns(self, sample: Sample) -> dict[str, Any]:
            raise MemoryError

    with pytest.raises(MemoryError):
        list(AnnotateSamples("caption_length", "single_modality", Exhausted).process(batch_of(NAMES)))


def test_an_empty_batch_loads_nothing() -> None:
    def make() -> Any:
        raise AssertionError("made")

    batch = batch_of([])
    assert list(AnnotateSamples("caption_length", "single_modality", make).process(batch)) == [batch]
