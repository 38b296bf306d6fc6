"""The Dataflow pages match the program: commands parse, files and targets exist, the steps are in order."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from pipeline.cli import app
from pipeline.estimate.view import plan_of
from transforms.core.recipe import STAGES, load_recipe

ROOT = Path(__file__).parents[3]
STEPS = ["setup", "image", "templates", "launch", "resources", "cost", "operations"]
PATHS = [ROOT / "docs" / "dataflow.md", *(ROOT / "docs" / "dataflow" / f"{step}.md" for step in STEPS)]
PAGES = {path: path.read_text(encoding="utf-8") for path in PATHS}
PAGE = "\n".join(PAGES.values())
README = (ROOT / "README.md").read_text(encoding="utf-8")
OUR_FOLDERS = ("benchmarks", "docs", "pipeline", "recipes", "templates", "tests", "tools", "transforms")
TITLES = [
    "Dataflow", "Project setup", "Worker image", "Templates", "Launch and schedule", "Resources and limits", "Cost",
    "Operations",
]  # fmt: skip
SECTIONS = {
    "setup": ["What you need", "Project"],
    "operations": ["Metrics", "Clean-up", "When something fails"],
}


def shell_lines(page: str) -> Iterator[str]:
    """Each command of the page's shell blocks, its continued lines joined."""
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE):
        yield from (line.strip() for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip())


def commands(*names: str) -> list[str]:
    found = itertools.chain(shell_lines(PAGE), shell_lines(README))
    return [line.partition(" > ")[0] for line in found if line.removeprefix(".venv/bin/").startswith(names)]


@pytest.mark.parametrize("line", commands("pairsift "))
def test_each_command_of_ours_parses(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)  # raises where an option is unknown, wrong or missing


def test_the_commands_that_matter_are_there() -> None:
    named = {shlex.split(line)[1] for line in commands("pairsift ")}
    assert {"validate", "estimate", "launch", "schedule", "run", "select"} <= named


@pytest.mark.parametrize("line", commands("make ", "python -m "))
def test_each_target_and_module_exists(line: str) -> None:
    tool, *rest = shlex.split(line, comments=True)
    if tool == "make":
        assert re.search(rf"^{re.escape(rest[0])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    else:
        assert importlib.util.find_spec(rest[1]) is not None, line


def test_each_file_that_is_named_exists() -> None:
    missing = [
        target
        for path, page in PAGES.items()
        for target in {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link}
        if target and not (path.parent / target).exists()
    ]
    named = re.findall(rf"(?<![\w./$-])((?:{'|'.join(OUR_FOLDERS)})/[\w./-]*\w\.\w+)", PAGE)
    missing += [name for name in set(named) if "NAME" not in name and not (ROOT / name).exists()]
    assert named and not missing


def test_the_pages_are_in_the_order_in_which_things_are_done() -> None:
    assert [re.search(r"^# (.+)$", page, re.MULTILINE)[1] for page in PAGES.values()] == TITLES  # type: ignore[index]
    linked = re.findall(r"^\d\. \[(.+)\]\(dataflow/(\w+)\.md\)", PAGES[PATHS[0]], re.MULTILINE)
    assert linked == list(zip(TITLES[1:], STEPS, strict=True))
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"dataflow/(\w+)\.md", navigation) == STEPS
    for step, sections in SECTIONS.items():
        assert re.findall(r"^## (.+)$", PAGES[ROOT / "docs" / "dataflow" / f"{step}.md"], re.MULTILINE) == sections


def test_no_page_is_long() -> None:
    assert all(len(page.splitlines()) < 150 for page in PAGES.values())


def test_shell_blocks_are_shell(tmp_path: Path) -> None:
    for line in shell_lines(PAGE):
        shlex.split(line, comments=True)  # raises where a quotation has no end


def test_the_plan_on_the_page_is_what_estimate_prints() -> None:
    recipe = load_recipe(str(ROOT / "recipes" / "paper.yaml"))
    plan = plan_of(recipe, "1e9", None, 10_000, None, None, None, None, None, (), 3)
    rows = {line.split("|")[1].strip(): line.split("|")[2:6] for line in PAGE.splitlines() if line.startswith("| ")}
    for row, what, form in (
        ("hours of one machine", "worker_hours", ",.0f"), ("hours", "hours", ",.1f"),
        ("through shuffles, GiB", "shuffle", ",.0f"), ("tables that stay, GiB", "storage", ",.0f"),
        ("cost, USD", "cost", ",.0f"),
    ):  # fmt: skip
        *stages, total = [cell.strip().removesuffix(", extrapolated") for cell in rows[row]]
        assert stages == [format(plan.value(f"{stage}/{what}"), form) for stage in STAGES], row
        assert not total or total == format(plan.value(f"total/{what}"), form), row
    assert "extrapolated" in rows["cost, USD"][1]
