"""The images for the benchmarks: the OpenStax pool next to the checkout if it exists, else the demo pool."""

from __future__ import annotations

import importlib.resources
import io
import itertools
import tarfile
from collections.abc import Iterable
from pathlib import Path

from pipeline.decoding.images import UndecodableImage, decode
from pipeline.sources.pool import list_shards
from pipeline.sources.webdataset import read_samples
from transforms.core.recipe import PoolSettings
from transforms.core.records import Sample

OPENSTAX = Path(__file__).parent.parent.parent / "shared" / "data" / "openstax_pool"
BOUNDS = PoolSettings()


def source() -> Path:
    """The folder of tars from which the images are read."""
    return OPENSTAX if OPENSTAX.is_dir() else Path(str(importlib.resources.files("pipeline") / "demo" / "pool"))


def pairs(count: int) -> list[Sample]:
    """The first `count` decodable JPEG pairs; they repeat from the start where the pool has fewer."""
    found = [
        sample
        for shard in list_shards(str(source()))
        for sample in itertools.islice(read_samples(shard, BOUNDS, "benchmark"), count)
        if isinstance(sample, Sample) and sample.image_bytes[:2] == b"\xff\xd8" and _decodable(sample)
    ]
    return list(itertools.islice(itertools.cycle(found), count))


def write_tars(folder: Path, samples: list[Sample], tars: int) -> Path:
    """Write the pairs to `tars` webdataset tars of equal size. Returns `folder`."""
    folder.mkdir(parents=True)
    share = len(samples) // tars
    for number in range(tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index, sample in enumerate(samples[number * share : (number + 1) * share]):
                key = f"{number:05d}{index:05d}"
                _add(tar, ((f"{key}.jpg", sample.image_bytes), (f"{key}.txt", sample.annotation.caption.encode())))
    return folder


def write_files(folder: Path, samples: list[Sample]) -> list[Path]:
    """Write each image to its own file. Returns the paths."""
    folder.mkdir(parents=True)
    paths = [folder / f"{index:06d}.jpg" for index in range(len(samples))]
    for path, sample in zip(paths, samples, strict=True):
        path.write_bytes(sample.image_bytes)
    return paths


def decoded(sample: Sample) -> Sample:
    """The sample with decoded pixels."""
    pixels, _ = decode(sample.image_bytes, BOUNDS.max_image_pixels)
    return Sample(sample.annotation, {}, b"", pixels)


def _decodable(sample: Sample) -> bool:
    try:
        decode(sample.image_bytes, BOUNDS.max_image_pixels, 64)
    except UndecodableImage:
        return False
    return True


def _add(tar: tarfile.TarFile, members: Iterable[tuple[str, bytes]]) -> None:
    for name, content in members:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
