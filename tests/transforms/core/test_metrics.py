"""The workers' counters equal the figures of the tables and the funnel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from apache_beam.metrics import MetricsFilter
from apache_beam.metrics.metric import MetricResults
from rich.console import Console

from pipeline.report.progress import Progress
from pipeline.runs import run as run_module
from tests.integration.chaos import Case, make_case
from transforms.core import catalogue, metrics
from transforms.core.metrics import NAMESPACE, PREFIXES, all_metrics
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES, load_recipe

Measured = dict[str, dict[str, Any]]
"""By stage: each metric's count, or its distribution."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "out"


def run(case: Case, output: Path) -> Measured:
    """Run all stages and return their workers' metrics."""
    found: list[dict[str, Any]] = []

    def counts_of(results: MetricResults) -> metrics.Counts:
        of_kinds = results.query(MetricsFilter())
        of_stage: dict[str, Any] = {}
        for result in of_kinds["counters"]:
            assert result.key.metric.namespace == NAMESPACE, result  # and not RunInference's
            name = result.key.metric.name
            assert name.startswith(PREFIXES) or all_metrics()[name].kind == "counter"
            of_stage[name] = of_stage.get(name, 0) + result.result
        for result in of_kinds["distributions"]:
            assert all_metrics()[result.key.metric.name].kind == "distribution"
            assert of_stage.setdefault(result.key.metric.name, result.result) is result.result
        found.append(of_stage)
        return metrics.counts_of(results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.runs.stage.counts_of", counts_of)
        progress = Progress(Console(stderr=True))
        run_module.run(load_recipe(str(case.recipe)), str(case.pool), str(output), list(STAGES), [], progress)
    return dict(zip(STAGES, found, strict=True))


@pytest.fixture(scope="module")
def measured(case: Case, output: Path) -> Measured:
    return run(case, output)


@pytest.fixture(scope="module")
def funnel(measured: Measured, output: Path) -> dict[str, Any]:
    return json.loads((output / "funnel.json").read_text())


def beginning(prefix: str, of_stage: dict[str, Any]) -> dict[str, int]:
    return {name.removeprefix(prefix): count for name, count in of_stage.items() if name.startswith(prefix)}


def test_counters_add_up_to_the_funnel(measured: Measured, funnel: dict[str, Any]) -> None:
    decided = measured[DISTRIBUTION_ALIGNMENT]
    assert beginning("funnel_dropped_", decided) == {r["name"]: r["dropped"] for r in funnel["rules"] if r["dropped"]}
    assert beginning("funnel_dead_letters_", decided) == funnel["dead_letters"]
    for name in ("in", "survivors", "samples", "copies"):
        assert decided[f"funnel_{name}"] == funnel[name] > 0
    of_rules = sum(beginning("funnel_dropped_", decided).values())
    of_reasons = sum(beginning("funnel_dead_letters_", decided).values())
    assert decided["funnel_in"] == of_rules + of_reasons + decided["funnel_survivors"]


def test_dead_letters_are_counted_where_they_are_found(measured: Measured, funnel: dict[str, Any]) -> None:
    of_stages = [beginning("dead_letters_", measured[stage]) for stage in STAGES]
    assert of_stages[0] == funnel["dead_letters"]  # no sample fails on a model
    assert of_stages[1:] == [{}, {}]
    assert len(of_stages[0]) >= 4


def test_counters_of_reading_and_decoding(case: Case, measured: Measured) -> None:
    sizes = {tar.name: tar.stat().st_size for tar in case.pool.iterdir()}
    first, second = measured[SINGLE_MODALITY], measured[CROSS_MODALITY]
    # One breaks off; the images of those that have samples without a json are read again.
    assert sum(sizes.values()) - sizes["00003.tar"] < first["tar_bytes_read"] < 2 * sum(sizes.values())
    assert 0 < second["tar_bytes_read"] < 2 * sum(sizes.values())
    assert first["pictures_decoded"] == first["samples_done"] + first["dead_letters_undecodable_image"]
    assert second["pictures_decoded"] == second["samples_done"]
    for of_stage in (first, second):
        assert 0 < of_stage["decode_batch_ms"].count <= of_stage["pictures_decoded"]
        assert of_stage["decode_batch_ms"].sum >= 0


def test_each_feature_is_timed_once_a_batch(measured: Measured) -> None:
    first = measured[SINGLE_MODALITY]
    features = ["image_features", *(score.name for score in catalogue.per_sample_scores())]
    times = {first[metrics.batch_ms(feature)].count for feature in features}
    assert times == {first["shards_done"]}  # each shard of this pool is one batch
    loaded = [metric for metric in all_metrics() if metric.endswith("_load_ms") and metric in first]
    assert sum(first[name].count for name in loaded) == first["models_loaded"] == len(loaded)


def test_each_call_of_a_model_is_timed(measured: Measured, funnel: dict[str, Any]) -> None:
    second = measured[CROSS_MODALITY]
    assert second["flipped_clip_samples"] == second["samples_done"]
    for model, not_asked in funnel["not_asked"].items():
        assert second[metrics.samples(model)] == second["samples_done"] - not_asked
    for model in (score.name for score in catalogue.model_scores()):
        in_calls = second[metrics.batch_samples(model)]
        assert in_calls.sum == second[metrics.samples(model)]
        assert 1 <= in_calls.min <= in_calls.max <= 4  # the recipe's batch sizes
        assert second[metrics.batch_ms(model)].count == in_calls.count
        assert second[metrics.load_ms(model)].count == 1
    assert second["models_loaded"] == 3


def test_every_metric_was_updated(measured: Measured) -> None:
    absent = all_metrics().keys() - {name for of_stage in measured.values() for name in of_stage}
    assert {name for name in absent if not name.startswith("funnel_dropped_")} == {"shards_finished_before"}
