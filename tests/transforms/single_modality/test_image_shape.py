"""The image's shape: the pool's size of the original is used only if it is plausible."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import annotation, jpeg, picture
from transforms.core.records import Sample, SampleBatch, Shard
from transforms.single_modality.image_shape import (
    AspectRatioSettings,
    MinSideSettings,
    keeps_aspect_ratio,
    keeps_min_side,
    original_size_px,
)
from transforms.single_modality.images import ImageAnnotator, ImageFeatures
from transforms.single_modality.perceptual_hash import perceptual_hash, small_copy, thumbnail

STORED = (300, 200)


@pytest.mark.parametrize(
    "original",
    [(300, 200), (600, 400), (601, 400), (3000, 2000), (3005, 2000), (2**31 - 1, (2**31 - 1) * 2 // 3)],
)
def test_an_original_of_the_same_shape_is_believed(original: tuple[int, int]) -> None:
    assert original_size_px({"original_width": original[0], "original_height": original[1]}, STORED) == original


@pytest.mark.parametrize(("width", "height"), [(900.0, 600.0), ("900", "600"), ("900.0", "600."), (900, "600")])
def test_a_size_that_went_through_a_table_is_a_size(width: Any, height: Any) -> None:
    assert original_size_px({"original_width": width, "original_height": height}, (256, 171)) == (900, 600)


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (600, None), (None, 400), ("600px", "400px"), ("6e2", "4e2"), (600.5, 400.5), (True, True), ([600], [400]),
        (-600, -400), (0, 0), ("0", "0"), ("-600", "-400"), (600, 600), (200 * 3, 300 * 3), (3010, 2000), (3100, 2000),
        (2**31, 2**31 * 2 // 3), (10**400, 10**400), ("9" * 5000, "9" * 5000), (float("nan"), float("inf")),
    ],
)  # fmt: skip
def test_a_size_that_cannot_be_true_is_not_used(width: Any, height: Any) -> None:
    assert original_size_px({"original_width": width, "original_height": height}, STORED) is None


@pytest.mark.parametrize(
    "metadata", [{}, {"original_width": None, "original_height": None}, {"width": 900, "height": 600}]
)
def test_without_an_original_size_the_stored_one_counts(metadata: dict[str, Any]) -> None:
    assert original_size_px(metadata, STORED) == STORED


@pytest.mark.parametrize(
    ("original", "stored"),
    [
        ((600, 400), (600, 400)),  # no
        ((600, 400), (384, 256)), ((150, 120), (320, 256)), ((64, 64), (256, 256)),  # keep_ratio, also enlarged
        ((220, 1100), (256, 1280)), ((2000, 200), (2560, 256)),
        ((975, 292), (512, 153)), ((1536, 247), (512, 82)),  # rounded, written by img2dataset
        ((4000, 900), (256, 58)), ((220, 1100), (51, 256)), ((150, 120), (150, 120)),  # keep_ratio_largest
        ((900, 200), (256, 256)), ((150, 120), (512, 512)),  # border, center_crop
    ],
)  # fmt: skip
def test_every_way_of_resizing_of_img2dataset(original: tuple[int, int], stored: tuple[int, int]) -> None:
    written = {"width": stored[0], "height": stored[1]}
    for more in ({}, written):
        found = original_size_px({"original_width": original[0], "original_height": original[1], **more}, stored)
        assert found == original


def test_an_image_that_a_tag_turns() -> None:
    assert original_size_px({"original_width": 400, "original_height": 600}, (600, 400)) == (600, 400)


def test_a_square_image_may_be_cropped_after_the_download() -> None:
    sizes = {"original_width": 900, "original_height": 600}
    assert original_size_px({**sizes, "width": 512, "height": 341}, (224, 224)) == (900, 600)
    assert original_size_px({**sizes, "width": 341, "height": 512}, (224, 224)) is None  # those of another image


@pytest.mark.parametrize(("stored", "original"), [((1, 1), (5000, 1)), ((1, 512), (1, 5000)), ((512, 1), (50_000, 98))])
def test_tiny_sides_do_not_break_it(stored: tuple[int, int], original: tuple[int, int]) -> None:
    found = original_size_px({"original_width": original[0], "original_height": original[1]}, stored)
    assert found in (None, original)


def resized(original: tuple[int, int], image_size: int, of_side: Callable[..., int]) -> tuple[int, int]:
    """The size that img2dataset 1.47 stores: `keep_ratio` sets the `min` of the sides, `keep_ratio_largest` the `max`.

    Its resizing (albumentations) multiplies both sides by one float and rounds each to a whole number, at least 1.
    """
    scale = image_size / of_side(original)
    return max(1, round(original[0] * scale)), max(1, round(original[1] * scale))


def sizes(original: tuple[int, int]) -> dict[str, int]:
    return {"original_width": original[0], "original_height": original[1]}


def all_stored(original: tuple[int, int], image_size: int) -> set[tuple[int, int]]:
    """What each way of resizing stores: `no`, the two that keep the ratio, `border` and `center_crop`."""
    kept = {resized(original, image_size, of_side) for of_side in (min, max)}
    return {original, *kept, (image_size, image_size)}


SIDES = (100, 173, 199, 200, 201, 255, 256, 333, 480, 512, 679, 1000)
IMAGE_SIZES = (64, 224, 256, 384, 512)


def test_what_img2dataset_stores_is_believed_at_every_ratio() -> None:
    for side, tenths in itertools.product(SIDES, range(1000, 10_001, 37)):
        longer = side * tenths // 1000
        for original, image_size in itertools.product([(longer, side), (side, longer)], IMAGE_SIZES):
            for stored in all_stored(original, image_size):
                assert original_size_px(sizes(original), stored) == original, (original, stored)


@given(
    width=st.integers(1, 20_000), height=st.integers(1, 20_000), image_size=st.integers(16, 1024),
    of_side=st.sampled_from([min, max]), turn=st.booleans(),
)  # fmt: skip
def test_what_img2dataset_stores_is_believed(
    width: int, height: int, image_size: int, of_side: Callable[..., int], turn: bool
) -> None:
    original = (width, height) if turn else (height, width)
    assert original_size_px(sizes(original), resized(original, image_size, of_side)) == original


def test_only_what_img2dataset_stores_is_believed() -> None:
    """Each size near a stored one, against all sizes that its ways of resizing can store of the original."""
    for original in ((1806, 679), (679, 1806), (1280, 128), (999, 500), (301, 300), (40, 300), (5000, 7)):
        possible = {resized(original, n, of_side) for n in range(1, 5001) for of_side in (min, max)}
        for width, height in sorted(possible):
            if 40 <= max(width, height) <= 600:
                for stored in itertools.product(
                    range(max(1, width - 2), width + 3), range(max(1, height - 2), height + 3)
                ):
                    exact_half = 2 * abs(stored[0] * original[1] - stored[1] * original[0]) == max(original)
                    is_possible = stored in possible or stored[0] == stored[1] or exact_half
                    believed = original_size_px(sizes(original), stored) == original
                    assert believed == is_possible or original == stored[::-1], (original, stored)


def test_a_wide_picture_whose_short_side_is_rounded() -> None:
    assert original_size_px(sizes((1806, 679)), (512, 192)) == (1806, 679)
    assert original_size_px(sizes((1806, 679)), (512, 193)) is None
    assert original_size_px(sizes((1806, 679)), (512, 191)) is None


@pytest.mark.parametrize(
    ("width", "height", "kept"),
    [(300, 100, True), (100, 300, True), (301, 100, False), (100, 301, False), (1, 1, True), (1, 4, False),
     (99, 297, True), (99, 298, False)],
)  # fmt: skip
def test_aspect_ratio(width: int, height: int, kept: bool) -> None:
    assert keeps_aspect_ratio(width, height, AspectRatioSettings()) is kept


def test_only_squares_pass_a_ratio_of_one() -> None:
    assert keeps_aspect_ratio(7, 7, AspectRatioSettings(max_ratio=1.0))
    assert not keeps_aspect_ratio(7, 8, AspectRatioSettings(max_ratio=1.0))


@pytest.mark.parametrize(
    ("width", "height", "kept"), [(200, 200, True), (199, 200, False), (200, 199, False), (5000, 199, False)]
)
def test_min_side(width: int, height: int, kept: bool) -> None:
    assert keeps_min_side(width, height, MinSideSettings()) is kept


@pytest.mark.parametrize(
    ("metadata", "notes", "size", "found"),
    [({"original_width": 5, "original_height": 99}, None, (96, 64), "original_size_not_used"),
     ({"original_width": 5, "original_height": 99}, "uid_replaced", (96, 64), "uid_replaced original_size_not_used"),
     ({"original_width": "192", "original_height": 128.0}, "uid_replaced", (192, 128), "uid_replaced")],
)  # fmt: skip
def test_a_size_that_is_not_used_is_noted(
    metadata: dict[str, Any], notes: str | None, size: tuple[int, int], found: str
) -> None:
    known = {"width_px": 96, "height_px": 64, "pool_notes": notes}
    columns = ImageAnnotator().columns(Sample(annotation(**known), metadata, jpeg(), np.asarray(picture())))
    assert (columns["original_width_px"], columns["original_height_px"], columns["pool_notes"]) == (*size, found)


def features(sample: Sample) -> tuple[Any, ...]:
    a = sample.annotation
    return a.key, a.original_width_px, a.original_height_px, a.image_sha256, a.perceptual_hash, a.image_thumbnail


def test_features_of_a_batch_and_a_sample_that_breaks() -> None:
    pixels = np.asarray(picture())
    known = {"width_px": 96, "height_px": 64, "original_width_px": None, "original_height_px": None}
    good = Sample(annotation(key="good", **known), {"original_width": 192, "original_height": 128}, jpeg(), pixels)
    bad = Sample(annotation(key="bad", **known), {}, jpeg(), np.zeros((2, 2, 7), np.uint8))
    batch = SampleBatch(Shard("s", "p", "f"), 2, True, (bad, good))
    sha256, small = hashlib.sha256(jpeg()).hexdigest(), small_copy(pixels)
    with beam.Pipeline("FnApiRunner") as p:
        done = p | beam.Create([batch]) | ImageFeatures()
        found = done | "Samples" >> beam.FlatMap(iter) | "Features" >> beam.Map(features)
        assert_that(found, equal_to([("good", 192, 128, sha256, perceptual_hash(small), thumbnail(small))]), "features")
        letters = done | "Letters" >> beam.FlatMap(lambda b: [(x.key, x.reason, x.stage) for x in b.dead_letters])
        assert_that(letters, equal_to([("bad", "image_features_failed", "single_modality")]), "letters")
        assert_that(done | "Place" >> beam.Map(lambda b: (b.index, b.last)), equal_to([(2, True)]), "place")
