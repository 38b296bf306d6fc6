"""`pairsift estimate`: what it is asked, and the plan as a person reads it."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import json
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation

from rich.console import Console
from rich.table import Table

from pipeline.dataflow.settings import load_dataflow_settings
from pipeline.estimate.figures import load_figures, measured_rates
from pipeline.estimate.planner import (
    COMPUTED,
    EXTRAPOLATED,
    CannotEstimate,
    Figure,
    Machines,
    Plan,
    Question,
    estimate,
)
from pipeline.output_folder.layout import Layout
from transforms.core.recipe import STAGES, Recipe
from transforms.storage import files

MOST_SAMPLES = 10**13
EXAMPLE = str(importlib.resources.files("templates") / "dataflow.yaml")
"""Whose machines a plan has without settings of one's own."""

_SHOWN = (
    ("workers", "workers at most"),
    ("worker_hours", "hours of one worker"),
    ("hours", "hours, all workers busy"),
    ("shuffle", "through shuffles"),
    ("storage", "tables that stay"),
    ("temporary", "while it runs"),
    ("cost/workers", "cost of workers"),
    ("cost/shuffle", "cost of shuffles"),
    ("cost", "cost"),
)
_POOL = {
    "samples": "samples",
    "shards": "shards",
    "pool/storage": "size of the pool",
    "scored": "pairs scored by flipped CLIP",
    "candidates": "candidates of stage 3",
}
_TOTAL = {
    "total/hours": "hours, one stage after another",
    "total/shuffle": "through shuffles",
    "total/storage": "tables that stay",
    "total/storage_month": "and cost to keep",
    "total/cost": "cost",
}


def parse_samples(text: str) -> int:
    """How many samples `text` means: 1e9, 1_000_000, 12800000. Raises CannotEstimate."""
    try:
        number = Decimal(text.replace("_", ""))
    except InvalidOperation:
        number = Decimal(-1)
    if not number.is_finite() or number != number.to_integral_value() or not 1 <= number <= MOST_SAMPLES:
        raise CannotEstimate(
            f"--samples: got {text}; allowed: a whole number from 1 to {MOST_SAMPLES:.0e}, such as 1e9 or 1_000_000"
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
    """The plan that the command's options ask for. Raises CannotEstimate and SettingsError."""
    machines = Machines.of(load_dataflow_settings(settings or EXAMPLE), settings or "templates/dataflow.yaml")
    known = load_figures(figures)
    if measured:
        if machines.accelerator is None:
            raise CannotEstimate("--measured: is of a GPU, but the launch settings name no `accelerator`")
        known |= measured_rates(measured, machines.accelerator.type)
    models = {}
    for pair in like:
        given, equals, model = pair.partition("=")
        if not (given and equals and model):
            raise CannotEstimate(f"--like: got {pair}; allowed: MODEL=MODEL, the recipe's and the one that it is")
        models[given] = model
    question = Question(
        recipe, parse_samples(samples), machines, known, samples_per_shard, bytes_per_sample, utilisation,
        (funnel, _read_funnel(funnel)) if funnel else None, models, keep_versions,
    )  # fmt: skip
    plan = estimate(question)
    # Not above: this brings Torch and Beam, for which what is wrong with the options need not wait.
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
        raise CannotEstimate(f"--funnel: {path}: is no funnel.json")
    return content


def show(plan: Plan, title: str, with_formulas: bool, console: Console) -> None:
    """Print the plan: each figure with the numbers of its sources, the sources below."""
    roots = list(dict.fromkeys(root for name in _shown_names(plan) for root in plan.roots(name)))
    numbers = {name: number for number, name in enumerate(roots, 1)}
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("from")

    def add(title: str, rows: Iterable[tuple[str, str]]) -> None:
        table.add_section()
        table.add_row(title)
        for name, what in rows:
            figure = plan.figures[name]
            told = _ranges(numbers[root] for root in plan.roots(name))
            leans = "extrapolated; " if _leans(plan, name) else ""
            table.add_row(f"  {what}", _number(figure), figure.unit, leans + told)

    add("the pool", _POOL.items())
    for number, stage in enumerate(STAGES, 1):
        rows = ((f"{stage}/{what}", label) for what, label in _SHOWN)
        add(f"{number} {stage}: {plan.machines[stage]}", (row for row in rows if row[0] in plan.figures))
    add("total", _TOTAL.items())
    console.print(table, highlight=False)
    if with_formulas:
        _formulas(plan, console)
    console.print("\nSources", highlight=False)
    for name, number in numbers.items():
        figure = plan.figures[name]
        line = f"{number:>3}  {name} = {_number(figure)} {figure.unit} · {figure.kind}: {figure.source}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print("\nLeft out: " + ".\n".join(plan.left_out) + ".", highlight=False, markup=False, soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"Note: {warning}", highlight=False, markup=False, soft_wrap=True)


def _shown_names(plan: Plan) -> Iterable[str]:
    stages = (f"{stage}/{what}" for stage in STAGES for what, _ in _SHOWN)
    return (name for name in itertools.chain(_POOL, stages, _TOTAL) if name in plan.figures)


def _leans(plan: Plan, name: str) -> bool:
    """Whether the figure hangs on an extrapolated one."""
    figure = plan.figures[name]
    return figure.kind == EXTRAPOLATED or any(_leans(plan, use) for use in figure.uses)


def _formulas(plan: Plan, console: Console) -> None:
    console.print("\nHow each figure is computed", highlight=False)
    for name, figure in plan.figures.items():
        if figure.kind in (COMPUTED, EXTRAPOLATED):
            line = f"  {name} = {_number(figure)} {figure.unit}: {figure.source} [{', '.join(figure.uses)}]"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _number(figure: Figure) -> str:
    value = figure.value
    if value and (abs(value) < 0.1 or abs(value) >= 1e12):
        return f"{value:.4g}"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:,.4g}"


def _ranges(numbers: Iterable[int]) -> str:
    """1 2 3 7 as 1-3 7."""
    told = []
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        told.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return " ".join(told)
