"""`pairsift centroids`: the images of downstream tasks -> the file of task centroids that `cids.tasks` names."""

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

_NAME = re.compile(r"(?!__)[A-Za-z0-9_-]+")  # a key of the .npz, of the recipe, and a column of clusters.parquet
_ITERATIONS = 20  # of k-means; faiss' own default is 25


@dataclasses.dataclass(frozen=True)
class TaskCentroids:
    """What became of a task: float32 (m, d) unit centroids, and how many images they come from."""

    name: str
    images: int
    unreadable: int
    centroids: np.ndarray

    @property
    def summary(self) -> dict[str, Any]:
        """Name, counts of images, of unreadable ones and of centroids."""
        counts = {"images": self.images, "unreadable": self.unreadable, "centroids": len(self.centroids)}
        return {"name": self.name, **counts}


def make_centroids(
    recipe: Recipe,
    sources: Sequence[str],
    output: str,
    centroids_per_task: int,
    tfio_python: str | None,
    tell_unreadable: Callable[[Unreadable], None],
    tell_done: Callable[[TaskCentroids], None],
) -> None:
    """Embed the images of each of `sources` (NAME=IMAGES) with the recipe's CLIP; write their centroids to `output`.

    A picture is embedded as stage 2 embeds it, by the same code and to the bit: the unflipped picture where the recipe
    says `score_unflipped`, else the flipped one. Centroids: spherical k-means, at most `centroids_per_task` a task, of
    the pictures in the order of their content's hash, so that names, folders and tars change nothing.

    Raises UsageError before anything is read where something asked for is not there, NoTfio at a file that needs
    tensorflow-io where there is none, and ValueError for a task none of whose images can be read; nothing is then
    written.
    """
    paths = _by_name(sources)
    check_path("--output", output)
    if output.endswith("/") or (not files.in_cloud_storage(output) and Path(output).is_dir()):
        raise UsageError(f"--output: {output}: is a folder; name a file, for example {output.rstrip('/')}/tasks.npz")
    if tfio_python is not None and shutil.which(tfio_python) is None:
        raise UsageError(f"--tfio-python: {tfio_python}: is no program; {HOW_TO_INSTALL}")
    try:
        listed = {name: list_images(path) for name, path in paths.items()}
    except NoImages as error:
        raise UsageError(str(error)) from error
    embedder = _Embedder(recipe.cross_modality)

    made = {}
    with TfioDecoder(tfio_python, recipe.pool.max_image_pixels) as decoder:
        for name, images in listed.items():
            pictures = read_images(images, recipe.pool, decoder)
            task = _task(name, embedder(pictures), centroids_per_task, recipe.seed, tell_unreadable)
            made[name] = task.centroids
            tell_done(task)
    write_tasks(output, made, embedder.identity)


def write_tasks(path: str, centroids: Mapping[str, np.ndarray], identity: Mapping[str, Any]) -> None:
    """Write a file of task centroids with the identity of their model: the same bytes for the same content."""
    entries = {**centroids, MODEL_KEY: np.array(json.dumps(identity, sort_keys=True))}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:  # np.savez takes no task named `file`
        for name, array in sorted(entries.items()):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as entry:  # ZipInfo's own date: 1980
                np.lib.format.write_array(entry, array, allow_pickle=False)
    files.write_bytes(path, content.getvalue())


def _by_name(sources: Iterable[str]) -> dict[str, str]:
    """Task name -> where its images lie. Raises UsageError."""
    paths: dict[str, str] = {}
    for source in sources:
        name, separator, path = source.partition("=")
        if not separator or not path:
            raise UsageError(f"{source}: allowed: NAME=IMAGES, for example digits=/data/mnist")
        if not _NAME.fullmatch(name):
            raise UsageError(f"{source}: the name {name!r}: allowed: letters, digits, _ and -, not led by __")
        if name in paths:
            raise UsageError(f"{source}: the name {name} stands twice; give each task a name of its own")
        check_path(name, path)
        paths[name] = path
    return paths


def _task(
    name: str,
    embedded: Iterator[_Row | Unreadable],
    count: int,
    seed: int,
    tell_unreadable: Callable[[Unreadable], None],
) -> TaskCentroids:
    rows, unreadable = [], 0
    for row in embedded:
        if isinstance(row, Unreadable):
            unreadable += 1
            tell_unreadable(row)
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"{name}: no image of it can be read ({unreadable} were found); a task needs one at least")
    rows.sort()
    units = unit_rows(np.frombuffer(b"".join(row.embedding for row in rows), "<f2").reshape(len(rows), -1))
    return TaskCentroids(name, len(rows), unreadable, train_centroids(units, count, _ITERATIONS, seed))


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class _Row:
    """A picture's identity and its embedding as stage 2 keeps it, fp16."""

    identity: str
    embedding: bytes


class _Embedder:
    """Stage 2's CLIP by itself. Raises UsageError where it cannot be had."""

    def __init__(self, settings: CrossModalitySettings) -> None:
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("recipe: cross_modality.device is cuda, but this machine has no GPU; use a GPU or say cpu")
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
        """Each picture's row, in batches: what waits for the model is no more than it looks at."""
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
                f"the GPU's memory is too small for flipped_clip.batch_size {self._batch_size}; make it smaller in the "
                "recipe, which changes no embedding by more than its last bits"
            )
        for letter in scored.dead_letters:
            yield Unreadable(letter.key, letter.message)
        for sample in scored:
            assert sample.annotation.embedding is not None  # else it were a dead letter
            yield _Row(sample.annotation.uid, sample.annotation.embedding)
