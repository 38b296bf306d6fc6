"""The figures of `near_duplicate` on the set that is part of the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rules import near_duplicates
from benchmarks.rules.figures import Sources
from benchmarks.rules.near_duplicates import DEMO_POOL, copies_of, labels, pairs_of
from transforms.single_modality.near_duplicate import NearDuplicateSettings


def test_pairs_of_the_demo_pool() -> None:
    found = pairs_of(Sources(DEMO_POOL), "demo pool", NearDuplicateSettings())
    assert len(found) == 36
    assert all(labels()["demo pool", one, other] for one, other in found)


def test_copies_of_the_demo_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "PICTURES", 6)
    found = copies_of(Sources(DEMO_POOL), "demo pool", chosen_on=False)
    for kind in list(near_duplicates.COPIES)[:2]:
        assert found[kind].within(NearDuplicateSettings()).all(), kind


def test_absent_sets_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "DEMO_POOL", tmp_path)
    assert all(figure.missing for figure in near_duplicates.measure(Sources(tmp_path)))
