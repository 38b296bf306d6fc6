"""The Python API: every public name exists, and the import loads nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pairsift
from tests.helpers import picture, sample_members, settings, write_pool
from transforms.core.errors import UsageError


def test_every_public_name_exists_and_is_documented() -> None:
    assert sorted(pairsift.__all__) == sorted(pairsift._MODULE_OF) == sorted(dir(pairsift))
    assert all(getattr(pairsift, name).__doc__ for name in pairsift.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pairsift.nothing


def test_import_loads_neither_beam_nor_torch() -> None:
    program = "import sys, pairsift; pairsift.Rule; pairsift.load_recipe; print([m for m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pairsift" in found and "'apache_beam'" not in found and "'torch'" not in found


def test_a_run_is_opened_and_decided_again(tmp_path: Path) -> None:
    members = [
        member
        for n in range(3)
        for member in sample_members(f"k{n}", seed=n, metadata={"uid": f"{n:032x}"})
    ]  # fmt: skip
    write_pool(tmp_path / "pool", {"a.tar": members})
    content = settings(
        single_modality={}, cross_modality={"flipped_clip": {"model": "bundled:clip", "min": -1.0, "batch_size": 4}},
        distribution_alignment={"target": {"survivors": True}, "clusters": {"count": 1}},
    )  # fmt: skip
    recipe = pairsift.parse_recipe(content, "test")
    with pytest.raises(UsageError, match="has no results"):
        pairsift.open_run(str(tmp_path / "out"))
    assert pairsift.run(recipe, str(tmp_path / "pool"), str(tmp_path / "out"), stages=["single_modality"]) is None
    found = pairsift.run(recipe, str(tmp_path / "pool"), str(tmp_path / "out"))
    assert found is not None and found.recipe == recipe and found.shards == ["a"]

    decisions = found.decisions(["uid", "copies", "flipped_clip_cosine"])
    assert decisions["copies"].to_pylist() == [1, 1, 1]
    assert found.funnel().to_pylist() == json.loads((tmp_path / "out" / "funnel.json").read_text())["rules"]
    assert found.subset().tolist() == [(0, 0), (0, 1), (0, 2)]
    image = found.picture(f"{1:032x}")
    assert image.mode == "RGB" and np.abs(np.asarray(image, int) - np.asarray(picture(seed=1), int)).mean() < 8
    with pytest.raises(KeyError, match="no sample of this run"):
        found.picture("f" * 32)

    threshold = sorted(decisions["flipped_clip_cosine"].to_pylist())[1]
    content["cross_modality"]["flipped_clip"]["min"] = threshold
    again = pairsift.select(pairsift.parse_recipe(content, "test"), str(tmp_path / "out"))
    assert sorted(again.decisions()["copies"].to_pylist()) == [0, 1, 1]
