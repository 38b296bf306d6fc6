"""All deciding, in one place: the rules that are on, in order, and the first one that an annotation fails.

A rule is pure: it looks at one annotation and its settings. What can only be known over the whole pool (how many images
a caption occurs with, which image is the better duplicate) is a column by then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transforms.core.catalogue import Rule
from transforms.core.recipe import Recipe
from transforms.core.records import Annotation
from transforms.core.settings import Settings, ThresholdSettings

Thresholds = Mapping[str, float]
"""The thresholds in force, by the names of the rules whose recipe gives a `keep_fraction`."""

KEEP_ALL = -math.inf
"""The threshold of a rule that has not been resolved yet, or of one that no sample reaches."""


class ActiveRule(NamedTuple):
    """A rule with the settings in force."""

    rule: Rule[Any]
    settings: Settings

    @property
    def name(self) -> str:
        """The name of the rule."""
        return self.rule.name

    @property
    def stage(self) -> str:
        """The stage of the rule."""
        return self.rule.stage

    def keeps(self, annotation: Annotation) -> bool:
        """Whether the rule keeps the sample."""
        return self.rule.keeps(annotation, self.settings)


def rules_of(recipe: Recipe, stage: str, thresholds: Thresholds | None = None) -> list[ActiveRule]:
    """The rules of one stage that are on, in the recipe's order.

    `thresholds` holds what each `keep_fraction` amounts to over this pool. Raises KeyError if one is missing.
    """
    return [ActiveRule(rule, _in_force(rule, recipe, thresholds or {})) for rule in recipe.rules_of(stage)]


def first_failing(annotation: Annotation, rules: Sequence[ActiveRule]) -> str | None:
    """The name of the first rule that the annotation fails; None if it passes all."""
    return next((rule.name for rule in rules if not rule.keeps(annotation)), None)


def has_keep_fraction(rule: Rule[Any], recipe: Recipe) -> bool:
    """Whether the recipe gives the rule's threshold as a `keep_fraction`."""
    settings = recipe.settings_of(rule)
    return isinstance(settings, ThresholdSettings) and settings.keep_fraction is not None


def _in_force(rule: Rule[Any], recipe: Recipe, thresholds: Thresholds) -> Settings:
    settings: Settings | None = recipe.settings_of(rule)
    assert settings is not None  # the rule is on
    if not has_keep_fraction(rule, recipe):
        return settings
    return settings.model_copy(update={"min": thresholds[rule.name], "keep_fraction": None})
