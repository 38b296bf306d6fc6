"""A pairsift rule in its own package: it drops blurred images. The threshold is our choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from pairsift import Rule, Settings

if TYPE_CHECKING:
    from pairsift import Sample


class SharpnessSettings(Settings):
    """The minimum variance of the Laplacian after a box blur of `blur_px` pixels."""

    only_decide = frozenset({"min_variance"})  # `blur_px` changes the column, the threshold does not

    min_variance: float = Field(50.0, ge=0.0)
    blur_px: int = Field(1, ge=1, le=15)


class SharpnessAnnotator:
    """Adds `sharpness_variance`."""

    def __init__(self, settings: SharpnessSettings) -> None:
        self._settings = settings

    def load(self) -> None:
        """Import OpenCV on the worker, not when a recipe is validated."""
        import cv2

        self._cv2 = cv2

    def columns(self, sample: Sample) -> dict[str, Any]:
        """Return the column of one sample. `sample.pixels` is RGB uint8 (height, width, 3)."""
        grey = self._cv2.cvtColor(sample.pixels, self._cv2.COLOR_RGB2GRAY)
        smooth = self._cv2.blur(grey, (self._settings.blur_px, self._settings.blur_px))
        return {"sharpness_variance": float(self._cv2.Laplacian(smooth, self._cv2.CV_64F).var())}


SHARPNESS = Rule(
    name="sharpness",
    stage="single_modality",
    settings=SharpnessSettings,
    summary="the variance of the Laplacian is at least 50",
    source="ours",
    columns={"sharpness_variance": "float64"},
    value="sharpness_variance",
    threshold="min_variance",
    keeps_if="at_least",
    annotator=SharpnessAnnotator,
    keeps=lambda annotation, settings: annotation.sharpness_variance >= settings.min_variance,
)
