"""Recall and false drops of `face_area` for pools without face boxes, and the table its settings were chosen by.

The labelled faces (`sets/faces.csv`) are 164 faces of 136 Flickr8k photographs. All pictures of a subset of 1,000 were
looked at. YuNet (320 px) proposed boxes, which were accepted, redrawn or completed by eye.
Each face is cropped so that its box covers a known share of the crop. A hash of the picture's name splits the set:
settings were chosen on one half, and `python -m benchmarks.rules` reports the other.

    python -m benchmarks.rules --rule face_area
    python -m benchmarks.rules.faces            # the choice: input side and least score, on the other half
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from benchmarks.rules.figures import SETS, Figure, Sources
from tools.openclipart import unit
from transforms.single_modality import faces
from transforms.single_modality.faces import FaceAreaSettings, FaceDetector

SHARES = (0.2, 0.3, 0.5, 0.7, 0.9)
TURNED = ((-25, 0.6), (25, 0.6))  # degrees, share
LEAST_FACE_PX = 20  # in Flickr8k's pictures of 112 px; smaller faces are too blurred in a crop
DEMO_POOL = Path(__file__).parents[2] / "pipeline" / "demo"
SIDES_PX = (48, 64, 96, 128, 160)
SCORES = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Face:
    """A labelled face: the picture's name, its original size in px, and the box as shares of it."""

    picture: str
    width_px: int
    height_px: int
    box: tuple[float, float, float, float]

    @property
    def chooses(self) -> bool:
        """Whether it belongs to the half that settings are chosen on."""
        return is_choosing(self.picture)


def is_choosing(picture: str) -> bool:
    """Whether a picture belongs to the half that settings are chosen on."""
    return int(hashlib.sha256(picture.encode()).hexdigest(), 16) % 2 == 0


def labelled() -> list[Face]:
    """The labelled faces."""
    with open(SETS / "faces.csv", newline="") as file:
        return [
            Face(row["picture"], int(row["width_px"]), int(row["height_px"]),
                 (float(row["x0"]), float(row["y0"]), float(row["x1"]), float(row["y1"])))
            for row in csv.DictReader(file)
        ]  # fmt: skip


def names(file: str) -> frozenset[str]:
    """The words of a file of `sets`."""
    return frozenset((SETS / file).read_text().split())


def pictures(tar: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and RGB pixels of a tar's readable pictures."""
    with tarfile.open(tar) as members:
        for member in members:
            if not member.name.endswith((".jpg", ".png", ".webp")):
                continue
            file = members.extractfile(member)
            assert file is not None
            try:
                yield member.name, np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
            except (OSError, ValueError):
                continue  # the demo pool has truncated pictures


def crop(rgb: np.ndarray, face: Face, share: float, degrees: float = 0) -> np.ndarray | None:
    """The part of a picture, of the shape of the face's box, that the box covers to `share`; None if it is too large.

    With `degrees`, the picture is turned around the face first.
    """
    height, width = rgb.shape[:2]
    x0, y0, x1, y1 = np.array(face.box) * (width, height, width, height)
    if degrees:
        turn = cv2.getRotationMatrix2D(((x0 + x1) / 2, (y0 + y1) / 2), degrees, 1)
        rgb = cv2.warpAffine(rgb, turn, (width, height), borderMode=cv2.BORDER_REPLICATE)
    w, h = (x1 - x0) / math.sqrt(share), (y1 - y0) / math.sqrt(share)
    if w > width or h > height:
        return None
    left = x0 - (w - (x1 - x0)) * (0.3 + 0.4 * unit(f"x/{face}"))
    top = y0 - (h - (y1 - y0)) * (0.3 + 0.4 * unit(f"y/{face}"))
    x, y = round(min(max(left, 0), width - w)), round(min(max(top, 0), height - h))
    return rgb[y : y + round(h), x : x + round(w)]


def crops(tar: Path, *, choosing: bool) -> dict[str, list[np.ndarray]]:
    """The crops of one half of the labelled faces, by what they show."""
    by_picture: dict[str, list[Face]] = {}
    for face in labelled():
        if face.chooses == choosing:
            by_picture.setdefault(face.picture, []).append(face)
    made: dict[str, list[np.ndarray | None]] = {}
    for name, squeezed in pictures(tar):
        for face in by_picture.get(Path(name).name, ()):
            scale = max(squeezed.shape) / max(face.width_px, face.height_px)
            size = round(face.width_px * scale), round(face.height_px * scale)
            if (face.box[3] - face.box[1]) * size[1] < LEAST_FACE_PX:
                continue
            rgb = cv2.resize(squeezed, size, interpolation=cv2.INTER_AREA)
            for share in SHARES:
                made.setdefault(f"face of share {share}", []).append(crop(rgb, face, share))
            for degrees, share in TURNED:
                made.setdefault("face of share 0.6, turned by 25 degrees", []).append(crop(rgb, face, share, degrees))
    return {shown: [rgb for rgb in found if rgb is not None] for shown, found in made.items()}


def is_dropped(detector: FaceDetector, rgb: np.ndarray, side_px: int = faces.SIDE_PX) -> bool:
    """Whether the default threshold drops the picture."""
    share = faces.union_area(faces.detect(detector, rgb, side_px))
    return not faces.keeps(share, FaceAreaSettings().max_share)


def recall(sources: Sources, detector: FaceDetector) -> list[Figure]:
    """How many crops are dropped, for each share."""
    set_name = "Flickr8k faces, held-out half"
    tar = flickr8k(sources)
    if not tar.exists():
        return [Figure("face_area", set_name, "crops dropped", goal=">= 0.9", missing=str(tar))]
    found = []
    for shown, cut in sorted(crops(tar, choosing=False).items()):
        goal = "" if shown.endswith(("0.2", "0.3")) else ">= 0.9"
        dropped = sum(is_dropped(detector, rgb) for rgb in cut)
        found.append(Figure("face_area", set_name, f"{shown}: dropped", dropped, len(cut), goal))
    return found


def flickr8k(sources: Sources) -> Path:
    """The tar of Flickr8k's pictures of 112 px."""
    return sources.data / "proof" / "flickr8k_112px.tar"


def without_people(sources: Sources) -> frozenset[str]:
    """The Flickr8k pictures whose captions contain no word for a person."""
    words, with_captions, with_people = names("person_words.txt"), set(), set()
    with open(sources.data / "proof" / "flickr8k_rows.tsv", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["verdict"] == "match":
                with_captions.add(row["image"])
                spoken = "".join(c if c.isalpha() else " " for c in row["caption"].lower()).split()
                if words & set(spoken):
                    with_people.add(row["image"])
    return frozenset(with_captions - with_people)


def false_drops(sources: Sources, detector: FaceDetector) -> list[Figure]:
    """How many pictures are dropped in which no living face covers more than the threshold."""
    large, goal = names("large_faces.txt"), "<= 0.001"
    question = "pictures without a large living face: dropped"

    def figure(set_name: str, question: str, found: Iterable[tuple[str, np.ndarray]], goal: str = "") -> Figure:
        verdicts = [is_dropped(detector, rgb) for name, rgb in found if Path(name).name not in large]
        return Figure("face_area", set_name, question, sum(verdicts), len(verdicts), goal)

    kinds = demo_kinds()
    drawn = (
        (name, rgb) for tar in sorted((DEMO_POOL / "pool").glob("*.tar"))
        for name, rgb in pictures(tar) if kinds[tar.name, Path(name).stem] != "face"
    )  # fmt: skip
    found = [figure("demo pool, clip art", "drawings dropped", drawn)]
    tar = flickr8k(sources)
    if not tar.exists():
        return [*found, Figure("face_area", "Flickr8k", question, goal=goal, missing=str(tar))]
    chosen = without_people(sources)
    alone = ((name, rgb) for name, rgb in pictures(tar) if Path(name).name in chosen)
    openstax = (item for tar in sorted((sources.data / "openstax_pool").glob("*.tar")) for item in pictures(tar))
    cifar = pictures(sources.data / "proof" / "cifar10_test_32px.tar")
    return [
        *found,
        figure("Flickr8k, captions name no person", "photographs dropped", alone, goal),
        figure("Flickr8k, all", question, pictures(tar), goal),
        figure("OpenStax pool", question, openstax),
        figure("CIFAR-10 test, 32 px", "photographs dropped", cifar),
    ]


def demo_kinds() -> dict[tuple[str, str], str]:
    """The planted kind of each sample of the demo pool, by shard and key."""
    with open(DEMO_POOL / "labels.csv", newline="") as file:
        return {(row["shard"], row["key"]): row["kind"] for row in csv.DictReader(file)}


def measure(sources: Sources) -> list[Figure]:
    """The figures of the default settings."""
    detector = faces.load_detector(FaceAreaSettings())
    return [*recall(sources, detector), *false_drops(sources, detector)]


def main() -> None:
    """Print the choice of input side and least score, on the half of the labelled faces that is not reported."""
    tar = flickr8k(Sources())
    shown = crops(tar, choosing=True)
    chosen = without_people(Sources())
    alone = [rgb for name, rgb in pictures(tar) if Path(name).name in chosen and is_choosing(Path(name).name)]
    columns = sorted(shown)
    print("| side in px | least score |", " | ".join(columns), f"| no people ({len(alone)}) | ms |")
    print("|---" * (len(columns) + 4) + "|")
    for side_px in SIDES_PX:
        for min_score in SCORES:
            detector = faces.load_detector(FaceAreaSettings(min_score=min_score))
            start = time.process_time()
            shares = [np.mean([is_dropped(detector, rgb, side_px) for rgb in shown[column]]) for column in columns]
            false = sum(is_dropped(detector, rgb, side_px) for rgb in alone)
            milliseconds = 1000 * (time.process_time() - start) / (len(alone) + sum(map(len, shown.values())))
            cells = " | ".join(f"{share:.2f}" for share in shares)
            print(f"| {side_px} | {min_score} | {cells} | {false} | {milliseconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
