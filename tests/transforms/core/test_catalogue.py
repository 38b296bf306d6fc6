"""The catalogue: everything else is derived from one declaration per rule."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import pytest

from pipeline.output_folder import tables
from tests.helpers import DEMO_RECIPE, recipe
from transforms.core import catalogue, metrics
from transforms.core.catalogue import STAGES, CatalogueError, Rule, Score, rules_of_stage, scores, scores_of
from transforms.core.recipe import Recipe, load_recipe
from transforms.core.settings import Settings
from transforms.rules import rules_of
from transforms.single_modality.image_shape import MIN_SIDE
from transforms.single_modality.language import LANGUAGE


def declared(**changes: Any) -> Rule[Any]:
    """A rule like `min_side`, changed."""
    return dataclasses.replace(MIN_SIDE, **{"name": "other", **changes})


class Entry:
    """An entry point of a package that is not installed."""

    def __init__(self, target: Any, name: str = "other", package: str = "acme") -> None:
        self.name, self.value, self._target = name, f"acme:{name}", target
        self.dist = type("Distribution", (), {"name": package, "version": "1.0"})()

    def load(self) -> Any:
        if isinstance(self._target, Exception):
            raise self._target
        return self._target


def test_catalogue_recipe_predicates_and_columns_name_the_same_rules() -> None:
    names = {rule.name for stage in STAGES for rule in rules_of_stage(stage)}
    sections = {
        name
        for stage in STAGES
        for name, field in Recipe.model_fields[stage].annotation.model_fields.items()  # type: ignore[union-attr]
    }
    assert names <= sections
    assert {score.name for score in scores()} <= sections
    full = recipe()
    assert set(full.active_rules) == names  # the demo has every rule on
    assert {rule.name for stage in STAGES for rule in rules_of(full, stage)} == names
    decided = set(tables.decisions_schema(full).names)
    kept = {name for score in scores() for name, kind in score.columns.items() if kind != "binary"}
    assert kept <= decided <= {*catalogue.columns(), "dropped_by", "expected_copies", "copies"}
    assert {metrics.funnel_dropped(name) for name in names} <= metrics.all_metrics().keys()


def test_every_score_without_a_predicate_is_known_to_have_none() -> None:
    assert {score.name for score in scores() if not isinstance(score, Rule)} == {"digit"}


def test_built_in_rules_use_the_entry_points() -> None:
    found = {entry.name for entry in importlib.metadata.entry_points(group="pairsift.rules")}
    assert {score.name for score in scores() if score.is_built_in} <= found


def test_shipped_recipes_keep_their_order() -> None:
    assert load_recipe(str(DEMO_RECIPE)).active_rules == [
        "near_duplicate", "caption_length", "language", "pos_pattern", "caption_frequency", "aspect_ratio", "min_side",
        "face_area", "flipped_clip", "image_text_matching", "semantic_dedup",
    ]  # fmt: skip


def test_a_rule_without_a_predicate_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match="keeps"):
        Rule(  # type: ignore[call-arg]
            name="x", stage="single_modality", settings=Settings, summary="s", source="ours"
        )
    with pytest.raises(CatalogueError, match="rule other: `keeps` must be a function"):
        declared(keeps=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Not good"}, "rule 'Not good': the name must be lower-case"),
        ({"stage": "late"}, "rule other: stage is 'late'; allowed: single_modality, "),
        ({"settings": dict}, "settings must be a subclass of Settings"),
        ({"columns": {"uid": "string"}}, "column uid is pairsift's own; choose another name"),
        ({"columns": {"A b": "string"}}, "column 'A b': use lower-case letters"),
        ({"value": "nothing"}, "value is 'nothing', which is none of its columns"),
        ({"threshold": "max_px", "keeps_if": "at_most"}, "threshold is 'max_px', which is not a setting"),
        ({"threshold": "min_px"}, "give both `threshold` and `keeps_if`"),
        ({"handler": print}, "a model handler runs in stage 2 only"),
    ],
)
def test_faulty_declaration_names_the_fault(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CatalogueError) as caught:
        declared(**changes)
    assert message in str(caught.value)


def test_rules_are_ordered_by_stage_order_and_name() -> None:
    given = [declared(name="b"), declared(name="a"), declared(name="first", order=1)]
    found = catalogue.load([Entry(rule) for rule in given])  # type: ignore[misc]
    assert [score.name for score in found] == ["first", "a", "b"]
    assert {score.provider for score in found} == {"acme 1.0"}
    assert not found[0].is_built_in


def test_two_rules_of_one_name_or_column_are_refused() -> None:
    with pytest.raises(CatalogueError, match=r"the name other is taken by rule other of acme 1\.0; uninstall one"):
        catalogue.load([Entry(declared()), Entry(declared(order=2))])  # type: ignore[list-item]
    language = dataclasses.replace(LANGUAGE, name="tongue")
    with pytest.raises(CatalogueError, match="the column language is taken by rule"):
        catalogue.load([Entry(LANGUAGE, package="pairsift"), Entry(language)])  # type: ignore[list-item]


def test_faulty_entry_point_is_named() -> None:
    with pytest.raises(CatalogueError, match=r"entry point other = acme:other of acme 1\.0: is int"):
        catalogue.load([Entry(3)])  # type: ignore[list-item]
    with pytest.raises(CatalogueError, match=r"cannot be imported \(no module acme\); reinstall or uninstall"):
        catalogue.load([Entry(ImportError("no module acme"))])  # type: ignore[list-item]


def test_the_identity_of_a_rule_of_another_package_has_its_version() -> None:
    (score,) = catalogue.load([Entry(declared())])  # type: ignore[list-item]
    assert score.identity_of(score.settings()) == {"package": "acme 1.0"}
    assert all(score.is_built_in for stage in STAGES for score in scores_of(stage))
    assert isinstance(score, Score)
