"""Tests of the demo recipe on real photographs and textbook captions, if that pool is next to the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.demo_run import write_small_pool

POOL = Path(__file__).parents[3] / "shared" / "data" / "openstax_pool"
RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"


@pytest.mark.skipif(not POOL.is_dir(), reason="the OpenStax pool is not beside this checkout")
@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_real_pool_ends_with_an_additive_funnel(tmp_path, is_whole):
    pool = POOL if is_whole else write_small_pool(tmp_path / "pool", 40, POOL)
    command = [sys.executable, "-m", "pipeline.cli", "run", str(RECIPE), "--input", str(pool)]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    funnel = json.loads((tmp_path / "out" / "funnel.json").read_text())
    keys = {
        (path.name, member.name.split(".")[0])
        for path in pool.glob("*.tar")
        for member in tarfile.open(path)  # noqa: SIM115
    }
    assert funnel["in"] == len(keys)
    dropped = sum(rule["dropped"] for rule in funnel["rules"])
    assert funnel["in"] == dropped + funnel["survivors"] + sum(funnel["dead_letters"].values())
