"""Runs the longest files first, prints the tables that tests record, and provides retries without waiting."""

from __future__ import annotations

from typing import Any

import pytest

from transforms.storage import steady_reader

LONGEST_FIRST = ("tests/integration/", "tests/cloud_storage/", "tests/hostile/", "tests/transforms/models/", "tests/")
"""So that no process is left working on a long file alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [item.nodeid.startswith(folder) for folder in LONGEST_FIRST].index(True))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found]
    tables = {value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "table"}
    for table in sorted(tables):
        terminalreporter.write_line("")
        terminalreporter.write_line(table)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Skip the waiting before retries. Returns the seconds that would have been waited before each."""
    waited: list[float] = []
    monkeypatch.setattr(steady_reader, "sleep", waited.append)
    return waited
