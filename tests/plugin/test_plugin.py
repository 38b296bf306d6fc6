"""The example plug-in, installed as its users install it: its rule takes part in a run like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers import sample_members, settings, write_pool

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in, as pip installs it."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path_factory.mktemp("source") / "plugin"
    subprocess.run(["cp", "-r", str(ROOT / "examples" / "plugin"), str(source)], check=True)
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return target


def pairsift(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(installed)])
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        cwd=installed,
    )


def write_recipe(path: Path, **section: object) -> str:
    content = settings()
    content["single_modality"] = {"sharpness": section}
    content["cross_modality"] = {
        "flipped_clip": {"model": "bundled:clip", "min": -1.0, "batch_size": 4},
    }
    content["distribution_alignment"] = {"target": {"survivors": True}, "clusters": {"count": 1}}
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_the_rule_of_another_package_takes_part_in_a_run(installed: Path, tmp_path: Path) -> None:
    members = [member for n in range(4) for member in sample_members(f"k{n}", seed=n)]
    write_pool(tmp_path / "pool", {"a.tar": members})
    recipe = write_recipe(tmp_path / "recipe.yaml", min_variance=0.0)
    done = pairsift(installed, "run", recipe, "--input", str(tmp_path / "pool"), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (table,) = (tmp_path / "out" / "decisions").glob("*.parquet")
    variances = pq.read_table(table)["sharpness_variance"].to_pylist()
    assert len(variances) == 4 and min(variances) > 0

    threshold = sorted(variances)[2]
    recipe = write_recipe(tmp_path / "recipe.yaml", min_variance=threshold)
    done = pairsift(installed, "select", recipe, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    rules = {rule["name"]: rule for rule in json.loads((tmp_path / "out" / "funnel.json").read_text())["rules"]}
    assert (rules["sharpness"]["stage"], rules["sharpness"]["dropped"]) == ("single_modality", 2)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["models"]["single_modality"]["sharpness"] == {"package": "pairsift-sharpness 1.0.0"}

    recipe = write_recipe(tmp_path / "recipe.yaml", min_variance=threshold, blur_px=3)
    done = pairsift(installed, "select", recipe, "--output", str(tmp_path / "out"))
    assert done.returncode == 2  # other pixels are compared: the columns are computed again by `run`


def test_its_settings_are_validated(installed: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", min_variance=-1.0, strength=3)
    done = pairsift(installed, "validate", recipe)
    assert done.returncode == 2
    assert "single_modality.sharpness.min_variance: got -1.0" in done.stderr
    assert "single_modality.sharpness.strength: unknown setting (got 3)" in done.stderr


def test_without_the_package_the_section_is_unknown(tmp_path: Path) -> None:
    done = pairsift(tmp_path, "validate", write_recipe(tmp_path / "recipe.yaml"))
    assert done.returncode == 2
    assert "single_modality.sharpness: unknown setting" in done.stderr
