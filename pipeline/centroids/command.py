"""`pairsift centroids`: computes task centroids, the file for the setting `cids.tasks`, from images of the tasks."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.centroids.images import NoImages, Picture, Unreadable, list_images, read_images
from pipeline.decoding.tfio_decoder import HOW_TO_INSTALL, TfioDecoder
from pipeline.output_folder.manifest import clip_identity
from pipeline.runs.claim import check_path
from transforms.core.errors import UsageError
from transforms.core.recipe import CrossModalitySettings, Recipe
from transforms.core.records import Annotation, Sample, SampleBatch, Shard
from transforms.distribution_alignment.cids import MODEL_KEY
from transforms.distribution_alignment.clusters import train_centroids
from transforms.distribution_alignment.vectors import unit_rows
from transforms.models.clip import ClipHandler
from transforms.models.precision import resolve
from transforms.models.prepare import load_prepare
from transforms.models.weights import model_identity, pinned
from transforms.storage import files

_NAME = re.compile(r"(?!__)[A-Za-z0-9_-]+")  # used as a key of the .npz and the recipe, and in a column name
_ITERATIONS = 20  # of k-means; the default of faiss is 25


@dataclasses.dataclass(frozen=True)
class TaskCentroids:
    """The centroids of a task, float32 (m, d) with unit rows, and the numbers of its images."""

    name: str
    images: int
    unreadable: int
    centroids: np.ndarray

    @property
    def summary(self) -> dict[str, Any]:
        """The name, and the numbers of images, of unreadable images and of centroids."""
        counts = {"images": self.images, "unreadable": self.unreadable, "centroids": len(self.centroids)}
        return {"name": self.name, **counts}


def make_centroids(
    recipe: Recipe,
    sources: Sequence[str],
    output: str,
    centroids_per_task: int,
    tfio_python: str | None,
    report_unreadable: Callable[[Unreadable], None],
    report_done: Callable[[TaskCentroids], None],
) -> None:
    """Embed the images of each of `sources` (NAME=IMAGES) with the recipe's CLIP, and write centroids to `output`.

    The embeddings are bit-identical to those of stage 2: of the unflipped image if the recipe sets `score_unflipped`,
    otherwise of the flipped one. The centroids are computed by spherical k-means, at most `centroids_per_task` per
    task. Images are ordered by the hash of their content, so the result does not depend on names, folders or tars.

    Raises UsageError before reading any image if an input is missing, NoTfio for a file that needs tensorflow-io if it
    is not installed, and ValueError if no image of a task can be read. Nothing is written in these cases.
    """
    paths = _by_name(sources)
    check_path("--output", output)
    if output.endswith("/") or (not files.in_cloud_storage(output) and Path(output).is_dir()):
        raise UsageError(f"--output: {output}: is a folder; give a file, for example {output.rstrip('/')}/tasks.npz")
    if tfio_python is not None and shutil.which(tfio_python) is None:
        raise UsageError(f"--tfio-python: {tfio_python}: is not a program; {HOW_TO_INSTALL}")
    try:
        listed = {name: list_images(path) for name, path in paths.items()}
    except NoImages as error:
        raise UsageError(str(error)) from error
    embedder = _Embedder(recipe.cross_modality)

    centroids = {}
    with TfioDecoder(tfio_python, recipe.pool.max_image_pixels) as decoder:
        for name, images in listed.items():
            pictures = read_images(images, recipe.pool, decoder)
            task = _task(name, embedder(pictures), centroids_per_task, recipe.seed, report_unreadable)
            centroids[name] = task.centroids
            report_done(task)
    write_tasks(output, centroids, embedder.identity)


def write_tasks(path: str, centroids: Mapping[str, np.ndarray], identity: Mapping[str, Any]) -> None:
    """Write task centroids and the identity of their model as .npz. Equal content gives identical bytes."""
    entries = {**centroids, MODEL_KEY: np.array(json.dumps(identity, sort_keys=True))}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:  # np.savez rejects a task named `file`
        for name, array in sorted(entries.items()):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as entry:  # the default date is constant
                np.lib.format.write_array(entry, array, allow_pickle=False)
    files.write_bytes(path, content.getvalue())


def _by_name(sources: Iterable[str]) -> dict[str, str]:
    """Return the path of the images by task name. Raises UsageError."""
    paths: dict[str, str] = {}
    for source in sources:
        name, separator, path = source.partition("=")
        if not separator or not path:
            raise UsageError(f"{source}: allowed: NAME=IMAGES, for example digits=/data/mnist")
        if not _NAME.fullmatch(name):
            raise UsageError(f"{source}: the name {name!r}: allowed: letters, digits, _ and -, not starting with __")
        if name in paths:
            raise UsageError(f"{source}: the name {name} is used twice; give each task a different name")
        check_path(name, path)
        paths[name] = path
    return paths


def _task(
    name: str,
    embedded: Iterator[_Row | Unreadable],
    count: int,
    seed: int,
    report_unreadable: Callable[[Unreadable], None],
) -> TaskCentroids:
    rows, unreadable = [], 0
    for row in embedded:
        if isinstance(row, Unreadable):
            unreadable += 1
            report_unreadable(row)
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"{name}: none of its {unreadable} images can be read; a task needs at least one")
    rows.sort()
    units = unit_rows(np.frombuffer(b"".join(row.embedding for row in rows), "<f2").reshape(len(rows), -1))
    return TaskCentroids(name, len(rows), unreadable, train_centroids(units, count, _ITERATIONS, seed))


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class _Row:
    """The identity of a picture, and its embedding as little-endian fp16 bytes, as in the tables of stage 2."""

    identity: str
    embedding: bytes


class _Embedder:
    """Embeds images with the CLIP model of stage 2. Raises UsageError if the model cannot be loaded."""

    def __init__(self, settings: CrossModalitySettings) -> None:
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                "recipe: cross_modality.device is cuda, but this machine has no GPU; use a machine with a GPU, or set "
                "the device to cpu"
            )
        alone = settings.model_copy(update={"image_text_matching": None, "digit": None})
        try:
            settled = pinned(alone, fetch=True)
            self.identity = clip_identity(settled, model_identity(settled.flipped_clip))
            self._prepare = load_prepare(settled)
        except (OSError, ValueError, LookupError) as error:
            raise UsageError(f"recipe: {error}") from error
        precision = resolve(settled.precision, settled.device)
        self._handler = ClipHandler(settled.flipped_clip, settled.device, precision)
        self._model = self._handler.load_model()
        self._batch_size = settled.flipped_clip.batch_size

    def __call__(self, pictures: Iterable[Picture | Unreadable]) -> Iterator[_Row | Unreadable]:
        """Yield the row of each picture. At most one batch is in memory."""
        prepared = (found if isinstance(found, Unreadable) else self._prepared(found) for found in pictures)
        while batch := list(itertools.islice(prepared, self._batch_size)):
            yield from (found for found in batch if isinstance(found, Unreadable))
            yield from self._rows(tuple(found for found in batch if isinstance(found, Sample)))

    def _prepared(self, picture: Picture) -> Sample:
        named = Annotation(uid=picture.identity, shard="", key=picture.name, caption="")
        return self._prepare(Sample(named, {}, b"", picture.pixels))

    def _rows(self, samples: tuple[Sample, ...]) -> Iterator[_Row | Unreadable]:
        batch = SampleBatch(Shard("task images", "", ""), index=0, last=True, samples=samples)
        (scored,) = self._handler.run_inference(batch, self._model)
        if batch.attempt.out_of_memory:
            raise RuntimeError(
                f"the GPU's memory is too small for flipped_clip.batch_size {self._batch_size}; reduce it in the "
                "recipe, which changes only the last bits of embeddings"
            )
        for letter in scored.dead_letters:
            yield Unreadable(letter.key, letter.message)
        for sample in scored:
            assert sample.annotation.embedding is not None  # otherwise the sample would be a dead letter
            yield _Row(sample.annotation.uid, sample.annotation.embedding)
