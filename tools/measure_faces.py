"""Recall and false alarms of the face detectors that come with Python packages (docs/faces.md).

The rule drops images in which faces cover more than 0.4 of the area, so only large faces matter. The test images are
crops from photographs and paintings of the OpenStax pool around 150 faces, in which the face covers a known share. The
face boxes are in `openstax_faces.csv`: two of OpenCV's three frontal cascades agreed on each, and each was inspected.
scikit-image's LFW subset adds 100 tightly cropped faces and 100 crops without a face. Images without a known face are
the rest of the pool, and openclipart.

    python -m tools.measure_faces --pool OPENSTAX_POOL
"""

from __future__ import annotations

import argparse
import csv
import io
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skimage
from cv2.data import haarcascades
from PIL import Image
from skimage.feature import Cascade

from tools.openclipart import Picture, load_rgb, unit
from transforms.single_modality import faces

SHARES = (0.2, 0.3, 0.5, 0.7, 0.9)
CLIPART_SHARE = 0.09  # of the 8,000 images
POOL_SHARE = 0.5

Found = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Candidate:
    """A detector under test, in the form that `faces.detect` takes."""

    label: str
    side: int
    find: Callable[[np.ndarray], Found]


def haar(name: str, side: int, border: float, neighbours: int, step: float = 1.1) -> Candidate:
    classifier = cv2.CascadeClassifier(f"{haarcascades}haarcascade_frontalface_{name}.xml")
    pad, smallest = round(border * side), side // 5

    def find(rgb: np.ndarray) -> Found:
        grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        grey = cv2.copyMakeBorder(grey, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        found = classifier.detectMultiScale(grey, step, neighbours, minSize=(smallest, smallest))
        return [(x - pad, y - pad, w, h) for x, y, w, h in found]

    label = f"Haar {name}, {side} px, border {border}, {neighbours} neighbours, step {step}"
    return Candidate(label, side, find)


def lbp(side: int, border: float, neighbours: int) -> Candidate:
    folder = Path(skimage.__file__).parent / "data"
    cascade = Cascade(str(folder / "lbpcascade_frontalface_opencv.xml"))
    pad = round(border * side)

    def find(rgb: np.ndarray) -> Found:
        grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        grey = cv2.copyMakeBorder(grey, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        found = cascade.detect_multi_scale(
            grey, scale_factor=1.1, step_ratio=1, min_size=(side // 5, side // 5),
            max_size=(min(grey.shape), min(grey.shape)), min_neighbor_number=neighbours,
        )  # fmt: skip
        return [(f["c"] - pad, f["r"] - pad, f["width"], f["height"]) for f in found]

    return Candidate(f"LBP, {side} px, border {border}, {neighbours} neighbours", side, find)


def pool_pictures(pool: Path) -> dict[str, np.ndarray]:
    """All images of the pool by member name; identical images occur only once."""
    pictures, seen = {}, set()
    for tar in sorted(pool.glob("*.tar")):
        with tarfile.open(tar) as members:
            for member in members:
                if not member.name.endswith((".jpg", ".png", ".webp")):
                    continue
                file = members.extractfile(member)
                assert file is not None
                rgb = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                small = cv2.resize(rgb, (8, 8), interpolation=cv2.INTER_AREA).tobytes()
                if small not in seen:
                    seen.add(small)
                    pictures[member.name] = rgb
    return pictures


def cut(rgb: np.ndarray, box: Sequence[float], share: float, angle: float, seed: str) -> np.ndarray | None:
    """A square crop in which the face box covers `share` of the area; None where it does not fit into the image."""
    height, width = rgb.shape[:2]
    face = (box[2] - box[0]) * width
    side = face / share**0.5
    if side > min(height, width) or face < 40:
        return None
    centre = (box[0] + box[2]) / 2 * width, (box[1] + box[3]) / 2 * height
    if angle:
        turn = cv2.getRotationMatrix2D(centre, angle, 1)
        rgb = cv2.warpAffine(rgb, turn, (width, height), borderMode=cv2.BORDER_REPLICATE)
    left = centre[0] - face / 2 - (side - face) * (0.3 + 0.4 * unit(f"x/{seed}"))
    top = centre[1] - face / 2 - (side - face) * (0.3 + 0.4 * unit(f"y/{seed}"))
    x, y = int(min(max(left, 0), width - side)), int(min(max(top, 0), height - side))
    return rgb[y : y + int(side), x : x + int(side)]


def picture_sets(pool: Path, openclipart: Path) -> dict[str, list[np.ndarray]]:
    pictures = pool_pictures(pool)
    with open(Path(__file__).with_name("openstax_faces.csv"), newline="") as file:
        boxes = [(r["member"], [float(r[k]) for k in ("x0", "y0", "x1", "y1")]) for r in csv.DictReader(file)]

    def cuts(share: float, angle: float = 0) -> list[np.ndarray]:
        made = (cut(pictures[name], box, share, angle, f"{name}/{box}") for name, box in boxes)
        return [rgb for rgb in made if rgb is not None]

    sets = {f"face {share}": cuts(share) for share in SHARES}
    sets |= {f"face 0.7, turned {angle}": cuts(0.7, angle) for angle in (10, 20, 30)}
    lfw = np.load(Path(skimage.__file__).parent / "data" / "lfw_subset.npy")
    large = [
        cv2.cvtColor(
            cv2.resize((grey * 255).astype(np.uint8), (256, 256), interpolation=cv2.INTER_CUBIC),
            cv2.COLOR_GRAY2RGB,
        )
        for grey in lfw
    ]
    sets |= {"LFW faces": large[:100], "LFW others": large[100:]}
    known = {name for name, _ in boxes}
    sets["pool others"] = [rgb for name, rgb in pictures.items() if name not in known and unit(name) < POOL_SHARE]
    names = sorted(p.relative_to(openclipart / "png").with_suffix("").as_posix()
                   for p in (openclipart / "png").rglob("*.png"))  # fmt: skip
    drawn = (load_rgb(openclipart, Picture(n, "", "", (), "")) for n in names if unit(n) < CLIPART_SHARE)
    sets["openclipart"] = [np.asarray(image) for image in drawn if image is not None]
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart"))
    parser.add_argument("--max-share", type=float, default=0.4)
    args = parser.parse_args()

    cv2.setNumThreads(1)
    sets = picture_sets(args.pool, args.openclipart)
    print({name: len(pictures) for name, pictures in sets.items()}, flush=True)
    candidates = [
        haar("alt2", 128, 0.25, 5),
        haar("alt2", 128, 0.25, 3),
        haar("alt2", 128, 0, 5),
        haar("alt2", 128, 0.25, 5, 1.2),
        haar("alt2", 192, 0.25, 5),
        haar("alt", 128, 0.25, 5),
        haar("default", 128, 0.25, 5),
        lbp(128, 0.25, 3),
    ]
    for candidate in candidates:
        print(candidate.label)
        total, seconds = 0, 0.0
        for name, pictures in sets.items():
            start = time.process_time()
            shares = [faces.union_area(faces.detect(candidate, rgb)) for rgb in pictures]
            seconds += time.process_time() - start
            total += len(pictures)
            above = sum(share > args.max_share for share in shares)
            found = [share for share in shares if share > 0]
            median = np.median(found) if found else 0
            print(f"  {name:20} above {args.max_share}: {above:4} = {above / len(shares):.3f}"
                  f"   any face: {len(found) / len(shares):.3f}   median share: {median:.2f}",
                  flush=True)  # fmt: skip
        print(f"  {1000 * seconds / total:.1f} ms of one core per image", flush=True)


if __name__ == "__main__":
    main()
