"""Rules on the image's shape: aspect ratio and shorter side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from transforms.core.catalogue import SINGLE_MODALITY, Rule
from transforms.core.settings import Settings

if TYPE_CHECKING:
    from transforms.core.records import Annotation

# Rounding to whole pixels changes the stored image's ratio by up to this much.
_RATIO_TOLERANCE_PX = 1.0


class AspectRatioSettings(Settings):
    """The largest ratio of longer to shorter side that is kept."""

    max_ratio: float = Field(3.0, ge=1.0)


class MinSideSettings(Settings):
    """The shortest shorter side that is kept, in px."""

    min_px: int = Field(200, ge=1)


def original_size_px(metadata: Mapping[str, Any], stored: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in px of the original image on the web.

    Downloaders shrink images, so a side that is short in the pool may have been long enough. The pool's
    `original_width` and `original_height` are used if they are integers, at least the stored size, and of its shape.
    Otherwise the stored size is used (our choice: metadata is trusted only as far as it can be checked).
    """
    width, height = metadata.get("original_width"), metadata.get("original_height")
    if type(width) is not int or type(height) is not int:
        return stored
    if not (stored[0] <= width < 2**31 and stored[1] <= height < 2**31):
        return stored
    scale = max(width / stored[0], height / stored[1])
    off_px = max(abs(width / scale - stored[0]), abs(height / scale - stored[1]))
    return (width, height) if off_px <= _RATIO_TOLERANCE_PX else stored


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
