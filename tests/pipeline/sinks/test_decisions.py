"""Decisions: in = dropped + survivors + dead letters, or the run stops."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to

from pipeline.output_folder import tables
from pipeline.output_folder.accounting import Unaccounted
from pipeline.output_folder.layout import Layout
from pipeline.sinks.decisions import (
    OutcomeCounts,
    WriteDecisions,
    WriteFunnel,
    add_counts,
    count_outcomes,
    decide,
    funnel,
)
from pipeline.sources.annotations import count_samples
from tests import helpers
from tests.helpers import annotation, uid
from tests.transforms.distribution_alignment.alignment_graph import placements_of
from transforms.core.recipe import STAGES, Recipe
from transforms.core.records import Annotation, DeadLetter, Shard
from transforms.distribution_alignment.records import Placement
from transforms.storage import files


def recipe(**changes: Any) -> Recipe:
    """Return the demo recipe with thresholds that `annotation()` passes."""
    for rule, threshold in (("flipped_clip", 0.19), ("image_text_matching", 0.5)):
        if f"cross_modality__{rule}" not in changes:
            changes.setdefault(f"cross_modality__{rule}__min", threshold)
    return helpers.recipe(**changes)


def placed(number: int, copies: int = 1, duplicate_of: str = "", shard: str = "s") -> Placement:
    return Placement(uid(number), shard, 3, duplicate_of, copies + 0.25, copies)


def row(number: int, **columns: Any) -> Annotation:
    return annotation(uid=uid(number), shard="s", key=f"k{number}", **columns)


def decided(
    rows: list[Annotation], placements: list[Placement], unjudged: set[str] = frozenset()  # type: ignore[assignment]
) -> list[dict[str, Any]]:
    return decide(rows, {p.uid: p for p in placements}, unjudged, recipe(), {})


def letter(key: str, reason: str = "broken", stage: str = "single_modality") -> DeadLetter:
    return DeadLetter("s", key, uid(int(key[1:])) if key[1:].isdigit() else uid(0), stage, reason, "m")


# Deciding ---------------------------------------------------------------------------------------------------------


def test_survivor_has_its_placement() -> None:
    (found,) = decided([row(1)], [placed(1, copies=2)])
    assert found["dropped_by"] is None
    assert (found["cluster"], found["copies"], found["expected_copies"]) == (3, 2, 2.25)
    assert found["semantic_duplicate_of"] is None
    assert (found["uid"], found["key"], found["shard"]) == (uid(1), "k1", "s")


def test_fields_of_the_pool_are_columns_of_the_decisions(tmp_path: Path) -> None:
    asked = recipe(pool={"keep_columns": ["url", "NSFW"]})
    rows = [row(1, kept_fields='{"url": "u", "gone": "x"}'), row(2, kept_fields="{}", word_count=1), row(3)]
    found = decide(rows, {uid(n): placed(n) for n in (1, 3)}, set(), asked, {})
    tables.write_table(str(tmp_path / "t.parquet"), found, tables.decisions_schema(asked))
    written = tables.read_table(str(tmp_path / "t.parquet"))
    assert [(one["url"], one["NSFW"]) for one in written] == [("u", None), (None, None), (None, None)]
    assert {"url", "NSFW"} == set(written[0]) - set(tables.decisions_schema(recipe()).names)


def test_notes_of_the_pool_are_counted_in_the_funnel() -> None:
    rows = [row(1, pool_notes="uid_replaced"), row(2, pool_notes="uid_replaced original_size_not_used"), row(3)]
    counts = count_outcomes(decided(rows, [placed(1), placed(2), placed(3)]), [])
    assert funnel({**counts, ("in", ""): 3}, recipe())["pool_notes"] == {"original_size_not_used": 1, "uid_replaced": 2}
    without = count_outcomes(decided([row(3)], [placed(3)]), [])
    assert "pool_notes" not in funnel({**without, ("in", ""): 1}, recipe())


def test_a_survivor_may_have_no_copies() -> None:
    (found,) = decided([row(1)], [placed(1, copies=0)])
    assert (found["dropped_by"], found["copies"]) == (None, 0)


@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        ({"word_count": 1}, "caption_length"),
        ({"word_count": 1, "flipped_clip_cosine": None}, "caption_length"),
        ({"flipped_clip_cosine": 0.1}, "flipped_clip"),
        ({"flipped_clip_cosine": 0.1, "match_probability": None}, "flipped_clip"),
        ({"match_probability": 0.1}, "image_text_matching"),
        ({"flipped_clip_cosine": 0.1, "match_probability": 0.1}, "flipped_clip"),
    ],
)
def test_dropped_sample_has_the_name_of_the_rule_and_no_copies(columns: dict[str, Any], rule: str) -> None:
    (found,) = decided([row(1, **columns)], [])
    assert (found["dropped_by"], found["copies"], found.get("cluster")) == (rule, 0, None)


def test_semantic_duplicate_is_dropped_and_names_its_keeper() -> None:
    (found,) = decided([row(1)], [placed(1, copies=0, duplicate_of=uid(9))])
    assert (found["dropped_by"], found["semantic_duplicate_of"]) == ("semantic_dedup", uid(9))
    assert found["cluster"] == 3


def test_dead_letter_of_stage_2_has_no_row() -> None:
    assert decided([row(1, flipped_clip_cosine=None)], [], {"k1"}) == []
    # A sample that stage 1 drops stays dropped, even with a dead letter of stage 2.
    (found,) = decided([row(1, word_count=1)], [], {"k1"})
    assert found["dropped_by"] == "caption_length"


def test_rows_keep_their_order_and_values() -> None:
    rows = [row(n) for n in (3, 1, 2)]
    found = decided(rows, [placed(n) for n in (1, 2, 3)])
    assert [r["uid"] for r in found] == [uid(3), uid(1), uid(2)]
    assert rows == [row(n) for n in (3, 1, 2)]
    assert found == decided(rows, [placed(n) for n in (1, 2, 3)])


def test_a_survivor_without_a_placement_is_unaccounted() -> None:
    with pytest.raises(Unaccounted, match=rf"{uid(2)} \('k2' of shard s\)"):
        decided([row(1), row(2)], [placed(1)])


@pytest.mark.parametrize("columns", [{"word_count": 1}, {"flipped_clip_cosine": 0.1}])
def test_a_dropped_sample_with_a_placement_is_unaccounted(columns: dict[str, Any]) -> None:
    with pytest.raises(Unaccounted, match="its placement is"):
        decided([row(1, **columns)], [placed(1)])


def test_placement_without_a_sample_is_unaccounted() -> None:
    with pytest.raises(Unaccounted, match=uid(7)):
        decided([row(1)], [placed(1), placed(7)])
    with pytest.raises(Unaccounted, match=uid(1)):
        decided([row(1)], [placed(1)], {"k1"})  # a dead letter that is in the subset anyway


# Counting ---------------------------------------------------------------------------------------------------------


def test_every_row_and_letter_is_counted_once() -> None:
    rows = decided(
        [row(1), row(2), row(3, word_count=1), row(4, word_count=1), row(5, flipped_clip_cosine=0.0), row(6)],
        [placed(1, 3), placed(2, 0), placed(6, 0, uid(1))],
    )
    counts = count_outcomes(rows, [letter("a"), letter("b", "gone"), letter("c")])
    assert {key: n for key, n in counts.items() if n} == {
        ("survivors", ""): 2, ("samples", ""): 1, ("copies", ""): 3, ("dropped", "caption_length"): 2,
        ("dropped", "flipped_clip"): 1, ("dropped", "semantic_dedup"): 1, ("dead_letters", "broken"): 2,
        ("dead_letters", "gone"): 1,
    }  # fmt: skip


def random_counts(rng: random.Random) -> OutcomeCounts:
    counts: OutcomeCounts = {("dropped", name): rng.randrange(5) for name in rng.sample(recipe().active_rules, 4)}
    counts |= {("dead_letters", reason): rng.randrange(1, 5) for reason in rng.sample(["a", "b", "c"], 2)}
    counts["survivors", ""] = rng.randrange(20)
    counts["samples", ""] = rng.randrange(counts["survivors", ""] + 1)
    counts["copies", ""] = counts["samples", ""] * 2
    counts["in", ""] = sum(n for (what, _), n in counts.items() if what in ("dropped", "dead_letters", "survivors"))
    return counts


def test_counts_add_up_in_any_order_and_grouping() -> None:
    rng = random.Random(0)
    parts = [random_counts(rng) for _ in range(12)]
    whole = add_counts(parts)
    for _ in range(5):
        rng.shuffle(parts)
        cut = rng.randrange(13)
        assert add_counts([add_counts(parts[:cut]), add_counts(parts[cut:]), add_counts([])]) == whole
    assert whole["in", ""] == sum(t["in", ""] for t in parts)


def test_a_funnel_is_additive() -> None:
    rng = random.Random(1)
    for _ in range(20):
        content = funnel(add_counts(random_counts(rng) for _ in range(3)), recipe())
        assert [rule["name"] for rule in content["rules"]] == recipe().active_rules
        left = content["in"] - sum(content["dead_letters"].values())
        for rule in content["rules"]:
            assert rule["in"] == left
            assert rule["kept"] == rule["in"] - rule["dropped"] >= 0
            left = rule["kept"]
        assert left == content["survivors"]
        assert list(content["dead_letters"]) == sorted(content["dead_letters"])


def test_a_funnel_names_rules_that_drop_nothing_and_stages() -> None:
    content = funnel({("in", ""): 2, ("survivors", ""): 2, ("samples", ""): 1, ("copies", ""): 5}, recipe())
    assert [rule["dropped"] for rule in content["rules"]] == [0] * len(recipe().active_rules)
    assert {rule["stage"] for rule in content["rules"]} == set(STAGES)
    assert (content["in"], content["survivors"], content["samples"], content["copies"]) == (2, 2, 1, 5)
    assert content["dead_letters"] == {}


def test_funnel_counts_the_samples_that_each_model_skipped() -> None:
    rows = decided(
        [
            row(1),
            row(2, flipped_clip_cosine=0.0, match_probability=None, digit_probability=None),
            row(3, match_probability=0.1, digit_probability=None),
            row(4, word_count=1, flipped_clip_cosine=None, match_probability=None, digit_probability=None),
        ],
        [placed(1)],
    )
    counts = count_outcomes(rows, [])
    assert counts["not_asked", "image_text_matching"] == 1
    assert counts["not_asked", "digit"] == 2
    counts["in", ""] = 4
    assert funnel(counts, recipe())["not_asked"] == {"image_text_matching": 1, "digit": 2}
    without = recipe(cross_modality__digit=..., distribution_alignment__digit_enhancement=...)
    assert funnel(counts, without)["not_asked"] == {"image_text_matching": 1}


def test_the_funnel_counts_near_duplicates_that_stage_2_scored() -> None:
    unscored = dict.fromkeys(("flipped_clip_cosine", "match_probability", "digit_probability"))
    rows = decided([row(1), row(2, duplicate_of=uid(1)), row(3, duplicate_of=uid(1), **unscored)], [placed(1)])
    counts = count_outcomes(rows, [])
    counts["in", ""] = 3
    found = funnel(counts, recipe())
    assert found["scored_duplicates"] == 1
    assert next(rule for rule in found["rules"] if rule["name"] == "near_duplicate")["dropped"] == 2


def test_funnel_counts_shards_at_smaller_batches_if_any() -> None:
    counts = {("in", ""): 1, ("survivors", ""): 1}
    assert "smaller_batches" not in funnel(counts, recipe())
    halved = {("smaller_batches", "digit"): 1}
    found = funnel(add_counts([counts, halved, halved]), recipe())
    assert found["smaller_batches"] == {"digit": 2}


def test_funnel_of_an_empty_pool() -> None:
    content = funnel({}, recipe())
    assert (content["in"], content["survivors"], content["copies"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "counts",
    [
        {("in", ""): 2, ("survivors", ""): 1},
        {("in", ""): 1, ("survivors", ""): 2},
        {("in", ""): 1, ("survivors", ""): 1, ("dropped", "language"): 1},
        {("in", ""): 1, ("survivors", ""): 1, ("dead_letters", "broken"): 1},
        {("survivors", ""): 1},
        {("in", ""): 1},
    ],
)
def test_a_funnel_that_does_not_add_up_stops_the_run(counts: OutcomeCounts) -> None:
    with pytest.raises(Unaccounted):
        funnel(counts, recipe())


# The sink ---------------------------------------------------------------------------------------------------------


def lay_out(layout: Layout) -> list[Placement]:
    """One shard: 2 survivors, 1 dropped in each stage, a dead letter in each step."""
    rows = [row(1), row(2), row(3, word_count=1), row(4, flipped_clip_cosine=0.0), row(5), row(6), row(7)]
    unscored = dict.fromkeys(("flipped_clip_cosine", "match_probability", "digit_probability"))
    pool = dict.fromkeys(("pool_samples", "caption_image_count"))
    tables.write_table(
        layout.single_modality("s"), [tables.annotation_row(a.with_columns(**unscored, **pool)) for a in rows],
        tables.single_modality_schema(),
    )  # fmt: skip
    tables.write_table(
        layout.pool_wide("s"), [tables.annotation_row(a) for a in rows if a.key != "k6"], tables.pool_wide_schema()
    )
    scored = [tables.annotation_row(a) for a in rows if a.key not in ("k3", "k6", "k7")]
    tables.write_table(layout.cross_modality("s"), scored, tables.cross_modality_schema())
    for step, key in (("single_modality", "k0"), ("pool_wide", "k6"), ("cross_modality", "k7")):
        tables.write_dead_letters(layout.dead_letters(step, "s"), [letter(key, f"{step}_broke", step)])
    return [placed(1, 2), placed(2, 0), placed(5, 0, uid(1))]


def write(layout: Layout, placements: list[Placement]) -> list[OutcomeCounts]:
    group = {
        WriteDecisions.SHARDS: [None],
        WriteDecisions.CHANGES: [],
        WriteDecisions.PLACEMENTS: [placements_of(placements)],
    }
    settings = recipe(cross_modality__flipped_clip__min=0.19)
    return list(WriteDecisions(layout, settings).process(("s", group), {}))


def test_decisions_of_a_shard(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    (counts,) = write(layout, lay_out(layout))
    assert {key: n for key, n in counts.items() if n} == {
        ("in", ""): 8, ("survivors", ""): 2, ("samples", ""): 1, ("copies", ""): 2,
        ("dropped", "caption_length"): 1, ("dropped", "flipped_clip"): 1, ("dropped", "semantic_dedup"): 1,
        ("dead_letters", "single_modality_broke"): 1, ("dead_letters", "pool_wide_broke"): 1,
        ("dead_letters", "cross_modality_broke"): 1,
        ("not_asked", "image_text_matching"): 1, ("not_asked", "digit"): 1,
    }  # fmt: skip
    assert count_samples(Shard("s", "p", "f"), layout) == 8
    rows = tables.read_table(layout.decisions("s"))
    assert {r["key"]: (r["dropped_by"], r["copies"]) for r in rows} == {
        "k1": (None, 2), "k2": (None, 0), "k3": ("caption_length", 0), "k4": ("flipped_clip", 0),
        "k5": ("semantic_dedup", 0),
    }  # fmt: skip


def test_lost_sample_stops_the_run_and_leaves_no_decisions(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    placements = lay_out(layout)
    files.delete_if_there(layout.dead_letters("pool_wide", "s"))  # as if k6 had been forgotten
    with pytest.raises(Unaccounted, match=f"shard s: lost 1 uids \\({uid(6)}\\)"):
        write(layout, placements)
    assert not files.exists(layout.decisions("s"))


def test_repeated_placement_stops_the_run(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    placements = lay_out(layout)
    with pytest.raises(Unaccounted):
        write(layout, [*placements, placed(1, 2)])


def test_the_funnel_file(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    rng = random.Random(2)
    parts = [random_counts(rng) for _ in range(4)]
    with beam.Pipeline("FnApiRunner") as p:
        done = (
            p | beam.Create(parts) | beam.CombineGlobally(add_counts)
            | "Write" >> beam.ParDo(WriteFunnel(layout, recipe()))
        )  # fmt: skip
        assert_that(done, equal_to([layout.funnel]))
    expected = funnel(add_counts(parts), recipe())
    files.write_json(str(tmp_path / "expected.json"), expected)
    assert (tmp_path / "expected.json").read_bytes() == (tmp_path / "funnel.json").read_bytes()
