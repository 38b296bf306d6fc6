"""Original sizes: which ones are believed (`original_size_px`), and what `min_side` drops because of one that is not.

- Rounding: originals of aspect ratios from 1 to 10, with the sizes that img2dataset's `no`, `keep_ratio` and
  `keep_ratio_largest` store: one side is set, and both are rounded after one scale. `border` and `center_crop` store a
  square, which says nothing of the original.
- Foreign sizes: the stored sizes of the same set, each with the original size of another picture.
- The pool of OpenStax pictures, written by img2dataset 1.47, with its json.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.rules.figures import Figure, Sources
from transforms.single_modality.image_shape import MinSideSettings, keeps_min_side, original_size_px

SHORT_SIDES = (150, 199, 200, 201, 320, 479, 679, 1000)
RATIOS = tuple(1 + step / 20 for step in range(181))  # 1 to 10
IMAGE_SIZES = (224, 256, 512)
POOL = "openstax_pool"

Size = tuple[int, int]


def measure(sources: Sources) -> list[Figure]:
    """The figures of `original_size_px`."""
    pairs = sorted(set(_stored_with_originals()))
    believed = sum(original_size_px(_sizes(original), stored) == original for stored, original in pairs)
    foreign = list(_foreign(pairs))
    wrong = sum(original_size_px(_sizes(original), stored) == original for stored, original in foreign)
    question = "sizes that would be stored otherwise believed"
    return [
        Figure("original_size", "rounding", "right sizes believed", believed, len(pairs), "1"),
        Figure("original_size", "rounding", question, wrong, len(foreign), "0"),
        *_of_pool(sources.data / POOL),
    ]


def _stored_with_originals() -> Iterator[tuple[Size, Size]]:
    for short, ratio, image_size in itertools.product(SHORT_SIDES, RATIOS, IMAGE_SIZES):
        long = round(short * ratio)
        for original in ((long, short), (short, long)):
            for scale in (1.0, image_size / short, image_size / long):
                yield (_scaled(original[0], scale), _scaled(original[1], scale)), original


def _scaled(side: int, scale: float) -> int:
    return max(1, round(side * scale))


def _foreign(pairs: list[tuple[Size, Size]]) -> Iterator[tuple[Size, Size]]:
    """Stored sizes, no squares, with an original that would be stored otherwise by more than half a px."""
    for index, (stored, _) in enumerate(pairs):
        original = pairs[index * 7919 % len(pairs)][1]
        width_px, height_px = stored[1] * original[0] / original[1], stored[0] * original[1] / original[0]
        if stored[0] != stored[1] and min(abs(width_px - stored[0]), abs(height_px - stored[1])) > 0.5:
            yield stored, original


def _sizes(original: Size) -> dict[str, int]:
    return {"original_width": original[0], "original_height": original[1]}


def _of_pool(folder: Path) -> list[Figure]:
    name, question = "OpenStax pool", "sizes of img2dataset believed"
    if not folder.is_dir():
        return [Figure("original_size", name, question, missing=f"{folder}", goal="1")]
    samples = [sample for tar in sorted(folder.glob("*.tar")) for sample in _samples(tar)]
    believed = [original_size_px(metadata, stored) is not None for metadata, stored in samples]
    settings = MinSideSettings()
    large = [
        (m, stored) for m, stored in samples if keeps_min_side(m["original_width"], m["original_height"], settings)
    ]
    dropped = sum(not keeps_min_side(*(original_size_px(m, stored) or stored), settings) for m, stored in large)
    return [
        Figure("original_size", name, question, sum(believed), len(believed), "1"),
        Figure("min_side", name, "originals of at least 200 px dropped", dropped, len(large), "0"),
    ]


def _samples(tar: Path) -> Iterator[tuple[dict[str, Any], Size]]:
    """The json and the stored size of each sample."""
    with tarfile.open(tar) as members:
        by_key: dict[str, dict[str, bytes]] = {}
        for member in members:
            key, _, suffix = member.name.partition(".")
            content = members.extractfile(member)
            if content is not None and suffix in ("jpg", "json"):
                by_key.setdefault(key, {})[suffix] = content.read()
                if len(by_key[key]) == 2:
                    yield _sample(by_key.pop(key))


def _sample(files: dict[str, bytes]) -> tuple[dict[str, Any], Size]:
    with Image.open(io.BytesIO(files["jpg"])) as image:
        return json.loads(files["json"]), image.size
