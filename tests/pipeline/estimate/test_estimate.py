"""`pairsift estimate`: plans computed by hand, and a source for every figure."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.dataflow.settings import GPUS, load_dataflow_settings
from pipeline.estimate import formulas
from pipeline.estimate.figures import load_figures
from pipeline.estimate.plan import COMPUTED, EXTRAPOLATED, CannotEstimate, Machines, Plan, Question
from pipeline.estimate.planner import estimate
from pipeline.estimate.units import GIB, SECONDS_PER_HOUR
from pipeline.estimate.view import EXAMPLE, parse_samples
from pipeline.sinks.subset import _by_range
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES, load_recipe
from transforms.distribution_alignment.tiles import TILE_ROWS

ROOT = Path(__file__).parents[3]
PAPER = str(ROOT / "recipes" / "paper.yaml")
KNOWN = load_figures()
MACHINES = Machines.of(load_dataflow_settings(EXAMPLE), "templates/dataflow.yaml")


def plan(samples: int = 1_000_000_000, **changes: Any) -> Plan:
    return estimate(Question(load_recipe(PAPER), samples, MACHINES, KNOWN, **changes))


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["estimate", PAPER, *arguments])


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


def test_doubling_the_samples_doubles_what_is_linear_in_them() -> None:
    once, twice = plan(10**8), plan(2 * 10**8)
    for name in (
        "single_modality/worker_hours", "single_modality/hours", "single_modality/cost", "single_modality/shuffle",
        "cross_modality/worker_hours", "cross_modality/cost", "cross_modality/storage",
        "distribution_alignment/storage", "pool/storage",
    ):  # fmt: skip
        assert twice.value(name) == pytest.approx(2 * once.value(name)), name
    # Pairs within a cluster grow with the square of the samples, k-means does not grow.
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
            assert "`" in figure["source"] or "docs/" in figure["source"], name  # a command or a page
        if figure["kind"] == "price":
            assert "cloud.google.com" in figure["source"] and "us-central1" in figure["source"], name
    # All numbers are figures.
    rest = {key: value for key, value in found.items() if key != "figures"}
    assert not _numbers(rest)
    for stage in STAGES:
        assert {f"{stage}/{what}" for what in ("workers", "hours", "cost", "shuffle", "storage")} <= set(figures)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recipe": ("device: cuda", "device: cpu")},
        {"recipe": ("min: 0.19", "keep_fraction: 0.3\n    score_unflipped: true")},
        {"recipe": ("clusters: {count: 10000}", "clusters: {count: 50}")},
        {"recipe": ("clusters: {count: 10000}", "clusters: {count: 50, centroids: centroids.npy}")},
        {"recipe": ("blip2-opt-2.7b", "blip2-opt-2.7b\n    prompts: [one, two]")},
        {"samples": 3},
    ],
)
def test_every_formula_evaluates_to_its_figure(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(Path(PAPER).read_text().replace(*changes.get("recipe", ("", ""))).replace("ViT-L-14", "ViT-B-32"))
    figures = estimate(Question(load_recipe(str(path)), changes.get("samples", 10**9), MACHINES, KNOWN)).figures
    functions = {name: getattr(formulas, name) for name in dir(formulas)} | {"ceil": math.ceil}
    for name, figure in figures.items():
        if not figure.uses:
            continue
        formula = figure.source.replace("×", "*").replace("÷", "/")
        for number, use in sorted(enumerate(figure.uses), key=lambda pair: -len(pair[1])):
            assert use in formula, (name, use)
            formula = formula.replace(use, f"(v{number})")
        value = eval(formula, {**functions, **{f"v{n}": figures[use].value for n, use in enumerate(figure.uses)}})
        if value or figure.value:
            ratios = [1, SECONDS_PER_HOUR, GIB]  # units are converted: s to h, bytes to GiB
            assert any(value / figure.value == pytest.approx(ratio) for ratio in ratios), name


def _numbers(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return _numbers(list(content.values()))
    if isinstance(content, list):
        return [number for part in content for number in _numbers(part)]
    return [content] if isinstance(content, int | float) else []


def test_extrapolated_figures_are_marked() -> None:
    shown = command("--samples", "1e9", "--sources")
    assert shown.exit_code == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert "extrapolated, never measured: ViT-L-14 on nvidia-l4" in words
    assert "worker hours ~1,100 worker h" in words and "worker hours 239.3 worker h" in words
    assert plan().is_extrapolated("total/cost") and not plan().is_extrapolated("single_modality/cost")
    assert plan().figures["cross_modality/rate/digit"].kind == EXTRAPOLATED
    assert not any(f.kind == "measured" and "nvidia" in name for name, f in plan().figures.items())


def test_measured_rates_replace_extrapolated_ones(tmp_path: Path) -> None:
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


def test_shares_from_a_funnel(tmp_path: Path) -> None:
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
    assert wrong.exit_code == 2 and "has no flipped_clip" in wrong.stderr


def test_figures_of_a_file_replace_the_packages(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("figures: {price/nvidia-l4_hour: {value: 1.0, unit: USD/GPU h, kind: price, source: my contract}}")
    found = json.loads(command("--samples", "1e9", "--figures", str(path), "--json").stdout)["figures"]
    assert found["price/nvidia-l4_hour"] == {
        "value": 1.0, "unit": "USD/GPU h", "kind": "price", "source": "my contract", "uses": [],
    }  # fmt: skip
    path.write_text("figures: {prise/nvidia-l4_hour: {value: 1.0, unit: USD, kind: price, source: mine}}")
    wrong = command("--samples", "1e9", "--figures", str(path))
    assert wrong.exit_code == 2 and "prise/nvidia-l4_hour: unknown" in wrong.stderr
    path.write_text("figures: {price/nvidia-l4_hour: {value: 1.0, unit: EUR/GPU h, kind: price, source: mine}}")
    wrong = command("--samples", "1e9", "--figures", str(path))
    assert wrong.exit_code == 2 and "got EUR/GPU h; allowed: USD/GPU h" in wrong.stderr


def test_a_new_figure_with_a_wrong_unit(tmp_path: Path) -> None:
    known = {name: figure for name, figure in KNOWN.items() if name != "memory/n2-standard"}
    with pytest.raises(CannotEstimate, match="n2-standard-8: unknown memory; give `memory/n2-standard`"):
        estimate(Question(load_recipe(PAPER), 10**9, MACHINES, known))
    known["memory/n2-standard"] = KNOWN["memory/n2-standard"].model_copy(update={"unit": "s"})
    with pytest.raises(CannotEstimate, match="× single_modality/vcpus: s cannot be converted to GiB"):
        estimate(Question(load_recipe(PAPER), 10**9, MACHINES, known))


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "1e99", "nan", "1e-3"])
def test_invalid_samples(text: str) -> None:
    with pytest.raises(CannotEstimate, match="--samples: got"):
        parse_samples(text)


def test_valid_samples() -> None:
    assert [parse_samples(text) for text in ("1e9", "1_000_000", "12800000", "1.28e10")] == [
        10**9, 10**6, 12_800_000, 12_800_000_000,
    ]  # fmt: skip


def test_wrong_options_exit_with_2() -> None:
    at_size = ["--samples", "1e9"]
    for arguments in (
        ["--samples", "many"], [*at_size, "--funnel", "nowhere.json"], [*at_size, "--like", "x"],
        [*at_size, "--settings", "nowhere.yaml"],
    ):  # fmt: skip
        done = command(*arguments)
        assert done.exit_code == 2, done.stdout
        assert len(done.stderr.strip().splitlines()) == 1
    reported = json.loads(command("--samples", "many", "--json").stdout)
    assert reported["event"] == "error"


def test_an_unknown_model_needs_like(tmp_path: Path) -> None:
    recipe = tmp_path / "baked.yaml"
    recipe.write_text(Path(PAPER).read_text().replace("Salesforce/blip-itm-base-coco", "/models/itm"))
    unknown = CliRunner().invoke(app, ["estimate", str(recipe), "--samples", "1e9"])
    assert unknown.exit_code == 2 and "say `--like /models/itm=MODEL`" in unknown.stderr
    like = "/models/itm=Salesforce/blip-itm-base-coco"
    known = CliRunner().invoke(app, ["estimate", str(recipe), "--samples", "1e9", "--like", like, "--json"])
    assert json.loads(known.stdout)["figures"]["total/cost"]["value"] == plan().value("total/cost")


def test_warnings() -> None:
    assert any("longer than a week" in warning for warning in plan(10**12).warnings)
    assert any("keep at most that many workers busy" in warning for warning in plan(10**5).warnings)
    assert any("one worker reads their listing" in warning for warning in plan(samples_per_shard=100).warnings)
    assert not any("longer than a week" in warning for warning in plan(10**8).warnings)


def test_prices_of_another_region_give_a_warning() -> None:
    elsewhere = dataclasses.replace(MACHINES, region="europe-west4")
    warnings = estimate(Question(load_recipe(PAPER), 10**9, elsewhere, KNOWN)).warnings
    assert any("the prices are for us-central1, but the jobs run in europe-west4" in warning for warning in warnings)


def test_copied_constants_are_those_of_the_pipeline() -> None:
    assert formulas.TILE_ROWS == TILE_ROWS
    assert _by_range.__doc__ and "two digits" in _by_range.__doc__ and formulas.SUBSET_RANGES == 16**2


def test_every_gpu_of_the_settings_has_a_price() -> None:
    for gpu in GPUS:
        assert f"price/{gpu}_hour" in KNOWN, gpu


def test_the_plan_uses_every_measured_shuffle() -> None:
    used = set(plan().figures)
    for stage in (SINGLE_MODALITY, CROSS_MODALITY, DISTRIBUTION_ALIGNMENT):
        assert {name for name in KNOWN if name.startswith(f"shuffle/{stage}/")} <= used


def test_measured_shuffles_are_current_steps() -> None:
    steps = [f"{step}/" for step in (ROOT / "tests/pipeline/dataflow/step_names.txt").read_text().splitlines()]
    for name in KNOWN:
        if name.startswith("shuffle/"):
            _, stage, *step, _unit = name.split("/")
            found = any(other.startswith(f"{stage}: {'/'.join(step)}/") for other in steps)
            assert found, f"{name}: measure it again (`python -m benchmarks.costs`)"


def test_limits_of_dataflow_give_warnings(tmp_path: Path) -> None:
    recipe = tmp_path / "fine.yaml"
    recipe.write_text(Path(PAPER).read_text().replace("clusters: {count: 10000}", "clusters: {count: 2000000}"))
    done = CliRunner().invoke(app, ["estimate", str(recipe), "--samples", "1e10", "--json"])
    assert any("2,000,000 clusters" in warning for warning in json.loads(done.stdout)["warnings"])


def test_imports_load_no_torch() -> None:
    """Nor Beam, where only modules of this package are concerned: `transforms.storage.files` imports it."""
    for module in ("units", "quantity", "formulas"):
        assert _loaded(f"import pipeline.estimate.{module}") == set(), module
    assert _loaded("import pipeline.estimate.view") == _loaded("import transforms.storage.files") <= {"apache_beam"}


def _loaded(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{'torch', 'apache_beam'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(done.stdout.split())
