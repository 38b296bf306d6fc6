"""pairsift turns a raw pool of web image-text pairs into a subset worth training a CLIP model on.

This package is the Python API. Names are imported when they are first used, so `import pairsift` takes no time.

    import pairsift

    recipe = pairsift.load_recipe("recipes/demo.yaml")
    finished = pairsift.run(recipe, "POOL", "OUT")
    finished.decisions()          # Arrow: one row per sample
    finished.picture(uid)         # a sample's image

A rule of your own: docs/adding-a-rule.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairsift.finished_run import FinishedRun, open_run, run, select
    from pipeline.graphs import ScoreShards
    from transforms.annotate import Annotate
    from transforms.core.catalogue import Annotator, Rule, Score, rules_of_stage, scores
    from transforms.core.recipe import Recipe, load_recipe, parse_recipe
    from transforms.core.records import Annotation, Sample, SampleBatch
    from transforms.core.settings import Settings, SettingsError, ThresholdSettings
    from transforms.models.score import ScoreByModel
    from transforms.rules import first_failing, rules_of

_MODULE_OF = {
    "FinishedRun": "pairsift.finished_run",
    "open_run": "pairsift.finished_run",
    "run": "pairsift.finished_run",
    "select": "pairsift.finished_run",
    "Annotator": "transforms.core.catalogue",
    "Rule": "transforms.core.catalogue",
    "Score": "transforms.core.catalogue",
    "rules_of_stage": "transforms.core.catalogue",
    "scores": "transforms.core.catalogue",
    "Recipe": "transforms.core.recipe",
    "load_recipe": "transforms.core.recipe",
    "parse_recipe": "transforms.core.recipe",
    "Annotation": "transforms.core.records",
    "Sample": "transforms.core.records",
    "SampleBatch": "transforms.core.records",
    "Settings": "transforms.core.settings",
    "SettingsError": "transforms.core.settings",
    "ThresholdSettings": "transforms.core.settings",
    "first_failing": "transforms.rules",
    "rules_of": "transforms.rules",
    "Annotate": "transforms.annotate",
    "ScoreByModel": "transforms.models.score",
    "ScoreShards": "pipeline.graphs",
}

__all__ = [
    "Annotate", "Annotation", "Annotator", "FinishedRun", "Recipe", "Rule", "Sample", "SampleBatch", "Score",
    "ScoreByModel", "ScoreShards", "Settings", "SettingsError", "ThresholdSettings", "first_failing", "load_recipe",
    "open_run", "parse_recipe", "rules_of", "rules_of_stage", "run", "scores", "select",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module pairsift has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
