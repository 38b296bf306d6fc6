"""The figures of original sizes on the set that is made on the fly."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rules import size
from benchmarks.rules.figures import Sources


def test_every_right_size_is_believed_and_no_other(tmp_path: Path) -> None:
    right, wrong, pool = size.measure(Sources(tmp_path))
    assert right.count == right.of > 20_000
    assert (wrong.count, wrong.of > 10_000) == (0, True)
    assert pool.missing
