"""Rules on the image's shape: aspect ratio and shorter side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from transforms.core.catalogue import SINGLE_MODALITY, Rule
from transforms.core.settings import Settings

if TYPE_CHECKING:
    from transforms.core.records import Annotation

_WHOLE_NUMBER = re.compile(r"[0-9]{1,10}(\.0*)?")

SIZE_FIELDS = ("original_width", "original_height", "width", "height")
"""The fields of the pool's json from which the original size is found."""


class AspectRatioSettings(Settings):
    """The largest ratio of longer to shorter side that is kept."""

    max_ratio: float = Field(3.0, ge=1.0)


class MinSideSettings(Settings):
    """The shortest shorter side that is kept, in px."""

    min_px: int = Field(200, ge=1)


def original_size_px(metadata: Mapping[str, Any], stored: tuple[int, int]) -> tuple[int, int] | None:
    """(width, height) in px of the original image on the web; None if the pool gives an impossible one.

    Downloaders shrink, enlarge, pad and crop images, so the stored size is not what the rules judge. The pool's
    `original_width` and `original_height` are used if they are whole numbers (also as 900.0 or "900") and if one of
    img2dataset's ways of resizing turns an image of that size into the stored one:

    - `no`, `keep_ratio`, `keep_ratio_largest`: one side is exact, and the other is rounded to a whole number of px;
    - `border`, `center_crop`: it is square. Then `width` and `height`, where given, must be square too, or have the
      shape of the original (another tool has cropped the image since).

    An image that was stored as it came may have a tag that turns it: then the two sides are exchanged. Without an
    original size it is the stored one.
    """
    given = metadata.get("original_width"), metadata.get("original_height")
    if given == (None, None):
        return stored
    original = _size_px(given)
    if original is None:
        return None
    if _is_resized(original, stored):
        return original
    if original == (stored[1], stored[0]):
        return stored
    written = _size_px((metadata.get("width"), metadata.get("height"))) or stored
    is_of_this_image = written[0] == written[1] or _is_resized(original, written)
    return original if stored[0] == stored[1] and is_of_this_image else None


def _size_px(given: tuple[Any, Any]) -> tuple[int, int] | None:
    sides = [_whole_number(side) for side in given]
    width, height = sides
    if width is None or height is None or not (0 < width < 2**31 and 0 < height < 2**31):
        return None
    return width, height


def _whole_number(given: Any) -> int | None:
    if isinstance(given, str) and _WHOLE_NUMBER.fullmatch(given):
        return int(given.partition(".")[0])
    if isinstance(given, float) and given.is_integer():
        return int(given)
    return given if type(given) is int else None


def _is_resized(original: tuple[int, int], stored: tuple[int, int]) -> bool:
    """Whether one scale makes both stored sides of the original ones.

    img2dataset sets the shorter or the longer side to a given length, and rounds the other one to a whole number of px,
    at least 1. The exact scale of the set side makes an error of at most half a px in the other one. A longer side that
    was rounded has an even smaller relative error than a shorter one, so the bound of the shorter side holds for both.
    """
    (width, height), (stored_width, stored_height) = original, stored
    error = abs(stored_width * height - stored_height * width)  # of the shorter side in px, times the longer original
    return 2 * error <= max(width, height) or _is_thin(original, stored) or _is_thin(original[::-1], stored[::-1])


def _is_thin(original: tuple[int, int], stored: tuple[int, int]) -> bool:
    """Whether the stored height is 1 because less than half a px would be left."""
    return stored[1] == 1 and 2 * original[1] * stored[0] < original[0]


def keeps_aspect_ratio(width_px: int, height_px: int, settings: AspectRatioSettings) -> bool:
    """Whether longer side / shorter side <= max_ratio. Source: paper; 3.0 is DataComp's."""
    return max(width_px, height_px) <= settings.max_ratio * min(width_px, height_px)


def keeps_min_side(width_px: int, height_px: int, settings: MinSideSettings) -> bool:
    """Whether the shorter side >= min_px. Source: DataComp's basic filter."""
    return min(width_px, height_px) >= settings.min_px


def _keeps_aspect_ratio(annotation: Annotation, settings: AspectRatioSettings) -> bool:
    return keeps_aspect_ratio(annotation.original_width_px, annotation.original_height_px, settings)


def _keeps_min_side(annotation: Annotation, settings: MinSideSettings) -> bool:
    return keeps_min_side(annotation.original_width_px, annotation.original_height_px, settings)


ASPECT_RATIO = Rule(
    name="aspect_ratio",
    stage=SINGLE_MODALITY,
    settings=AspectRatioSettings,
    summary="longer / shorter side ≤ 3.0",
    source="paper: the rule; DataComp's value",
    order=60,
    keeps=_keeps_aspect_ratio,
)

MIN_SIDE = Rule(
    name="min_side",
    stage=SINGLE_MODALITY,
    settings=MinSideSettings,
    summary="shorter side ≥ 200 px",
    source="DataComp",
    order=70,
    keeps=_keeps_min_side,
)
