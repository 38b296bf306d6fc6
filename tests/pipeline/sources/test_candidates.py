"""Tests of the input of stage 3: the columns of the samples that stages 1 and 2 keep."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.sources.annotations import candidates_of
from tests.helpers import uid
from transforms.core.records import Annotation


def scored(number: int, **columns: object) -> Annotation:
    embedding = np.array([0.6, -0.8], "<f2").tobytes()
    known = {"flipped_clip_cosine": 0.25, "digit_probability": None, "embedding": embedding, **columns}
    return Annotation(uid(number), "00001", f"k{number}", "a caption").with_columns(**known)


def test_columns():
    found = candidates_of([scored(7), scored(3, digit_probability=0.5, flipped_clip_cosine=float(np.float32(0.19)))])
    assert [u.decode() for u in found.uids] == [uid(7), uid(3)]
    assert found.shards.tolist() == [b"00001"] * 2
    assert found.cosines.tolist() == [0.25, float(np.float32(0.19))]
    assert found.digits.tolist() == [-1.0, 0.5]  # not scored; scored
    assert found.embeddings.dtype == np.float16
    assert found.embeddings.tolist() == np.array([[0.6, -0.8]] * 2, np.float16).tolist()


def test_nan_score_is_an_error_that_names_the_sample():
    with pytest.raises(ValueError, match=rf"sample {uid(2)} of 00001: flipped_clip_cosine is not a number"):
        candidates_of([scored(1), scored(2, flipped_clip_cosine=float("nan"))])


@pytest.mark.parametrize("embedding", [b"12", b"123", b""])
def test_embeddings_of_other_widths_are_an_error(embedding: bytes):
    with pytest.raises(ValueError, match=r"shard 00001: embeddings of . to 4 bytes; allowed: fp16 values"):
        candidates_of([scored(1), scored(2, embedding=embedding)])
