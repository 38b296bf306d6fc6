"""Prints the tables that tests record, at the end of the run and also when several processes ran them."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found]
    tables = {value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "table"}
    for table in sorted(tables):
        terminalreporter.write_line("")
        terminalreporter.write_line(table)
