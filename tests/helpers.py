"""Helpers of the tests: small pictures and tars, and records with default values."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipeline.sources.pool import list_shards
from transforms.core.recipe import PoolSettings, Recipe, parse_recipe
from transforms.core.records import Annotation, Sample, Shard

DEMO_RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"
BOUNDS = PoolSettings()


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Return a smooth, colourful picture, a different one for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format_: str = "JPEG", **options: Any) -> bytes:
    """Return the picture as the bytes of a file."""
    out = io.BytesIO()
    image.save(out, format_, **options)
    return out.getvalue()


def jpeg(width: int = 96, height: int = 64, seed: int = 0) -> bytes:
    """Return a small JPEG file."""
    return encode(picture(width, height, seed), "JPEG", quality=90)


Members = list[tuple[str, bytes]]


def sample_members(
    key: str, caption: str = "a dog on a red bench", seed: int = 0, metadata: Mapping[str, Any] | None = None
) -> Members:
    """Return the three files of a complete sample."""
    content = json.dumps({} if metadata is None else dict(metadata)).encode()
    return [(f"{key}.jpg", jpeg(seed=seed)), (f"{key}.txt", caption.encode()), (f"{key}.json", content)]


def tar_bytes(members: Iterable[tuple[str, bytes] | tarfile.TarInfo], format_: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar of files, or of given headers without content, padded to records of 10,240 bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def member(name: str, type_: bytes, linkname: str = "") -> tarfile.TarInfo:
    """Return the header of a member that is not a regular file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type_, linkname
    return info


def write_pool(folder: Path, shards: Mapping[str, Iterable[tuple[str, bytes]]]) -> list[Shard]:
    """Write tars under `folder`, given by their relative path, and return the listed shards."""
    for name, members in shards.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar_bytes(members))
    return list_shards(str(folder))


def annotation(**columns: Any) -> Annotation:
    """Return an annotation that passes every rule of the demo recipe, with the given columns changed."""
    passing = Annotation(
        uid="0" * 32,
        shard="00000",
        key="k0",
        caption="a dog on a red bench",
        width_px=640,
        height_px=480,
        original_width_px=640,
        original_height_px=480,
        image_sha256="00" * 32,
        perceptual_hash="0" * 16,
        image_thumbnail=bytes(48),
        word_count=6,
        character_count=20,
        language="en",
        language_probability=0.9,
        pos_tags="DT NN IN DT JJ NN",
        face_area_share=0.0,
        pool_samples=1000,
        caption_image_count=1,
        flipped_clip_cosine=0.3,
        match_probability=0.9,
        digit_probability=0.1,
    )
    return passing.with_columns(**columns)


def whole_sample(seed: int = 0, **columns: Any) -> Sample:
    """Return a decoded sample."""
    content = jpeg(seed=seed)
    return Sample(annotation(**columns), {}, content, np.asarray(picture(seed=seed)))


def least_apart(positions: Iterable[tuple[Any, int]]) -> float:
    """Return the least distance between two positions of the same item; infinite if no item has two."""
    positions_of: dict[Any, list[int]] = defaultdict(list)
    for item, position in positions:
        positions_of[item].append(position)
    pairs = (pair for found in positions_of.values() for pair in itertools.pairwise(sorted(found)))
    return min((after - before for before, after in pairs), default=math.inf)


def uid(number: int) -> str:
    """Return the uid whose 128 bits are `number`."""
    return f"{number:032x}"


def settings(**changes: Any) -> dict[str, Any]:
    """Return the content of the demo recipe with changes as in `changed`."""
    return changed(DEMO_RECIPE, changes)


def changed(path: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a YAML file with `section__field=value` set; the value `...` removes a setting."""
    content = yaml.safe_load(path.read_text())
    for where, value in changes.items():
        *sections, name = where.split("__")
        target = content
        for section in sections:
            target = target[section]
        if value is ...:
            del target[name]
        else:
            target[name] = copy.deepcopy(value)
    return content


def recipe(**changes: Any) -> Recipe:
    """Return the demo recipe with changes as in `settings`."""
    return parse_recipe(settings(**changes), "test")
