"""`pairsift estimate`: formulas worked by hand, and no figure without a source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.dataflow.settings import GPUS, load_dataflow_settings
from pipeline.estimate import planner
from pipeline.estimate.figures import load_figures
from pipeline.estimate.planner import COMPUTED, EXTRAPOLATED, GIB, CannotEstimate, Machines, Question
from pipeline.estimate.view import EXAMPLE, parse_samples
from pipeline.sinks.subset import _by_range
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES, load_recipe
from transforms.distribution_alignment.tiles import TILE_ROWS

ROOT = Path(__file__).parents[3]
PAPER = str(ROOT / "recipes" / "paper.yaml")
KNOWN = load_figures()
MACHINES = Machines.of(load_dataflow_settings(EXAMPLE), "templates/dataflow.yaml")


def plan(samples: int = 1_000_000_000, **changes: Any) -> planner.Plan:
    return planner.estimate(Question(load_recipe(PAPER), samples, MACHINES, KNOWN, **changes))


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["estimate", PAPER, *arguments])


def test_of_how_many_kinds_some_draws_are() -> None:
    assert planner.distinct(1, 10) == pytest.approx(1)
    assert planner.distinct(2, 4) == pytest.approx(1.75)  # 4 · (1 − 9/16)
    assert planner.distinct(1000, 1) == pytest.approx(1)
    assert planner.distinct(0, 7) == 0


def test_operations_of_stage_3_by_hand() -> None:
    assert planner.assignment_flops(1000, 10, 4) == 80_000
    assert planner.dedup_flops(1000, 10, 4) == 400_000  # 10 clusters of 100² / 2 pairs, 8 operations each
    # one level: 5 rounds, all 1,000 rows with all 10 centroids
    assert planner.kmeans_flops(1000, 10, 1, 256, 5, 4) == 2 * 5 * 4 * 1000 * 10
    # two levels, 3 rows a cluster: 12 rows with 4 coarse ones, 48 rows with the 4 fine ones of their own
    assert planner.kmeans_flops(1000, 16, 4, 3, 5, 4) == 2 * 5 * 4 * (12 * 4 + 48 * 4)
    assert planner.serial_kmeans_flops(1000, 16, 4, 3, 5, 4) == 2 * 5 * 4 * 12 * 4
    assert planner.serial_kmeans_flops(1000, 10, 1, 256, 5, 4) == planner.kmeans_flops(1000, 10, 1, 256, 5, 4)


def test_memory_of_machine_types() -> None:
    assert planner.memory_gib_of("n2-standard-8", KNOWN)[1] == 32
    assert planner.memory_gib_of("a2-highgpu-1g", KNOWN)[1] == pytest.approx(85)
    assert planner.memory_gib_of("n2-custom-8-16384", KNOWN)[1] == 16
    with pytest.raises(CannotEstimate, match="memory/m9-standard"):
        planner.memory_gib_of("m9-standard-8", KNOWN)


def test_the_plan_of_the_paper_by_hand() -> None:
    made = plan(bytes_per_sample=1024)
    scored = 1e9 * KNOWN["share/single_modality"].value
    assert made.value("scored") == pytest.approx(scored)
    assert made.value("pool/storage") == pytest.approx(1e9 * 1024 / GIB)
    seconds = KNOWN["cpu/single_modality"].value + KNOWN["cpu/pool_wide"].value
    assert made.value("single_modality/hours") == pytest.approx(1e9 * seconds / 3600 / 8 / 100)
    # 100 machines of 8 vCPUs, 32 GiB and 50 GB, FlexRS
    hour = 8 * 0.0336 + 32 * 0.0021342 + 50 * 0.000054
    assert made.value("single_modality/cost/workers") == pytest.approx(1e9 * seconds / 3600 / 8 * hour)
    passing = scored * KNOWN["share/flipped_clip"].value
    at_peak = 0.3 * 1.21e14
    gpu = (scored * 1.75325e11 + passing * 1.41499e11 + passing * 7.65779e11) / at_peak / 3600
    assert made.value("cross_modality/worker_hours") == pytest.approx(gpu)
    assert made.value("cross_modality/cost") == pytest.approx(gpu * (8 * 0.056 + 32 * 0.003557 + 0.0054 + 0.672048))
    assert made.value("total/cost") == pytest.approx(sum(made.value(f"{stage}/cost") for stage in STAGES))
    row = KNOWN["bytes/cross_modality"].value + 2 * 768
    assert made.value("cross_modality/storage") == pytest.approx(scored * row / GIB)


def test_twice_the_samples_take_twice_what_hangs_on_samples() -> None:
    once, twice = plan(10**8), plan(2 * 10**8)
    for name in (
        "single_modality/worker_hours", "single_modality/hours", "single_modality/cost", "single_modality/shuffle",
        "cross_modality/worker_hours", "cross_modality/cost", "cross_modality/storage",
        "distribution_alignment/storage", "pool/storage",
    ):  # fmt: skip
        assert twice.value(name) == pytest.approx(2 * once.value(name)), name
    # Pairs within a cluster grow with the square, k-means with nothing.
    name = "distribution_alignment/core_hours/products"
    assert 1 < twice.value(name) / once.value(name) < 4


def test_every_figure_has_a_source() -> None:
    found = json.loads(command("--samples", "1e9", "--json").stdout)
    figures = found["figures"]
    for name, figure in figures.items():
        assert set(figure) == {"value", "unit", "kind", "source", "uses"} and figure["source"] and figure["unit"], name
        assert bool(figure["uses"]) == (figure["kind"] in (COMPUTED, EXTRAPOLATED)), name
        assert all(use in figures for use in figure["uses"]), name
        if figure["kind"] == "measured":
            assert "`" in figure["source"] or "docs/" in figure["source"], name  # a command, or the page that has it
        if figure["kind"] == "price":
            assert "cloud.google.com" in figure["source"] and "us-central1" in figure["source"], name
    # No number stands beside them.
    rest = {key: value for key, value in found.items() if key != "figures"}
    assert not _numbers(rest)
    for stage in STAGES:
        assert {f"{stage}/{what}" for what in ("workers", "hours", "cost", "shuffle", "storage")} <= set(figures)


def _numbers(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return _numbers(list(content.values()))
    if isinstance(content, list):
        return [number for part in content for number in _numbers(part)]
    return [content] if isinstance(content, int | float) else []


def test_what_was_not_measured_says_extrapolated() -> None:
    shown = command("--samples", "1e9", "--sources")
    assert shown.exit_code == 0, shown.stderr
    assert "extrapolated, never measured: ViT-L-14 on nvidia-l4" in shown.stdout
    assert plan().figures["cross_modality/rate/digit"].kind == EXTRAPOLATED
    assert not any(f.kind == "measured" and "nvidia" in name for name, f in plan().figures.items())


def test_your_own_measurement_takes_its_place(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    rates = {"clip bf16 stage 2, pairs/s": 400.0, "itm bf16 RunInference, pairs/s": 300.0,
             "digit bf16 RunInference, pairs/s": 50.0, "gpu": "NVIDIA L4"}  # fmt: skip
    file.write_text("something before\n" + json.dumps(rates))
    found = json.loads(command("--samples", "1e9", "--measured", str(file), "--json").stdout)["figures"]
    assert found["cross_modality/model_hours/digit"]["value"] == pytest.approx(
        found["kept by image_text_matching"]["value"] / 50 / 3600
    )
    assert str(file) in found["rate/Salesforce/blip2-opt-2.7b/bf16/nvidia-l4"]["source"]
    assert not any(figure["kind"] == EXTRAPOLATED for figure in found.values())
    file.write_text(json.dumps({**rates, "gpu": "Tesla T4"}))
    wrong = command("--samples", "1e9", "--measured", str(file))
    assert wrong.exit_code == 2 and "was measured on Tesla T4, but the launch settings say nvidia-l4" in wrong.stderr


def test_a_funnel_of_your_own(tmp_path: Path) -> None:
    rules = [
        {"name": "language", "stage": "single_modality", "in": 90, "dropped": 50, "kept": 40},
        {"name": "min_side", "stage": "single_modality", "in": 40, "dropped": 20, "kept": 20},
        {"name": "flipped_clip", "stage": "cross_modality", "in": 20, "dropped": 12, "kept": 8},
        {"name": "image_text_matching", "stage": "cross_modality", "in": 8, "dropped": 2, "kept": 6},
    ]
    path = tmp_path / "funnel.json"
    path.write_text(json.dumps({"in": 100, "rules": rules}))
    found = json.loads(command("--samples", "1e6", "--funnel", str(path), "--json").stdout)["figures"]
    assert found["scored"]["value"] == pytest.approx(200_000)  # 10 dead letters are not scored either
    assert found["kept by flipped_clip"]["value"] == pytest.approx(80_000)
    assert found["candidates"]["value"] == pytest.approx(60_000)
    assert found["share/flipped_clip"]["source"] == str(path)
    path.write_text(json.dumps({"in": 100, "rules": rules[:2]}))
    wrong = command("--samples", "1e6", "--funnel", str(path))
    assert wrong.exit_code == 2 and "says nothing of flipped_clip" in wrong.stderr


def test_your_own_price_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("figures: {price/nvidia-l4_hour: {value: 1.0, unit: USD/GPU h, kind: price, source: my contract}}")
    found = json.loads(command("--samples", "1e9", "--figures", str(path), "--json").stdout)["figures"]
    assert found["price/nvidia-l4_hour"] == {
        "value": 1.0, "unit": "USD/GPU h", "kind": "price", "source": "my contract", "uses": [],
    }  # fmt: skip
    path.write_text("figures: {prise/nvidia-l4_hour: {value: 1.0, unit: USD, kind: price, source: mine}}")
    wrong = command("--samples", "1e9", "--figures", str(path))
    assert wrong.exit_code == 2 and "prise/nvidia-l4_hour: unknown" in wrong.stderr


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "1e99", "nan", "1e-3"])
def test_samples_that_are_none(text: str) -> None:
    with pytest.raises(CannotEstimate, match="--samples: got"):
        parse_samples(text)


def test_samples_as_people_write_them() -> None:
    assert [parse_samples(text) for text in ("1e9", "1_000_000", "12800000", "1.28e10")] == [
        10**9, 10**6, 12_800_000, 12_800_000_000,
    ]  # fmt: skip


def test_wrong_use_ends_with_status_2() -> None:
    at_size = ["--samples", "1e9"]
    for arguments in (
        ["--samples", "many"], [*at_size, "--funnel", "nowhere.json"], [*at_size, "--like", "x"],
        [*at_size, "--settings", "nowhere.yaml"],
    ):  # fmt: skip
        done = command(*arguments)
        assert done.exit_code == 2, done.stdout
        assert len(done.stderr.strip().splitlines()) == 1
    told = json.loads(command("--samples", "many", "--json").stdout)
    assert told["event"] == "error"


def test_a_model_that_is_not_known(tmp_path: Path) -> None:
    recipe = tmp_path / "baked.yaml"
    recipe.write_text(Path(PAPER).read_text().replace("Salesforce/blip-itm-base-coco", "/models/itm"))
    unknown = CliRunner().invoke(app, ["estimate", str(recipe), "--samples", "1e9"])
    assert unknown.exit_code == 2 and "say `--like /models/itm=MODEL`" in unknown.stderr
    like = "/models/itm=Salesforce/blip-itm-base-coco"
    known = CliRunner().invoke(app, ["estimate", str(recipe), "--samples", "1e9", "--like", like, "--json"])
    assert json.loads(known.stdout)["figures"]["total/cost"]["value"] == plan().value("total/cost")


def test_what_may_surprise_is_said() -> None:
    assert any("longer than a week" in warning for warning in plan(10**12).warnings)
    assert any("keep no more workers than that busy" in warning for warning in plan(10**5).warnings)
    assert any("one worker reads their listing" in warning for warning in plan(samples_per_shard=100).warnings)
    assert not any("longer than a week" in warning for warning in plan(10**8).warnings)


def test_prices_of_another_region_are_said() -> None:
    elsewhere = dataclasses.replace(MACHINES, region="europe-west4")
    warnings = planner.estimate(Question(load_recipe(PAPER), 10**9, elsewhere, KNOWN)).warnings
    assert any("prices are those of us-central1, the jobs run in europe-west4" in warning for warning in warnings)


def test_the_numbers_that_are_the_code_s() -> None:
    assert planner.TILE_ROWS == TILE_ROWS
    assert _by_range.__doc__ and "two digits" in _by_range.__doc__ and planner.SUBSET_RANGES == 16**2


def test_every_gpu_and_machine_of_the_settings_is_priced() -> None:
    for gpu in GPUS:
        assert f"price/{gpu}_hour" in KNOWN, gpu


def test_shuffles_that_are_measured_are_reckoned_with() -> None:
    used = set(plan().figures)
    for stage in (SINGLE_MODALITY, CROSS_MODALITY, DISTRIBUTION_ALIGNMENT):
        assert {name for name in KNOWN if name.startswith(f"shuffle/{stage}/")} <= used


def test_shuffles_that_were_measured_are_steps_of_today() -> None:
    steps = [f"{step}/" for step in (ROOT / "tests/pipeline/dataflow/step_names.txt").read_text().splitlines()]
    for name in KNOWN:
        if name.startswith("shuffle/"):
            _, stage, *step, _unit = name.split("/")
            found = any(other.startswith(f"{stage}: {'/'.join(step)}/") for other in steps)
            assert found, f"{name}: measure it again (`python -m benchmarks.costs`)"


def test_limits_of_dataflow_are_said_before_a_launch(tmp_path: Path) -> None:
    recipe = tmp_path / "fine.yaml"
    recipe.write_text(Path(PAPER).read_text().replace("clusters: {count: 10000}", "clusters: {count: 2000000}"))
    done = CliRunner().invoke(app, ["estimate", str(recipe), "--samples", "1e10", "--json"])
    assert any("2,000,000 clusters" in warning for warning in json.loads(done.stdout)["warnings"])
