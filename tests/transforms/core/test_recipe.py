"""The recipe: all faults are reported at once, with path, value and what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pydantic
import pytest

from tests.helpers import DEMO_RECIPE, recipe, settings
from transforms.core.recipe import Recipe, load_recipe, parse_recipe
from transforms.core.settings import SettingsError, ThresholdSettings
from transforms.cross_modality.flipped_clip import FlippedClipSettings

RECIPES = DEMO_RECIPE.parent


def faults_of(content: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse_recipe(content, "r.yaml")
    assert str(caught.value).startswith("r.yaml: ")
    return caught.value.faults


def one_fault(**changes: Any) -> str:
    (fault,) = faults_of(settings(**changes))
    return fault


def load_text(folder: Path, text: str | bytes) -> Recipe:
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(str(path))


@pytest.mark.parametrize("name", ["demo", "paper"])
def test_bundled_recipes_load(name: str) -> None:
    loaded = load_recipe(str(RECIPES / f"{name}.yaml"))
    assert loaded.name == name
    assert loaded.active_rules == [
        "near_duplicate", "caption_length", "language", "pos_pattern", "caption_frequency", "aspect_ratio",
        "min_side", "face_area", "flipped_clip", "image_text_matching", "semantic_dedup",
    ]  # fmt: skip


def test_every_recipe_of_the_folder_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} >= {"demo", "paper"}
    for path in RECIPES.glob("*.yaml"):
        load_recipe(str(path))


def test_all_faults_are_reported_at_once() -> None:
    faults = faults_of(
        settings(
            seed=-1,
            single_modality__near_duplicate={"max_hamming": 17, "maximum": 1},
            single_modality__face_area={"max_share": "a lot"},
            cross_modality__digit=...,  # then digit_enhancement has no digit scores, which is reported later
            cross_modality__device="tpu",
            distribution_alignment__clusters={"count": 0},
            distribution_alignment__target={},
            surprise=1,
        )
    )
    assert sorted(fault.split(":")[0] for fault in faults) == [
        "cross_modality.device",
        "distribution_alignment.clusters.count",
        "distribution_alignment.target",
        "seed",
        "single_modality.face_area.max_share",
        "single_modality.near_duplicate.max_hamming",
        "single_modality.near_duplicate.maximum",
        "surprise",
    ]


@pytest.mark.parametrize(
    ("changes", "where", "got", "allowed"),
    [
        ({"seed": -3}, "seed", "-3", "greater than or equal to 0"),
        ({"seed": 1.5}, "seed", "1.5", "integer"),
        ({"cross_modality__device": "tpu"}, "cross_modality.device", '"tpu"', "'cpu' or 'cuda'"),
        ({"single_modality__min_side": {"min_px": 0}}, "single_modality.min_side.min_px", "0", "than or equal to 1"),
        ({"single_modality__min_side": {"min_pixel": 5}}, "single_modality.min_side.min_pixel", "5", "min_px"),
        ({"single_modality__language": {"allowed": ["en", 3]}}, "single_modality.language.allowed.1", "3", "string"),
        ({"single_modality__language": {"allowed": []}}, "single_modality.language.allowed", "[]", "at least 1 item"),
        ({"single_modality__near_duplicate": 3}, "single_modality.near_duplicate", "3", "dictionary"),
        ({"surprise": 1}, "surprise", "1", "name, seed, pool, rule_order"),
        ({"cross_modality__flipped_clip__min": 1.5}, "cross_modality.flipped_clip.min", "1.5", "than or equal to 1"),
        (
            {"cross_modality__image_text_matching__min": -2},
            "cross_modality.image_text_matching.min", "-2", "than or equal to 0",
        ),
        (
            {"single_modality__pos_pattern": {"any_of": ["NOUN"]}},
            "single_modality.pos_pattern.any_of.0", '"NOUN"', "NN NNP",
        ),
        (
            {"single_modality__language": {"allowed": ["english"]}},
            "single_modality.language.allowed.0", '"english"', "for example en",
        ),
        ({"distribution_alignment__max_copies": 0.5}, "distribution_alignment.max_copies", "0.5", "than or equal to 1"),
    ],
)  # fmt: skip
def test_fault_names_path_value_and_what_is_allowed(
    changes: dict[str, Any], where: str, got: str, allowed: str
) -> None:
    fault = one_fault(**changes)
    place, _, rest = fault.partition(": ")
    assert place == where
    assert got in rest
    assert allowed in rest


def test_a_missing_section_is_a_fault_with_its_place() -> None:
    content = settings(cross_modality__flipped_clip__model=...)
    assert faults_of(content) == ["cross_modality.flipped_clip.model: missing; it is required"]
    assert {fault.split(":")[0] for fault in faults_of({})} == {
        "name", "single_modality", "cross_modality", "distribution_alignment"
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": True},
        {"seed": "1"},
        {"seed": 1.0},
        {"name": 7},
        {"cross_modality__flipped_clip__min": "0.19"},
        {"cross_modality__flipped_clip__min": True},
        {"cross_modality__flipped_clip__min": float("nan")},
        {"cross_modality__flipped_clip__min": float("inf")},
        {"cross_modality__flipped_clip__score_unflipped": 1},
        {"cross_modality__flipped_clip__score_unflipped": "yes"},
        {"single_modality__language": {"allowed": "en"}},
        {"single_modality": None},
        {"distribution_alignment__target": {"survivors": False}},
    ],
)
def test_types_are_strict(changes: dict[str, Any]) -> None:
    assert len(faults_of(settings(**changes))) == 1


def test_whole_numbers_are_numbers() -> None:
    assert recipe(single_modality__aspect_ratio={"max_ratio": 3}).sha256 == recipe().sha256


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_not_a_mapping(content: Any) -> None:
    (fault,) = faults_of(content)
    assert type(content).__name__ in fault
    assert "mapping" in fault


def test_keys_that_are_not_text_are_faults() -> None:
    content: dict[Any, Any] = settings()
    content[1] = 2
    content["single_modality"][3] = 4
    assert sorted(fault.split(":")[0] for fault in faults_of(content)) == ["1", "single_modality.3"]


def test_any_value_that_yaml_can_give_can_be_shown(tmp_path: Path) -> None:
    for value in ("{2020-01-01: 1}", "&a [*a]", "!!binary aGFsbG8=", "!!set {a, b}", "2020-01-01", ".nan"):
        text = DEMO_RECIPE.read_text().replace("name: demo", f"name: {value}")
        with pytest.raises(SettingsError) as caught:
            load_text(tmp_path, text)
        assert [fault.split(":")[0] for fault in caught.value.faults] == ["name"], value


def test_exponents_that_yaml_reads_as_text_are_explained(tmp_path: Path) -> None:
    text = DEMO_RECIPE.read_text().replace("max_pool_share: 0.000001", "max_pool_share: 1e-6")
    with pytest.raises(SettingsError) as caught:
        load_text(tmp_path, text)
    (fault,) = caught.value.faults
    assert fault.startswith('single_modality.caption_frequency.max_pool_share: got "1e-6"')
    assert "1.0e-6" in fault
    repaired = load_text(tmp_path, text.replace("1e-6", "1.0e-6"))
    assert repaired.sha256 == recipe().sha256


def test_explanation_appears_only_if_it_helps() -> None:
    assert "1.0e-6" not in one_fault(cross_modality__flipped_clip__min="much")
    assert "1.0e-6" not in one_fault(cross_modality__flipped_clip__min="nan")


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.system ['touch pwned']",
        "name: !!python/name:os.system",
        "a: [1",
        "a: 1\n\tb: 2",
        b"name: \xff\xfe\xfa",
    ],
)
def test_unreadable_yaml_is_one_fault_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="cannot be read as YAML") as caught:
        load_text(tmp_path, text)
    assert len(caught.value.faults) == 1
    assert "\n" not in caught.value.faults[0]
    assert not (tmp_path / "pwned").exists()


def test_repeated_key_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="min_px is given twice"):
        load_text(tmp_path, "single_modality:\n  min_side: {min_px: 200, min_px: 300}\n")


@pytest.mark.parametrize("path", ["/nonexistent/r.yaml", "nowhere.yaml", "unknown-scheme://a/r.yaml"])
def test_a_path_that_cannot_be_opened(path: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_recipe(path)
    assert len(caught.value.faults) == 1


def test_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        load_recipe(str(tmp_path))


def test_empty_file_is_not_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="mapping"):
        load_text(tmp_path, "")


def test_zero_is_a_threshold() -> None:
    zero = recipe(cross_modality__flipped_clip__min=0, cross_modality__image_text_matching__min=0)
    assert zero.cross_modality.flipped_clip.min == 0.0
    assert zero.cross_modality.flipped_clip.cascade_min_cosine == 0.0
    assert zero.cross_modality.image_text_matching is not None
    assert zero.cross_modality.image_text_matching.min == 0.0
    assert recipe(single_modality__caption_length={"min_words": 0}).single_modality.caption_length is not None
    assert recipe(distribution_alignment__target={"samples": 0}).distribution_alignment.target.samples == 0


def test_an_absent_rule_is_off_and_an_empty_one_takes_defaults() -> None:
    off = recipe(single_modality__face_area=..., single_modality__language=None)
    assert off.single_modality.face_area is None
    assert not {"face_area", "language"} & set(off.active_rules)
    on = recipe(single_modality__face_area={}).single_modality.face_area
    assert on is not None
    assert on.max_share == 0.4


@pytest.mark.parametrize("given", [{}, {"min": 0.1, "keep_fraction": 0.3}])
def test_a_threshold_is_one_of_two(given: dict[str, float]) -> None:
    with pytest.raises(pydantic.ValidationError, match="exactly one of"):
        ThresholdSettings(**given)


@pytest.mark.parametrize(("fraction", "allowed"), [(0.0, False), (1e-9, True), (1.0, True), (1.1, False)])
def test_keep_fraction_is_a_positive_share(fraction: float, allowed: bool) -> None:
    if allowed:
        assert ThresholdSettings(keep_fraction=fraction).keep_fraction == fraction
    else:
        with pytest.raises(pydantic.ValidationError):
            ThresholdSettings(keep_fraction=fraction)


def test_digit_rescue() -> None:
    rescued = FlippedClipSettings(model="m", min=0.2, digit_rescue={"min_cosine": 0.2})  # type: ignore[arg-type]
    assert rescued.cascade_min_cosine == 0.2
    assert FlippedClipSettings(model="m", keep_fraction=0.3).cascade_min_cosine is None
    with pytest.raises(pydantic.ValidationError, match="must not exceed"):
        FlippedClipSettings(model="m", min=0.2, digit_rescue={"min_cosine": 0.21})  # type: ignore[arg-type]
    with pytest.raises(pydantic.ValidationError, match="needs `min`"):
        FlippedClipSettings(model="m", keep_fraction=0.2, digit_rescue={"min_cosine": 0.1})  # type: ignore[arg-type]
    fault = one_fault(
        cross_modality__flipped_clip__digit_rescue={"min_cosine": 0.1},
        cross_modality__digit=...,
        distribution_alignment__digit_enhancement=...,
    )
    assert fault.startswith("cross_modality: ")
    assert "needs the section `digit`" in fault


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distribution_alignment__target": {"samples": 5, "pool_share": 0.2}}, "exactly one of"),
        ({"distribution_alignment__target": {}}, "exactly one of"),
        ({"distribution_alignment__quality_duplication": {"w1": 2.0, "w2": 1.9}}, "`w2` must not be below"),
        ({"distribution_alignment__digit_enhancement": {"floor_copies": 10.5}}, "must not exceed `max_copies`"),
        ({"cross_modality__digit": ...}, "needs the section `cross_modality.digit`"),
        ({"rule_order": ["language"]}, "each rule that is on, once: near_duplicate, "),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    assert message in one_fault(**changes)


def test_settings_on_the_edge_of_contradiction_are_allowed() -> None:
    recipe(distribution_alignment__quality_duplication={"w1": 2.0, "w2": 2.0})
    recipe(distribution_alignment__digit_enhancement={"floor_copies": 10.0})


def other_order() -> list[str]:
    """Return the active rules, with the first two swapped."""
    first, second, *rest = recipe().active_rules
    return [second, first, *rest]


def test_rule_order_must_be_a_permutation_of_the_rules_that_are_on() -> None:
    rules = recipe().active_rules
    assert recipe(rule_order=other_order()).rule_order == other_order() != rules
    for wrong in (rules[1:], [*rules, rules[0]], [*rules, "digit"], []):
        assert "each rule that is on" in one_fault(rule_order=wrong)
    assert "each rule that is on" in one_fault(rule_order=rules, single_modality__face_area=...)


def test_rule_order_cannot_put_a_later_stage_before_an_earlier_one() -> None:
    assert "an earlier stage before those of a later one" in one_fault(rule_order=recipe().active_rules[::-1])


def leaves(content: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name, value in content.items():
        place = f"{path}__{name}" if path else name
        found += leaves(value, place) if isinstance(value, dict) and value else [place]
    return found


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if value >= 1 or value == 0 else value / 3 + 0.1
    if isinstance(value, list):
        return [*value, "de"]
    return {"cpu": "cuda", "bundled": "nltk"}.get(value, f"{value}x")


@pytest.mark.parametrize("path", leaves(settings(distribution_alignment__target={"pool_share": 0.3})))
def test_the_hash_changes_with_every_setting(path: str) -> None:
    base: dict[str, Any] = {"distribution_alignment__target": {"pool_share": 0.3}}
    place: Any = settings(**base)
    for name in path.split("__"):
        place = place[name]
    assert recipe(**base, **{path: changed(place)}).sha256 != recipe(**base).sha256


def test_hash_includes_defaults_and_ignores_order() -> None:
    content = settings()
    reordered = {name: content[name] for name in reversed(content)}
    assert parse_recipe(reordered, "r").sha256 == recipe().sha256
    spelled_out = settings(pool={"max_image_bytes": 20 * 2**20}, single_modality__language={})
    assert parse_recipe(spelled_out, "r").sha256 == recipe().sha256
    assert recipe(pool={"max_image_bytes": 1}).sha256 != recipe().sha256
    assert recipe(rule_order=other_order()).sha256 != recipe().sha256


def test_recipe_is_frozen() -> None:
    loaded = recipe()
    with pytest.raises(pydantic.ValidationError):
        loaded.seed = 5  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError):
        loaded.cross_modality.flipped_clip.min = 0.5
    assert copy.deepcopy(loaded) == loaded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "{a: " * 3000, "nested too deeply"),
        ("\n".join(" " * level + "a:" for level in range(500)), "nested too deeply"),
        ("- " * 3000 + "a", "nested too deeply"),
        ("? " * 3000 + "a", "nested too deeply"),
        ("a: " + "9" * 5000, "a number of 5000 characters"),
        ("a: 0x" + "f" * 5000, "a number of 5002 characters"),
        ("a: " + "1:" * 5000 + "1", "a number of 10001 characters"),
        ('a: !!int ""', ""),
        ("a: !!timestamp x", ""),
        ("a: !!bool x", ""),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: 2001-99-99", "month must be in"),
        ("#" * 2**18 + "#", "has more than 262144 bytes"),
    ],
)
def test_what_would_cost_time_or_a_traceback_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_text(tmp_path, text)
    (fault,) = caught.value.faults
    assert fault.startswith("cannot be read as YAML: ") and message in fault and len(fault) < 400


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a0: &a0 [x, x]\na1: &a1 [*a0, *a0]\n", "a1"),
        ("pool: {max_json_depth: &a 3, max_tar_members: *a}", "pool.max_tar_members"),
        ("name: &a [*a]", "name"),
        ("<<: *a", "<<"),
        ("*a : b", "settings"),
        ("*a", "settings"),
    ],
)
def test_aliases_are_refused_where_they_are(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_text(tmp_path, text)
    (fault,) = caught.value.faults
    assert fault.startswith(f"{where}: got the alias *a") and "are not allowed: write the value out" in fault


def test_nesting_as_deep_as_any_setting_is_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="deep: unknown setting"):
        load_text(tmp_path, "deep: " + "[" * 30 + "]" * 30)


@pytest.mark.parametrize(
    ("pool", "where", "allowed"),
    [
        ({"image_members": []}, "pool.image_members", "at least 1 item"),
        ({"image_members": [".jpg"]}, "pool.image_members.0", "for example image.jpg"),
        ({"image_members": ["JPG"]}, "pool.image_members.0", "lower case"),
        ({"image_members": ["a/b"]}, "pool.image_members.0", "for example image.jpg"),
        ({"image_members": ["*.jpg"]}, "pool.image_members.0", "for example image.jpg"),
        ({"image_members": ["jpg"], "caption_members": ["txt", "jpg"]}, "pool", "jpg is named twice"),
        ({"caption_members": [], "caption_fields": []}, "pool", "no sample has a caption"),
        ({"several_captions": "best"}, "pool.several_captions", "'each' or 'first'"),
        ({"keep_columns": ["url", "url"]}, "pool", "a field twice"),
        ({"keep_columns": [""]}, "pool.keep_columns.0", "at least 1 character"),
        ({"keep_columns": ["caption"]}, "settings", "a column caption of their own"),
        ({"keep_columns": ["copies"]}, "settings", "a column copies of their own"),
    ],
)  # fmt: skip
def test_faults_of_what_a_pool_is_made_of(pool: dict[str, Any], where: str, allowed: str) -> None:
    fault = one_fault(pool=pool)
    assert fault.startswith(f"{where}: ")
    assert allowed in fault


def test_kept_columns_change_no_score() -> None:
    asked = recipe(pool={"keep_columns": ["url"]}).pool
    assert asked.computing == recipe().pool.computing
