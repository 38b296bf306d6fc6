"""Commands that check and run a recipe: demo, validate, run, select."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.messages import beam_options_in, errors_console, exit_status, fail, read_recipe
from pipeline.cli.options import KEPT_VERSIONS, Json, KeepVersions, Output, Pool, RecipePath, Verbose

if TYPE_CHECKING:
    from pipeline.runs.run import Outcome
    from transforms.core.recipe import Recipe


def demo(
    context: typer.Context,
    output: Output = "out/demo",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run the bundled recipe on the bundled pool.

    Needs no download and takes about a minute. Arguments after `--` go to Beam.

    \b
    Examples:
      pairsift demo
      pairsift demo --output /tmp/demo -- --direct_num_workers=2
    """
    import importlib.resources

    from transforms.core.recipe import STAGES

    recipe = importlib.resources.files("recipes") / "demo.yaml"
    pool = importlib.resources.files("pipeline") / "demo" / "pool"
    _run(read_recipe(str(recipe), as_json), [str(pool)], output, list(STAGES), context, as_json, verbose)


def validate(recipe: RecipePath, as_json: Json = False) -> None:
    """Check a recipe and report every fault with its path.

    Each line names the setting, the value and what is allowed. Exit status 2 if there are faults.

    \b
    Example:
      pairsift validate recipe.yaml
    """
    loaded = read_recipe(recipe, as_json)
    if as_json:
        print(json.dumps({"recipe": recipe, "faults": []}))
    else:
        print(f"{recipe}: valid; active rules: {', '.join(loaded.active_rules)}")


def run(
    context: typer.Context,
    recipe: RecipePath,
    pool: Pool,
    output: Output,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Comma-separated stages: single_modality, cross_modality, distribution_alignment.",
            show_default="all three",
        ),
    ] = None,
    keep_versions: KeepVersions = KEPT_VERSIONS,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe over a pool.

    Valid results in the output folder are reused, so the same command resumes an interrupted run. Arguments after `--`
    go to Beam.

    \b
    Examples:
      pairsift run recipe.yaml --input pool --output out
      pairsift run recipe.yaml --output out \\
        --input 'pool/{00000..00099}.tar' --input other
      pairsift run recipe.yaml --input gs://BUCKET/pool --output gs://BUCKET/out
      pairsift run recipe.yaml --input pool --output out -- --direct_num_workers=2
    """
    from transforms.core.recipe import STAGES

    chosen = list(STAGES) if stages is None else [stage.strip() for stage in stages.split(",")]
    unknown = [stage for stage in chosen if stage not in STAGES]
    if unknown:
        fail(2, f"--stages: got {', '.join(unknown)}; allowed: {', '.join(STAGES)}", as_json)
    chosen = sorted(set(chosen), key=STAGES.index)
    _run(read_recipe(recipe, as_json), pool, output, chosen, context, as_json, verbose, keep_versions)


def select(
    context: typer.Context,
    recipe: RecipePath,
    output: Annotated[str, typer.Option("--output", metavar="FOLDER", help="Output folder of an earlier run.")],
    keep_versions: KeepVersions = KEPT_VERSIONS,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Decide again from stored scores, with another recipe.

    Reads no images and loads no models. If the recipe needs a score that was never computed, the message gives the
    command that computes it. Arguments after `--` go to Beam.

    \b
    Example:
      pairsift select stricter.yaml --output out
    """
    loaded = read_recipe(recipe, as_json)
    with exit_status(as_json, verbose):
        from pipeline.report.progress import Progress
        from pipeline.runs.select import select

        progress, beam_options = Progress(errors_console(), as_json), beam_options_in(context)
        outcome = select(loaded, recipe, output, beam_options, progress, keep_versions)
    _show(outcome, output, as_json)


def _run(
    recipe: Recipe,
    inputs: list[str],
    output: str,
    stages: list[str],
    context: typer.Context,
    as_json: bool,
    verbose: bool,
    keep_versions: int = KEPT_VERSIONS,
) -> None:
    with exit_status(as_json, verbose):
        from pipeline.report.progress import Progress
        from pipeline.runs.run import run
        from pipeline.sources.pool_names import joined

        pool = joined(inputs)
        progress, beam_options = Progress(errors_console(), as_json), beam_options_in(context)
        outcome = run(recipe, pool, output, stages, beam_options, progress, keep_versions)
    _show(outcome, output, as_json)


def _show(outcome: Outcome, output: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"event": "done", "output": output, "funnel": outcome.funnel}))
    elif outcome.funnel:
        from rich.console import Console

        from pipeline.report.funnel import show_funnel

        show_funnel(outcome.funnel, outcome.layout, Console())
