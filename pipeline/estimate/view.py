"""`pairsift estimate`: parses its options, and prints the plan."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import json
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.dataflow.settings import load_dataflow_settings
from pipeline.estimate.figures import load_figures, measured_rates
from pipeline.estimate.plan import CannotEstimate, Figure, Machines, Plan, Question
from pipeline.estimate.planner import estimate
from pipeline.output_folder.layout import Layout
from transforms.core.recipe import STAGES, Recipe
from transforms.storage import files

MAX_SAMPLES = 10**13
EXAMPLE = str(importlib.resources.files("templates") / "dataflow.yaml")
"""The launch settings that a plan takes its machines from where none are given."""

_POOL_ROWS = {
    "samples": "samples",
    "shards": "shards",
    "pool/storage": "size",
    "scored": "pairs that stage 2 scores",
    "candidates": "candidates of stage 3",
}
_STAGE_ROWS = {
    "workers": "max. workers",
    "worker_hours": "worker hours",
    "hours": "hours, all workers busy",
    "shuffle": "shuffled",
    "storage": "stored tables",
    "temporary": "temporary files",
    "cost/workers": "cost of workers",
    "cost/shuffle": "cost of shuffle",
    "cost": "cost",
}
_TOTAL_ROWS = {
    "total/hours": "hours, stages in sequence",
    "total/shuffle": "shuffled",
    "total/storage": "stored tables",
    "total/storage_month": "cost of storage",
    "total/cost": "cost",
}


def parse_samples(text: str) -> int:
    """The number of samples in `text`: 1e9, 1_000_000, 12800000. Raises CannotEstimate."""
    try:
        number = Decimal(text.replace("_", ""))
    except InvalidOperation:
        number = Decimal(-1)
    if not number.is_finite() or number != number.to_integral_value() or not 1 <= number <= MAX_SAMPLES:
        raise CannotEstimate(
            f"--samples: got {text}; allowed: a whole number from 1 to {MAX_SAMPLES:.0e}, such as 1e9 or 1_000_000"
        )
    return int(number)


def plan_of(
    recipe: Recipe,
    samples: str,
    settings: str | None,
    samples_per_shard: int,
    bytes_per_sample: float | None,
    funnel: str | None,
    measured: str | None,
    figures: str | None,
    utilisation: float | None,
    like: Sequence[str],
    keep_versions: int,
) -> Plan:
    """The plan for the command's options. Raises CannotEstimate and SettingsError."""
    machines = Machines.of(load_dataflow_settings(settings or EXAMPLE), settings or "templates/dataflow.yaml")
    known = load_figures(figures)
    if measured:
        if machines.accelerator is None:
            raise CannotEstimate("--measured: needs an `accelerator` in the launch settings")
        known |= measured_rates(measured, machines.accelerator.type)
    models = {}
    for pair in like:
        given, equals, model = pair.partition("=")
        if not (given and equals and model):
            raise CannotEstimate(f"--like: got {pair}; allowed: MODEL=MODEL, the recipe's model and a known one")
        models[given] = model
    question = Question(
        recipe, parse_samples(samples), machines, known, samples_per_shard, bytes_per_sample, utilisation,
        (funnel, _read_funnel(funnel)) if funnel else None, models, keep_versions,
    )  # fmt: skip
    plan = estimate(question)
    # Imported late: it imports Torch and Beam, and wrong options should be reported without that wait.
    from pipeline.dataflow.template.limits import exceeded_before
    from pipeline.graphs import Job

    job = Job(recipe, (), Layout("gs://bucket/output"), {})
    return dataclasses.replace(plan, warnings=(*plan.warnings, *exceeded_before(job, tasks=0)))


def _read_funnel(path: str) -> dict[str, object]:
    try:
        content = json.loads(files.read_bytes(path))
    except (OSError, ValueError) as error:
        raise CannotEstimate(f"--funnel: {path}: cannot be read as funnel.json: {error}") from error
    if not isinstance(content, dict):
        raise CannotEstimate(f"--funnel: {path}: not a funnel.json")
    return content


def show(plan: Plan, title: str, with_formulas: bool, console: Console) -> None:
    """Print a section for the pool, each stage and the totals, with numbers that refer to the list of sources below.
    `with_formulas` adds the formula of every computed figure."""
    sections = {"Pool": _POOL_ROWS}
    for number, stage in enumerate(STAGES, 1):
        rows = {f"{stage}/{what}": label for what, label in _STAGE_ROWS.items()}
        sections[f"Stage {number}, {stage}: {plan.machines[stage]}"] = rows
    sections["Total"] = _TOTAL_ROWS
    names = [name for rows in sections.values() for name in rows if name in plan.figures]
    roots = dict.fromkeys(root for name in names for root in plan.roots(name))
    numbers = {name: number for number, name in enumerate(roots, 1)}

    _print(console, title, style="bold")
    for heading, rows in sections.items():
        _print(console, f"\n{heading}", style="bold")
        console.print(_section(plan, rows, numbers))
    if any(plan.is_extrapolated(name) for name in names):
        _print(console, "\n~ extrapolated, not measured")
    _print(console, "  [numbers] sources, listed below")
    if with_formulas:
        _print(console, "\nFormulas", style="bold")
        _print(console, "  ÷ divides; units are converted; functions are in pipeline/estimate/formulas.py")
        for name, figure in plan.figures.items():
            if figure.uses:
                _entry(console, "", name, figure, f"= {figure.source}")
    _print(console, "\nSources", style="bold")
    for name, number in numbers.items():
        figure = plan.figures[name]
        _entry(console, f"{number}", name, figure, f"{figure.kind}: {figure.source}")
    _print(console, "\nNot included", style="bold")
    for line in plan.left_out:
        _item(console, "-", line)
    if plan.warnings:
        _print(console, "\nWarnings", style="bold")
    for line in plan.warnings:
        _item(console, "-", line)


def _section(plan: Plan, rows: dict[str, str], numbers: dict[str, int]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=27)
    table.add_column(justify="right", min_width=14, no_wrap=True)
    table.add_column(min_width=9, no_wrap=True)
    table.add_column()
    for name, label in rows.items():
        if name in plan.figures:
            figure = plan.figures[name]
            mark = "~" if plan.is_extrapolated(name) else ""
            sources = _ranges(numbers[root] for root in plan.roots(name))
            table.add_row(f"  {label}", mark + _number(figure.value), figure.unit, Text(f"[{sources}]", style="dim"))
    return table


def _entry(console: Console, number: str, name: str, figure: Figure, text: str) -> None:
    """A figure with its value, and `text` on the same line where it fits, else on lines of its own."""
    head = f"{name} = {_number(figure.value)} {figure.unit}"
    fits = len(head) + len(text) + 7 <= console.width
    _item(console, number, f"{head}  {text}" if fits else head)
    if not fits:
        _item(console, "", text, indent=4)


def _item(console: Console, mark: str, text: str, indent: int = 0) -> None:
    """`text` with a hanging indent behind `mark`."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", width=4 + indent)
    grid.add_column(overflow="fold")
    grid.add_row(mark, Text(text))
    console.print(grid)


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style))


def _number(value: float) -> str:
    if value and (abs(value) < 0.1 or abs(value) >= 1e12):
        return f"{value:.4g}"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:,.4g}"


def _ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers with runs shortened: 1 2 3 7 as 1-3 7."""
    texts = []
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        texts.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return " ".join(texts)
