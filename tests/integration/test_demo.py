"""Tests of a complete run on the bundled pool with the bundled models."""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import io
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rich.table import Table

from pipeline import graphs
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import write_listing
from pipeline.output_folder.manifest import clip_identity
from pipeline.report.progress import Progress
from pipeline.reshard.command import reshard
from pipeline.runs import stage
from pipeline.sources import listing
from pipeline.sources.pool import list_shards
from pipeline.sources.webdataset import read_samples
from tests.demo_run import POOL, RECIPE, demo_output, run_demo, snapshot
from tests.helpers import least_apart
from transforms.core.recipe import (
    STAGES,
    CidsSettings,
    DistributionAlignmentSettings,
    PoolSettings,
    TargetSettings,
    load_recipe,
)
from transforms.core.records import Sample
from transforms.distribution_alignment.cids import load_tasks_model
from transforms.models.weights import model_identity

TABLE = "table"  # conftest.py prints what tests record under this name
LABELS = importlib.resources.files("pipeline") / "demo" / "labels.csv"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    shutil.copytree(demo_output(tmp_path_factory), folder, symlinks=True)
    return folder


@pytest.fixture(scope="module")
def decisions(output: Path) -> dict[str, dict]:
    rows = [row for part in sorted((output / "decisions").iterdir()) for row in pq.read_table(part).to_pylist()]
    assert len({row["uid"] for row in rows}) == len(rows)
    return {row["uid"]: row for row in rows}


@pytest.fixture(scope="module")
def dead_letters(output: Path) -> dict[str, dict]:
    files = sorted((output / "dead_letters").iterdir())
    letters = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len({letter["uid"] for letter in letters}) == len(letters)
    return {letter["uid"]: letter for letter in letters}


@pytest.fixture(scope="module")
def labels() -> list[dict[str, str]]:
    with LABELS.open() as file:
        return list(csv.DictReader(file))


def test_thresholds_and_task_centroids_belong_to_the_bundled_models():
    recipe, demo = load_recipe(str(RECIPE)), importlib.resources.files("pipeline") / "demo"
    cross, aligned = recipe.cross_modality, recipe.distribution_alignment
    assert cross.image_text_matching and aligned.digit_enhancement
    assert json.loads((demo / "models" / "held_out.json").read_text())["thresholds"] == {
        "flipped_clip_min": cross.flipped_clip.min,
        "image_text_matching_min": cross.image_text_matching.min,
        "digit_min": aligned.digit_enhancement.min_digit_probability,
    }
    weights = (demo / "models" / "clip" / "open_clip_model.safetensors").read_bytes()
    identity = load_tasks_model("bundled:tasks")
    assert identity and identity["weights_sha256"] == [hashlib.sha256(weights).hexdigest()]
    assert identity == clip_identity(cross, model_identity(cross.flipped_clip))


def test_every_uid_is_accounted_for_exactly_once(output, decisions, dead_letters, labels):
    dropped = {uid for uid, row in decisions.items() if row["dropped_by"]}
    survivors = {uid for uid, row in decisions.items() if not row["dropped_by"]}
    assert dropped | survivors | dead_letters.keys() == {label["uid"] for label in labels}
    assert len(dropped) + len(survivors) + len(dead_letters) == len(labels)

    funnel = json.loads((output / "funnel.json").read_text())
    assert funnel["in"] == len(labels)
    assert funnel["dead_letters"] == dict(Counter(letter["reason"] for letter in dead_letters.values()))
    assert {rule["name"]: rule["dropped"] for rule in funnel["rules"] if rule["dropped"]} == Counter(
        row["dropped_by"] for row in decisions.values() if row["dropped_by"]
    )
    assert funnel["survivors"] == len(survivors)


def test_funnel_is_additive_rule_by_rule(output):
    funnel = json.loads((output / "funnel.json").read_text())
    left = funnel["in"] - sum(funnel["dead_letters"].values())
    for rule in funnel["rules"]:
        assert rule["in"] == left == rule["kept"] + rule["dropped"]
        left = rule["kept"]
    assert left == funnel["survivors"]


def test_subset_is_the_copies_of_the_decisions(output, decisions):
    subset = np.load(output / "subset.npy")
    assert subset.dtype == np.dtype("u8,u8")
    assert (np.sort(subset) == subset).all()
    found = Counter(f"{int(high):016x}{int(low):016x}" for high, low in subset)
    assert found == {uid: row["copies"] for uid, row in decisions.items() if row["copies"]}
    assert all(row["copies"] == 0 for row in decisions.values() if row["dropped_by"])


# Planted kind -> the least share of its samples that its own rule drops or that become dead letters.
LEAST_SHARES = {
    "exact_copy": 0.95,
    "near_copy": 0.95,
    "language": 0.95,
    "frequent_caption": 0.95,
    "names_numbers": 0.95,
    "short_caption": 0.95,
    "aspect": 0.95,
    "small": 0.95,
    "face": 0.95,
    "truncated": 0.95,
    "undecodable": 0.95,
    "missing_caption": 0.95,
    "swapped": 0.7,
    "text_only": 0.7,
}


@pytest.fixture(scope="module")
def shares(output, dead_letters, labels) -> dict[str, float]:
    """The share of each planted kind that its own rule drops or that becomes dead letters, and the share of other
    English pairs that survive."""
    return judge_planted(output, dead_letters, labels)[0]


def judge_planted(output, dead_letters, labels) -> tuple[dict[str, float], str]:
    """The shares, and a printable table of them."""
    from pipeline.output_folder import tables
    from pipeline.output_folder.layout import Layout
    from transforms.core.records import Annotation
    from transforms.rules import rules_of

    recipe = load_recipe(str(RECIPE))
    local, scored = rules_of(recipe, STAGES[0]), rules_of(recipe, STAGES[1])
    annotations: dict[str, Annotation] = {}
    for shard in list_shards(str(POOL)):
        annotations |= {a.uid: a for a in tables.read_annotations(Layout(str(output)), shard.name)}

    total: Counter[str] = Counter()
    gone: Counter[str] = Counter()
    english = english_after_1 = english_after_2 = 0
    by_rule: dict[str, Counter[str]] = defaultdict(Counter)
    for label in labels:
        kind, uid = label["kind"], label["uid"]
        total[kind] += 1
        if uid in dead_letters:
            gone[kind] += 1
            by_rule[kind][dead_letters[uid]["reason"]] += 1
            continue
        annotation = annotations[uid]
        failing_1 = [rule.name for rule in local if not rule.keeps(annotation)]
        failing_2 = [] if failing_1 else [rule.name for rule in scored if not rule.keeps(annotation)]
        by_rule[kind].update(failing_1 + failing_2)
        gone[kind] += bool(set(label["rule"].split("|")) & set(failing_1 + failing_2))
        if not kind and label["english_noun"] == "1":
            english += 1
            english_after_1 += not failing_1
            english_after_2 += not failing_1 and not failing_2

    table = Table("planted", "samples", "share gone by its own rule", "every rule that it fails")
    for kind in sorted(total):
        if kind:
            rules = ", ".join(f"{name} {count}" for name, count in by_rule[kind].most_common())
            table.add_row(kind, str(total[kind]), f"{gone[kind] / total[kind]:.2f}", rules)
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(table)
    console.print(
        f"unplanted English pairs with a noun: {english}; survive stage 1: {english_after_1 / english:.3f}; "
        f"of those survive stage 2: {english_after_2 / english_after_1:.3f}"
    )

    assert LEAST_SHARES.keys() | {"", "digit"} == total.keys()
    found = {kind: gone[kind] / total[kind] for kind in LEAST_SHARES}
    found |= {"stage 1": english_after_1 / english, "stage 2": english_after_2 / english_after_1}
    return found, console.export_text()


@pytest.mark.parametrize("kind", sorted(LEAST_SHARES))
def test_planted_cases_are_dropped_by_their_own_rule(shares, kind):
    assert shares[kind] >= LEAST_SHARES[kind]


def test_good_pairs_are_kept(shares, output, dead_letters, labels, record_property):
    record_property(TABLE, judge_planted(output, dead_letters, labels)[1])
    assert shares["stage 1"] >= 0.85
    assert shares["stage 2"] >= 0.8


# At the size of the demo; tests/integration/test_reruns.py compares the same of a small pool with tiny models.
@pytest.mark.slow
def test_outputs_do_not_depend_on_the_order_of_shards(output, tmp_path, monkeypatch):
    plain = listing.read_listing
    monkeypatch.setattr(listing, "read_listing", lambda layout: plain(layout)[::-1])
    run_demo(tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(output)


@pytest.mark.slow
def test_outputs_do_not_depend_on_the_number_of_worker_processes(output, tmp_path):
    run_demo(tmp_path / "out", "--direct_num_workers=2", "--direct_running_mode=multi_processing")
    assert snapshot(tmp_path / "out") == snapshot(output)


def test_a_second_run_reads_no_shard_again(output, tmp_path, monkeypatch):
    from pipeline.sources import shards

    before = snapshot(output)

    def refuse(*_: object) -> None:
        raise AssertionError("a finished shard was opened")

    monkeypatch.setattr(shards, "read_samples", refuse)
    run_demo(output)
    assert snapshot(output) == before


def test_the_subset_can_be_resharded(output, decisions, tmp_path):
    done = reshard(str(output), str(POOL), str(tmp_path / "tars"), 50, [], Progress(Console(stderr=True)))
    found = [s for shard in list_shards(str(tmp_path / "tars")) for s in read_samples(shard, PoolSettings(), "test")]
    assert all(isinstance(sample, Sample) for sample in found)
    uids = [sample.annotation.uid for sample in found if isinstance(sample, Sample)]
    assert Counter(uids) == {uid: row["copies"] for uid, row in decisions.items() if row["copies"]}
    assert least_apart((uid, row) for row, uid in enumerate(uids)) >= done.placement.least_rows_apart > 50


@pytest.mark.parametrize("target", [{"survivors": True}, {"pool_share": 0.2}, {"pool_share": 0.1}])
def test_the_digit_task_alone_raises_the_share_of_digit_pictures(output, labels, tmp_path, target):
    """CIDS alone, without digit enhancement or quality duplication, at its default temperature and cap."""
    demo = load_recipe(str(RECIPE)).distribution_alignment
    assert demo.cids is not None
    alone = DistributionAlignmentSettings(
        target=TargetSettings(**target),
        clusters=demo.clusters,
        semantic_dedup=demo.semantic_dedup,
        cids=CidsSettings(tasks=demo.cids.tasks, task_weights={"digits": 1.0}),
    )
    changed = load_recipe(str(RECIPE)).model_copy(update={"distribution_alignment": alone})
    shutil.copytree(output / "annotations", tmp_path / "annotations")
    job = graphs.Job(changed, tuple(list_shards(str(POOL))), Layout(str(tmp_path)), {stage: {} for stage in STAGES})
    write_listing(job.layout, job.shards)
    stage._run_stage("distribution_alignment", job, [])

    digits = {label["uid"] for label in labels if label["digit"] == "1"}
    subset = [f"{int(high):016x}{int(low):016x}" for high, low in np.load(tmp_path / "subset.npy")]
    of_pool, of_subset = len(digits) / len(labels), sum(uid in digits for uid in subset) / len(subset)
    assert of_pool <= 0.1
    assert of_subset >= 3 * of_pool
