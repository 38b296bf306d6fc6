"""Commands for Dataflow: estimate, launch, schedule."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline.cli.messages import errors_console, exit_status, read_recipe
from pipeline.cli.options import (
    KEPT_VERSIONS,
    DryRun,
    GsOutput,
    GsPool,
    Json,
    KeepVersions,
    LaunchSettings,
    RecipePath,
    Verbose,
)
from transforms.core.errors import UsageError


def estimate(
    recipe: RecipePath,
    samples: Annotated[
        str, typer.Option("--samples", metavar="N", help="Samples in the pool, for example 1e9 or 1_000_000.")
    ],
    settings: Annotated[
        str | None,
        typer.Option("--settings", metavar="FILE", help="Launch settings.", show_default="templates/dataflow.yaml"),
    ] = None,
    samples_per_shard: Annotated[
        int, typer.Option(min=1, metavar="N", help="Average number of samples in a tar.")
    ] = 10_000,
    bytes_per_sample: Annotated[
        float | None, typer.Option(min=1, metavar="N", help="Average bytes of a sample in a tar.")
    ] = None,
    funnel: Annotated[
        str | None,
        typer.Option("--funnel", metavar="FILE", help="funnel.json of an earlier run, for what each rule drops."),
    ] = None,
    measured: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Output of `python -m benchmarks.models --device cuda --json --no-peers`."),
    ] = None,
    figures: Annotated[
        str | None,
        typer.Option("--figures", metavar="FILE", help="Your prices and measurements, in the format of figures.yaml."),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1.0, metavar="SHARE", help="Share of a GPU's peak assumed for models that were not measured."
        ),
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=KNOWN", help="Treat MODEL of the recipe as the known model KNOWN. Repeatable."),
    ] = None,
    keep_versions: KeepVersions = KEPT_VERSIONS,
    sources: Annotated[bool, typer.Option("--sources", help="Show how each figure is computed.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Estimate hours, cost and storage of a run on Dataflow.

    Also estimates the machines and the shuffled bytes. Each figure names its source.

    \b
    Examples:
      pairsift estimate recipe.yaml --samples 1e9
      pairsift estimate recipe.yaml --samples 1e9 --settings dataflow.yaml
    """
    loaded = read_recipe(recipe, as_json)
    with exit_status(as_json, verbose):
        from rich.console import Console

        from pipeline.estimate.view import plan_of, show

        plan = plan_of(
            loaded, samples, settings, samples_per_shard, bytes_per_sample, funnel, measured, figures, utilisation,
            like or [], keep_versions,
        )  # fmt: skip
        if as_json:
            print(json.dumps({"recipe": recipe, **plan.content}))
        else:
            show(plan, f"{recipe}: {plan.value('samples'):,.0f} samples on Dataflow", sources, Console())


def launch(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Path of the recipe. A local one is uploaded next to the templates.")
    ],
    pool: GsPool,
    output: GsOutput,
    settings: LaunchSettings,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE",
            help="Start one template: single_modality, cross_modality, distribution_alignment or all_stages.",
            show_default="all three in turn",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Report progress until the end. Ctrl-C leaves the job running.")
    ] = False,
    poll_seconds: Annotated[
        float, typer.Option(min=0.01, metavar="N", help="Polling interval of --follow in seconds.")
    ] = 20.0,
    keep_versions: KeepVersions = KEPT_VERSIONS,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Start a recipe on Dataflow.

    Starts a workflow that runs the three stages in turn, or with --stage one template.

    A running job with the same parameters is adopted. A running job with other parameters on the same output folder is
    an error.

    \b
    Examples:
      pairsift launch recipe.yaml --settings dataflow.yaml \\
        --input gs://BUCKET/pool --output gs://BUCKET/out --follow
      pairsift launch recipe.yaml --settings dataflow.yaml \\
        --input gs://BUCKET/pool --output gs://BUCKET/out --dry-run
    """
    with exit_status(as_json, verbose):
        from pipeline.dataflow.commands import Asked, launch_template, launch_workflow
        from pipeline.dataflow.follow import Screen
        from pipeline.sources.pool_names import joined

        asked = Asked(recipe, joined(pool), output, settings, keep_versions)
        screen = Screen(errors_console(), as_json)
        if stage:
            launch_template(asked, stage, follow, dry_run, poll_seconds, screen)
        else:
            launch_workflow(asked, follow, dry_run, poll_seconds, screen)


def schedule(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Path of the recipe. Not needed with --delete.")
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="POOL",
            help="Pool on gs://. Repeatable. Not needed with --delete.",
            show_default=False,
        ),
    ] = None,
    *,
    output: GsOutput,
    settings: LaunchSettings,
    weekly: Annotated[
        str | None, typer.Option(metavar="DAY HH:MM", help='Run once a week, for example "Mon 03:00".')
    ] = None,
    cron: Annotated[
        str | None, typer.Option(metavar="CRON", help='Run on a cron schedule, for example "0 3 * * 1".')
    ] = None,
    time_zone: Annotated[str, typer.Option(metavar="NAME", help="Time zone of --weekly and --cron.")] = "Etc/UTC",
    keep_versions: KeepVersions = KEPT_VERSIONS,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the schedule of this output folder.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe on Dataflow on a schedule.

    Creates or updates the Cloud Scheduler job of the output folder, and the workflow of the three stages that it
    starts.

    \b
    Examples:
      pairsift schedule recipe.yaml --settings dataflow.yaml \\
        --input gs://BUCKET/pool --output gs://BUCKET/out --weekly "Mon 03:00"
      pairsift schedule --settings dataflow.yaml --output gs://BUCKET/out --delete
    """
    with exit_status(as_json, verbose):
        from pipeline.dataflow import commands
        from pipeline.dataflow.follow import Screen
        from pipeline.sources.pool_names import joined

        screen = Screen(errors_console(), as_json)
        if delete:
            commands.delete_schedule(settings, output, dry_run, screen)
            return
        if recipe is None or not pool or (weekly is None) == (cron is None):
            raise UsageError("schedule: name RECIPE, --input, and one of --weekly and --cron")
        when = commands.cron_of(weekly) if weekly is not None else commands.checked_cron(cron or "")
        asked = commands.Asked(recipe, joined(pool), output, settings, keep_versions)
        commands.put_schedule(asked, when, time_zone, dry_run, screen)
