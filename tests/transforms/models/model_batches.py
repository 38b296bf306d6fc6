"""Batches to score, and checks of their scores."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from transforms.core.records import Annotation, Sample, SampleBatch, Shard
from transforms.cross_modality.flipped_clip import FlippedClipSettings

CAPTIONS = (
    "a red square",
    "is there any number written in the blue square or in the red one, and is there a digit left?",
    "a picture of “curly” quotes &amp; entities",
    "no",
)

EVERYTHING = FlippedClipSettings(model="not loaded", min=-1.0)  # keeps everything that has a cosine


def make_sample(number: int, cosine: float | None = 0.5, probability: float | None = None) -> Sample:
    """A sample with an image of noise; its size and content depend on `number`."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (rng.integers(3, 9), rng.integers(3, 9), 3), dtype=np.uint8)
    pixels = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    annotation = Annotation(
        uid=f"{number:032x}",
        shard="shard",
        key=str(number),
        caption=CAPTIONS[number % len(CAPTIONS)],
        flipped_clip_cosine=cosine,
        match_probability=probability,
    )
    return Sample(annotation, {}, b"", pixels)


def make_batch(samples: Iterable[Sample]) -> SampleBatch:
    return SampleBatch(Shard("shard", "shard.tar", "0"), 0, True, tuple(samples))


def scores(batch: SampleBatch) -> dict[str, Any]:
    """All scores by uid, for exact comparison."""
    return {
        a.uid: (
            a.flipped_clip_cosine,
            a.unflipped_clip_cosine,
            a.match_probability,
            a.digit_probability,
            a.embedding,
        )
        for a in (sample.annotation for sample in batch)
    }


def assert_scores_ignore_batch_mates(run: Callable[[SampleBatch], SampleBatch]) -> None:
    """Check that scores are identical for a sample alone, with other samples and in another order."""
    samples = [make_sample(i) for i in range(11)]
    together = scores(run(make_batch(samples)))
    shuffled = random.Random(0).sample(samples, len(samples))
    assert scores(run(make_batch(shuffled))) == together
    assert scores(run(make_batch(samples[3:8]))) == {s.annotation.uid: together[s.annotation.uid] for s in samples[3:8]}
    for sample in samples[:5]:
        assert scores(run(make_batch([sample])))[sample.annotation.uid] == together[sample.annotation.uid]


def assert_one_poisoned_row_is_isolated(
    run: Callable[[SampleBatch], SampleBatch], poison: Callable[[Callable[[Any], bool]], None]
) -> None:
    """Check that a sample on which the model fails becomes a dead letter, and the other scores stay identical.

    `poison` makes the model fail on batches in which some row satisfies the given test.
    """
    samples = [make_sample(i) for i in range(7)]
    sound = scores(run(make_batch(samples)))
    white = np.full((40, 40, 3), 255, np.uint8)
    bad = make_sample(99)
    bad = Sample(bad.annotation, {}, b"", white)
    poison(lambda pixels: bool(pixels.std() < 0.2 and pixels.mean() > 0.9))
    scored = run(make_batch([*samples[:2], bad, *samples[2:]]))
    assert scores(scored) == sound
    (letter,) = scored.dead_letters
    assert (letter.uid, letter.stage, letter.reason) == (bad.annotation.uid, "cross_modality", "model_failed")
    assert "poisoned" in letter.message
