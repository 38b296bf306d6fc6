"""Rules on the image's shape: aspect ratio and smallest side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transforms.core import recipe

# The stored image may be up to this much off the original's ratio through rounding to whole pixels.
_RATIO_TOLERANCE_PX = 1.0


def original_size_px(metadata: Mapping[str, Any], stored: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in px that the picture had on the web.

    Downloaders shrink pictures, so a side that is short in the pool may have been long enough. The pool's
    `original_width` and `original_height` are believed where they are whole numbers, not below the stored size, and of
    its shape; else the stored size counts (our choice: metadata is not trusted further than it can be checked).
    """
    width, height = metadata.get("original_width"), metadata.get("original_height")
    if type(width) is not int or type(height) is not int:
        return stored
    if not (stored[0] <= width < 2**31 and stored[1] <= height < 2**31):
        return stored
    scale = max(width / stored[0], height / stored[1])
    off_px = max(abs(width / scale - stored[0]), abs(height / scale - stored[1]))
    return (width, height) if off_px <= _RATIO_TOLERANCE_PX else stored


def keeps_aspect_ratio(width_px: int, height_px: int, settings: recipe.AspectRatio) -> bool:
    """Whether longer side / shorter side <= max_ratio. Source: paper; 3.0 is DataComp's."""
    return max(width_px, height_px) <= settings.max_ratio * min(width_px, height_px)


def keeps_min_side(width_px: int, height_px: int, settings: recipe.MinSide) -> bool:
    """Whether the shorter side >= min_px. Source: DataComp's basic filter."""
    return min(width_px, height_px) >= settings.min_px
