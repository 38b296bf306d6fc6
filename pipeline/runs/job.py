"""From a recipe to the job that the graphs are built from, with every `auto` resolved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline import graphs
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.manifest import identities, manifest
from pipeline.runs.claim import check_pool
from transforms.core.errors import UsageError
from transforms.core.recipe import FILES, SINGLE_MODALITY, Recipe, model_files
from transforms.core.records import Shard
from transforms.models.precision import resolve
from transforms.models.weights import pinned
from transforms.single_modality import pos_pattern
from transforms.storage import files


def settled_job(
    recipe: Recipe, pool: str, layout: Layout, shards: Sequence[Shard], fetch: bool, precision: str | None = None
) -> tuple[graphs.Job, dict[str, Any]]:
    """The job, and the content of the manifest. Settings that other machines could resolve differently are resolved.

    `precision` replaces the recipe's `auto`; with None, `auto` becomes the best that this machine supports. `fetch`
    downloads weights that this machine lacks. Raises UsageError if a model's files are missing or the output folder
    belongs to another pool.
    """
    cross = recipe.cross_modality
    settled_precision = precision if precision and cross.precision == "auto" else resolve(cross.precision, cross.device)
    try:
        cross = pinned(cross.model_copy(update={"precision": settled_precision}), fetch)
        settled = recipe.model_copy(update={"cross_modality": cross})
        found = identities(settled)
    except (OSError, ValueError, LookupError) as error:
        raise UsageError("; ".join([f"recipe: {error}", *_missing_files(recipe, besides=str(error))])) from error
    content = manifest(recipe, pool, found, settled_precision)
    check_pool(layout, pool)
    return graphs.Job(with_tagger(settled, found), tuple(shards), layout, found), content


def _missing_files(recipe: Recipe, besides: str) -> list[str]:
    """A fault for each setting that names a local file that is not there, besides those of a message."""
    named = {where: path for where, path in model_files(recipe).items() if where.rpartition(".")[2] in FILES}
    local = {where: path for where, path in named.items() if "://" not in path and not path.startswith("bundled:")}
    return [
        f"{where}: {path}: there is no such file"
        for where, path in local.items()
        if path not in besides and not files.exists(path)
    ]  # fmt: skip


def with_tagger(recipe: Recipe, found: dict[str, Any]) -> Recipe:
    """The recipe with `pos_pattern.tagger: auto` resolved for all workers, whose data folders may differ."""
    settings, tagger = recipe.single_modality.pos_pattern, found[SINGLE_MODALITY].get("pos_pattern")
    if settings is None or tagger is None:
        return recipe
    source = tagger["source"]
    assert source in pos_pattern.SOURCES
    settled = settings.model_copy(update={"tagger": source})
    single = recipe.single_modality.model_copy(update={"pos_pattern": settled})
    return recipe.model_copy(update={"single_modality": single})
