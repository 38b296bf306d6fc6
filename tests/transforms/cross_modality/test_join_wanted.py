"""Larger batches for the later models: nothing is lost or out of order, and memory is bounded."""

from __future__ import annotations

import pytest

from transforms.core import recipe
from transforms.core.records import Annotation, Attempt, DeadLetter, Sample, SampleBatch, Shard
from transforms.cross_modality.flipped_clip import FlippedClipSettings
from transforms.cross_modality.image_text_matching import ImageTextMatchingSettings
from transforms.cross_modality.join_wanted import _Join

SHARD = Shard("s", "s.tar", "1")
MODELS = recipe.CrossModalitySettings(
    flipped_clip=FlippedClipSettings(model="m", min=0.2),
    image_text_matching=ImageTextMatchingSettings(model="m", min=0.5, batch_size=2),
)  # joins until 16 * 2 samples are wanted


def sample(number: int, cosine: float) -> Sample:
    annotation = Annotation(f"{number:032x}", "s", str(number), "c", flipped_clip_cosine=cosine)
    return Sample(annotation, {}, b"", None, {"image_text_matching": number})


def batches(*cosines: list[float], attempt: Attempt | None = None) -> list[SampleBatch]:
    found, number = [], 0
    for index, row in enumerate(cosines):
        samples = tuple(sample(number + i, cosine) for i, cosine in enumerate(row))
        number += len(row)
        letter = DeadLetter("s", f"x{index}", "", "cross_modality", "broken", "m")
        found.append(SampleBatch(SHARD, index, index == len(cosines) - 1, samples, (letter,), attempt or Attempt()))
    return found


def joined(*given: SampleBatch) -> list[SampleBatch]:
    join = _Join(MODELS)
    join.start_bundle()
    return [out for batch in given for out in join.process(batch)]


def test_batches_are_joined_until_enough_is_wanted() -> None:
    given = batches([0.3] * 20, [0.1] * 20, [0.3] * 11, [0.3] * 1, [0.3] * 3)
    found = joined(*given)
    assert [(len(batch), batch.index, batch.last) for batch in found] == [(52, 0, False), (3, 1, True)]
    assert [s.annotation for batch in found for s in batch] == [s.annotation for batch in given for s in batch]
    assert [letter.key for batch in found for letter in batch.dead_letters] == ["x0", "x1", "x2", "x3", "x4"]


def test_sample_that_no_later_model_scores_keeps_only_its_row() -> None:
    (found,) = joined(*batches([0.3, 0.1, 0.2]))
    assert [bool(s.inputs) for s in found] == [True, False, True]


def test_slim_rows_wait_in_bounded_number() -> None:
    found = joined(*batches(*[[0.1] * 256] * 5))
    assert [len(batch) for batch in found] == [1024, 256]


@pytest.mark.parametrize("cosines", [[[]], [[0.3] * 32, []], [[0.1]]])
def test_the_last_batch_always_comes(cosines: list[list[float]]) -> None:
    found = joined(*batches(*cosines))
    assert found[-1].last
    assert [batch.index for batch in found] == [*range(len(found))]


def test_failed_attempt_is_discarded() -> None:
    failed = Attempt()
    first, second, _ = batches([0.3] * 3, [0.3] * 3, [0.3], attempt=failed)
    again = batches([0.3] * 3, [0.3] * 4)
    join = _Join(MODELS)
    join.start_bundle()
    assert list(join.process(first)) == []
    failed.out_of_memory = "flipped_clip"
    assert list(join.process(second)) == [second]  # for the writer
    assert [len(out) for batch in again for out in join.process(batch)] == [7]


def test_joiner_handles_several_shards() -> None:
    join = _Join(MODELS)
    join.start_bundle()
    for _ in range(2):
        assert [(len(o), o.index, o.last) for b in batches([0.3] * 3, [0.3]) for o in join.process(b)] == [(4, 0, True)]


