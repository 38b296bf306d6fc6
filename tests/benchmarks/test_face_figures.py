"""The figures of `face_area` on what is committed: labelled boxes and the demo pool's drawings."""

import numpy as np
import pytest

from benchmarks.rules import faces
from benchmarks.rules.faces import DEMO_POOL, Face
from benchmarks.rules.figures import Sources
from transforms.single_modality.faces import FaceAreaSettings, load_detector


def test_labelled_boxes_lie_in_their_pictures():
    found = faces.labelled()
    assert len(found) == 164
    assert len({face.picture for face in found}) == 136
    assert all(0 <= face.box[0] < face.box[2] <= 1 and 0 <= face.box[1] < face.box[3] <= 1 for face in found)
    assert sum(face.chooses for face in found) == 99


@pytest.mark.parametrize("share", faces.SHARES)
def test_the_box_covers_its_share_of_the_crop(share):
    face = Face("a", 400, 300, (0.5, 0.25, 0.625, 0.5))
    rgb = np.zeros((300, 400, 3), np.uint8)
    rgb[75:150, 200:250] = 255
    assert (faces.crop(rgb, face, share) > 0).mean() == pytest.approx(share, rel=0.05)


def test_a_crop_larger_than_the_picture_is_none():
    assert faces.crop(np.zeros((300, 400, 3), np.uint8), Face("a", 400, 300, (0, 0, 0.6, 0.9)), 0.5) is None


def test_absent_sets_are_named(tmp_path):
    detector = load_detector(FaceAreaSettings())
    (figure,) = faces.recall(Sources(tmp_path), detector)
    assert "flickr8k_112px.tar" in figure.missing


def test_drawings_dropped_in_the_first_tar_of_the_demo_pool():
    detector = load_detector(FaceAreaSettings())
    tar, kinds = DEMO_POOL / "pool" / "00000.tar", faces.demo_kinds()
    dropped = {name.split(".")[0]: kinds[tar.name, name.split(".")[0]]
               for name, rgb in faces.pictures(tar) if faces.is_dropped(detector, rgb)}  # fmt: skip
    assert {key for key, kind in dropped.items() if kind != "face"} == {"000000094", "000000110"}
    assert sum(kind == "face" for kind in dropped.values()) == sum(
        kind == "face" for (shard, _), kind in kinds.items() if shard == tar.name
    )
