"""Near-duplicates: which copies of a picture are found, and how many of the pairs that are found are copies.

Recall is measured on copies that are made here: encoded again, rescaled, cropped, and so on. The method and its
settings were chosen on pictures that come first in an order by hash, and on one half of the others; the figures are of
the last ones of the other half. Precision is measured on all pairs that the rule finds in pools as they are. Each was
labelled by eye (sets/near_duplicates.tsv). Samples with equal bytes count once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from benchmarks.rules.figures import SETS, Figure, Sources
from pipeline.decoding.images import UndecodableImage, decode
from pipeline.graphs import DRAFT_SIDE_PX
from transforms.single_modality.hash_neighbours import bands, hashes_of, signatures_of
from transforms.single_modality.near_duplicate import NearDuplicateSettings
from transforms.single_modality.perceptual_hash import perceptual_hash, small_copy, steps_apart, steps_of, thumbnail

RULE = "near_duplicate"
PICTURES = 100  # of each set, for the copies
MAX_PIXELS, MAX_FILE_PIXELS = 10**8, 10**6
DEMO_POOL = Path(__file__).parents[2] / "pipeline" / "demo" / "pool"
PATTERNS = {
    "OpenStax pool": "openstax_pool/*.tar",
    "Flickr8k, 112 px": "proof/flickr8k_112px.tar",
    "openclipart": "openclipart/**/*.png",
}
ONLY_PAIRS = ("openclipart",)  # its pictures are those of the demo pool
LABELS = SETS / "near_duplicates.tsv"

Copy = Callable[[Image.Image], bytes]


def encoded(image: Image.Image, format_: str = "JPEG", quality: int = 85) -> bytes:
    """The bytes of an image file."""
    out = io.BytesIO()
    image.save(out, format_, **({} if format_ == "PNG" else {"quality": quality}))
    return out.getvalue()


def _rescaled(factor: float) -> Copy:
    def copy(image: Image.Image) -> bytes:
        size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        return encoded(image.resize(size, Image.Resampling.BICUBIC))

    return copy


def _cropped(share: float, sides: str = "ltrb") -> Copy:
    def copy(image: Image.Image) -> bytes:
        across, down = round(image.width * share), round(image.height * share)
        cut = [across * ("l" in sides), down * ("t" in sides), across * ("r" in sides), down * ("b" in sides)]
        return encoded(image.crop((cut[0], cut[1], image.width - cut[2], image.height - cut[3])))

    return copy


def _with_gamma(gamma: float) -> Copy:
    table = [round(255 * (level / 255) ** gamma) for level in range(256)] * 3
    return lambda image: encoded(image.point(table))


def _enhanced(kind: type[ImageEnhance.Color | ImageEnhance.Brightness], factor: float) -> Copy:
    return lambda image: encoded(kind(image).enhance(factor))


def _with_watermark(image: Image.Image) -> bytes:
    marked = image.copy()
    draw, (width, height) = ImageDraw.Draw(marked), image.size
    draw.rectangle((width * 0.80, height * 0.93, width * 0.98, height * 0.98), fill="white")
    draw.text((width * 0.81, height * 0.93), "(c) photo", fill="black")
    return encoded(marked)


def _with_border(image: Image.Image) -> bytes:
    return encoded(ImageOps.expand(image, max(1, round(min(image.size) * 0.02)), "white"))


COPIES: dict[str, list[Copy]] = {
    "encoded again (JPEG 30 to 95, WebP, PNG)": [
        *(lambda image, quality=quality: encoded(image, "JPEG", quality) for quality in (30, 50, 75, 95)),
        *(lambda image, quality=quality: encoded(image, "WEBP", quality) for quality in (50, 80)),
        lambda image: encoded(image, "PNG"),
    ],
    "rescaled (0.25 to 2)": [_rescaled(factor) for factor in (0.25, 0.5, 0.75, 1.5, 2.0)],
    "cropped by 1 % on one side": [_cropped(0.01, side) for side in "lb"],
    "cropped by 1 % on each side": [_cropped(0.01)],
    "cropped by 2 % on each side": [_cropped(0.02)],
    "cropped by 5 % on each side": [_cropped(0.05)],
    "gamma 0.8 and 1.25": [_with_gamma(0.8), _with_gamma(1.25)],
    "brighter by 15 %": [_enhanced(ImageEnhance.Brightness, 1.15)],
    "less saturated by 30 %": [_enhanced(ImageEnhance.Color, 0.7)],
    "a small watermark": [_with_watermark],
    "a border of 2 %": [_with_border],
}
GOALS = dict.fromkeys(list(COPIES)[:4], ">= 0.98")


def is_chosen_on(name: str) -> bool:
    """Whether a picture is of the half that the settings were chosen on."""
    return hashlib.sha256(name.encode()).digest()[0] < 128


def pictures(sources: Sources, name: str) -> Iterator[tuple[str, bytes]]:
    """The images of a set by name, those of equal bytes once; none if the set is absent."""
    folder, pattern = (DEMO_POOL, "*.tar") if name == "demo pool" else (sources.data, PATTERNS[name])
    seen: set[bytes] = set()
    for path in sorted(folder.glob(pattern)):
        own = path.relative_to(folder).with_suffix("").as_posix()
        for key, content in _members(path) if path.suffix == ".tar" else _file(path):
            digest = hashlib.sha256(content).digest()
            if digest not in seen:
                seen.add(digest)
                yield own + key, content


def _file(path: Path) -> list[tuple[str, bytes]]:
    """The picture of a file; none if it is large, or one of the 1,375 star polygons that a program drew."""
    try:
        with Image.open(path) as image:
            is_used = image.width * image.height <= MAX_FILE_PIXELS and "stars" not in path.parts
    except Image.DecompressionBombError:
        is_used = False
    return [("", path.read_bytes())] if is_used else []


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            stem, _, suffix = member.name.rpartition(".")
            content = tar.extractfile(member)
            if content is not None and suffix in ("jpg", "jpeg", "png", "webp"):
                yield f"/{stem}", content.read()


def signature(content: bytes) -> bytes | None:
    """The signature of an image file as stage 1 computes it; None if it cannot be decoded."""
    try:
        pixels, _ = decode(content, MAX_PIXELS, DRAFT_SIDE_PX)
    except UndecodableImage:
        return None
    small = small_copy(pixels)
    hashes = np.array([int(perceptual_hash(small), 16)], np.uint64)
    return signatures_of(hashes, np.array([thumbnail(small)], "S48")).tobytes()


def _order(name: str) -> bytes:
    return hashlib.sha256(f"{name.rpartition('/')[2]}.jpg".encode()).digest()


class Distances:
    """Of pairs of signatures: whether a band is equal, the bits and the steps by which they differ."""

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        one, other = (np.array(column, "S56") for column in zip(*pairs, strict=True))
        hashes = hashes_of(one), hashes_of(other)
        self.meet = np.any([a == b for a, b in zip(*map(bands, hashes), strict=True)], axis=0)
        self.bits = np.bitwise_count(hashes[0] ^ hashes[1])
        self.steps = steps_apart(*(steps_of(column.view(np.uint8).reshape(-1, 56)[:, 8:]) for column in (one, other)))

    def within(self, limits: NearDuplicateSettings) -> np.ndarray:
        """Whether each pair is one of near-duplicates: bool (n,)."""
        return self.meet & (self.bits <= limits.max_hamming) & (self.steps <= limits.max_cell_steps)


@cache
def copies_of(sources: Sources, name: str, chosen_on: bool) -> dict[str, Distances]:
    """The distances of each kind of copy to its original, for the first pictures of one half of a set."""
    half = [(key, content) for key, content in pictures(sources, name) if is_chosen_on(key) == chosen_on]
    half.sort(key=lambda picture: _order(picture[0]), reverse=True)
    pairs: dict[str, list[tuple[bytes, bytes]]] = {kind: [] for kind in COPIES}
    for _, content in half[:PICTURES]:
        own = signature(content)
        if own is not None:
            image = Image.fromarray(decode(content, MAX_PIXELS)[0])
            for kind, made in COPIES.items():
                pairs[kind] += [(own, found) for copy in made if (found := signature(copy(image)))]
    return {kind: Distances(found) for kind, found in pairs.items() if found}


def pairs_of(sources: Sources, name: str, limits: NearDuplicateSettings) -> list[tuple[str, str]]:
    """All pairs of near-duplicates of a set, each picture compared with all others."""
    known = {key: found for key, content in pictures(sources, name) if (found := signature(content))}
    if len(known) < 2:
        return []
    keys, hashes = list(known), hashes_of(np.array(list(known.values()), "S56"))
    close = [
        (keys[row], keys[other])
        for row in range(len(keys) - 1)
        for other in row + 1 + np.flatnonzero(np.bitwise_count(hashes[row + 1 :] ^ hashes[row]) <= limits.max_hamming)
    ]
    if not close:
        return []
    within = Distances((known[one], known[other]) for one, other in close).within(limits)
    return [pair for pair, is_near in zip(close, within, strict=True) if is_near]


def labels() -> dict[tuple[str, str, str], bool]:
    """Whether pairs show the same picture, by set and names."""
    with LABELS.open() as file:
        rows = csv.reader(file, delimiter="\t")
        return {(name, one, other): verdict == "same" for name, one, other, verdict in itertools.islice(rows, 1, None)}


def measure(sources: Sources) -> list[Figure]:
    """The figures of `near_duplicate` with its defaults, on the half that they were not chosen on."""
    limits = NearDuplicateSettings()
    figures = []
    for name in ("demo pool", *PATTERNS):
        if name != "demo pool" and not any(sources.data.glob(PATTERNS[name])):
            missing = f"{sources.data / PATTERNS[name]} (docs/near-duplicates.md)"
            figures.append(Figure(RULE, name, "copies found", missing=missing, goal=">= 0.98"))
            continue
        copies = {} if name in ONLY_PAIRS else copies_of(sources, name, chosen_on=False)
        for kind, distances in copies.items():
            within = distances.within(limits)
            figures.append(Figure(RULE, name, f"found: {kind}", int(within.sum()), len(within), GOALS.get(kind, "")))
        figures.append(_precision(sources, name, limits))
    return figures


def _precision(sources: Sources, name: str, limits: NearDuplicateSettings) -> Figure:
    question, known = "pairs found that show the same picture", labels()
    found = [(name, one, other) for one, other in pairs_of(sources, name, limits)]
    unknown = [pair for pair in found if pair not in known]
    if unknown or not found:
        missing = (
            f"labels of {len(unknown)} of {len(found)} pairs, e.g. {unknown[0][1:]}" if unknown else "no pair was found"
        )
        return Figure(RULE, name, question, missing=missing, goal=">= 0.98")
    return Figure(RULE, name, question, sum(known[pair] for pair in found), len(found), ">= 0.98")
