"""Prints the tables that tests record, at the end of the run and also when several processes ran them; what is tried
again is tried at once."""

from __future__ import annotations

from typing import Any

import pytest

from transforms.storage import steady_reader


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found]
    tables = {value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "table"}
    for table in sorted(tables):
        terminalreporter.write_line("")
        terminalreporter.write_line(table)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited before each new try, which now none waits."""
    waited: list[float] = []
    monkeypatch.setattr(steady_reader, "sleep", waited.append)
    return waited
