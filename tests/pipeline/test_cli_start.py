"""The command line starts fast: commands that only read a recipe or print help import neither Beam nor Torch."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pipeline.cli import app
from tests.helpers import DEMO_RECIPE
from transforms.core.recipe import STAGES

HEAVY = ("apache_beam", "torch")
COMMANDS = ("demo", "validate", "run", "select", "reshard", "centroids", "estimate", "launch", "schedule")


def imported_by(*arguments: str) -> set[str]:
    """The top-level packages that the command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "pairsift", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    names = re.findall(r"^import time: .*\| +(\S+)$", done.stderr, re.MULTILINE)
    assert "typer" in names  # otherwise the report of imports has another format
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("-h",), ("--version",), ("run", "--help"), ("launch", "-h"), ("validate", str(DEMO_RECIPE))],
    ids=" ".join,
)
def test_commands_without_a_pipeline_import_no_beam(arguments: tuple[str, ...]) -> None:
    assert not imported_by(*arguments) & set(HEAVY)


def test_every_command_has_a_help_of_80_columns_with_an_example() -> None:
    assert tuple(get_command(app).commands) == COMMANDS  # type: ignore[attr-defined]
    for command in COMMANDS:
        result = CliRunner().invoke(app, [command, "-h"], env={"COLUMNS": "80"})
        assert result.exit_code == 0, result.output
        assert f"    pairsift {command}" in result.output, command
        assert max(map(len, result.output.splitlines())) <= 80, command
        assert result.output == CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).output


def test_no_short_help_is_cut_off() -> None:
    assert "..." not in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output.partition("Commands:")[2]


def test_the_stages_in_the_help_are_those_of_the_recipe() -> None:
    text = " ".join(CliRunner().invoke(app, ["run", "--help"]).output.split())
    assert f"Comma-separated stages: {', '.join(STAGES)}." in text


def test_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"pairsift {version('pairsift')}\n"
