"""The command line. Exit status: 0 done, 1 failed, 2 wrong use."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import logging
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from pipeline.output_folder import versions
from pipeline.output_folder.layout import Layout
from pipeline.report.printable import PrintableFormatter, printable
from transforms.core.errors import Failure, UsageError
from transforms.core.recipe import STAGES, Recipe, load_recipe
from transforms.core.settings import SettingsError

if TYPE_CHECKING:  # each command imports what it runs: `--help` need not wait the seconds that Torch takes
    from pipeline.reshard.command import Resharded
    from pipeline.runs.run import Outcome

app = typer.Typer(
    name="pairsift",
    help="Turn a raw pool of web image-text pairs into a subset worth training a CLIP model on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_BEAM = {"allow_extra_args": True}  # after `--`; an unknown option before it is a fault
_errors = Console(stderr=True)
_NOISE = (
    "Traceback (most recent call last)",
    "No semi_persistent_directory found",
    "/allowedLocations",  # what google-auth asks beside, and does without
)
_EXCEPTION_NAME = re.compile(r"^(\w+\.)+[A-Z]\w+: ")

Json = Annotated[bool, typer.Option("--json", help="Print JSON lines, for machines.")]
KeepVersions = Annotated[int, typer.Option(min=1, help="Results of so many runs stay readable, the newest included.")]
GsPool = Annotated[str, typer.Option("--input", help="Folder of webdataset tars on gs://, or a pattern of them.")]
GsOutput = Annotated[str, typer.Option("--output", help="Folder on gs:// for all outputs.")]
LaunchSettings = Annotated[
    str, typer.Option("--settings", help="Project, region, machines: templates/dataflow.yaml, filled in.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the requests and send nothing; takes no credentials.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the whole traceback of a failure.")]


@app.command()
def validate(recipe: Annotated[str, typer.Argument(help="The recipe's path.")], as_json: Json = False) -> None:
    """Check a recipe: every fault at once, with its place, what it got and what is allowed."""
    loaded = _recipe(recipe, as_json)
    if as_json:
        print(json.dumps({"recipe": recipe, "faults": []}))
    else:
        print(f"{recipe}: no fault; rules that are on: {', '.join(loaded.active_rules)}")


@app.command(context_settings=_BEAM)
def run(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="The recipe's path.")],
    pool: Annotated[str, typer.Option("--input", help="Folder of webdataset tars, or a pattern ending in .tar.")],
    output: Annotated[str, typer.Option("--output", help="Folder for all outputs.")],
    stages: Annotated[str, typer.Option("--stages", help="Comma-separated stages to run.")] = ",".join(STAGES),
    keep_versions: KeepVersions = versions.KEPT,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe over a pool. What follows `--` goes to Beam, for example `-- --direct_num_workers=2`."""
    chosen = [stage.strip() for stage in stages.split(",")]
    unknown = [stage for stage in chosen if stage not in STAGES]
    if unknown:
        _fail(2, f"--stages: got {', '.join(unknown)}; allowed: {', '.join(STAGES)}", as_json)
    chosen = sorted(set(chosen), key=STAGES.index)
    _run(_recipe(recipe, as_json), pool, output, chosen, context.args, as_json, verbose, keep_versions)


@app.command(context_settings=_BEAM)
def select(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="The recipe's path.")],
    output: Annotated[str, typer.Option("--output", help="Output folder of a run.")],
    keep_versions: KeepVersions = versions.KEPT,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Decide again from kept features and scores, by another recipe: no images, no models. What follows `--` goes to
    Beam."""
    loaded = _recipe(recipe, as_json)
    with _exit_status(as_json, verbose):
        from pipeline.report.progress import Progress
        from pipeline.runs.select import select

        outcome = select(loaded, recipe, output, context.args, Progress(_errors, as_json), keep_versions)
    _tell(outcome, output, as_json)


@app.command(context_settings=_BEAM)
def demo(
    context: typer.Context,
    output: Annotated[str, typer.Option("--output", help="Folder for all outputs.")] = "out/demo",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run the bundled recipe on the bundled pool."""
    recipe = importlib.resources.files("recipes") / "demo.yaml"
    pool = importlib.resources.files("pipeline") / "demo" / "pool"
    _run(_recipe(str(recipe), as_json), str(pool), output, list(STAGES), context.args, as_json, verbose)


@app.command(context_settings=_BEAM)
def reshard(
    context: typer.Context,
    run_output: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a finished run.")],
    pool: Annotated[str, typer.Option("--input", help="The pool that it ran on.")],
    output: Annotated[str, typer.Option("--output", help="Folder for the tars.")],
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Rows in a tar, on average.")] = 10_000,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a run's training subset as webdataset tars, copies of one sample far apart. What follows `--` goes to
    Beam."""
    with _exit_status(as_json, verbose):
        from pipeline.report.progress import Progress
        from pipeline.reshard.command import reshard

        progress = Progress(_errors, as_json)
        done = reshard(run_output, pool, output, samples_per_shard, context.args, progress)
        _show_resharded(done, as_json)


@app.command()
def centroids(
    tasks: Annotated[
        list[str], typer.Argument(metavar="NAME=IMAGES", help="Each task's name and folder of images, or tar.")
    ],
    recipe: Annotated[str, typer.Option("--recipe", help="The recipe whose CLIP and settings are used.")],
    output: Annotated[str, typer.Option("--output", help="The .npz to write, for `cids.tasks`.")],
    centroids_per_task: Annotated[int, typer.Option(min=1, help="At most so many centroids of each task.")] = 16,
    tfio_python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Python that has tensorflow-io, for DICOM, EXR, JPEG 2000.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make the centroids of downstream tasks from their images."""
    loaded = _recipe(recipe, as_json)
    with _exit_status(as_json, verbose):
        from pipeline.centroids.command import TaskCentroids, make_centroids

        def show(task: TaskCentroids) -> None:
            found = task.summary
            line = "{name}: {images:,} images, {unreadable:,} unreadable, {centroids:,} centroids"
            print(json.dumps(found) if as_json else line.format(**found), flush=True)

        make_centroids(
            loaded, tasks, output, centroids_per_task, tfio_python, lambda image: _say(f"unreadable: {image}"), show
        )
    if not as_json:
        print(f"written: {output}")


@app.command()
def estimate(
    recipe: Annotated[str, typer.Argument(help="The recipe's path.")],
    samples: Annotated[str, typer.Option("--samples", help="Samples in the pool, such as 1e9 or 1_000_000.")],
    settings: Annotated[
        str | None, typer.Option("--settings", help="Launch settings; else templates/dataflow.yaml's machines.")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in a tar, on average.")] = 10_000,
    bytes_per_sample: Annotated[float | None, typer.Option(min=1, help="Bytes of a sample in its tar.")] = None,
    funnel: Annotated[
        str | None, typer.Option("--funnel", help="funnel.json of an earlier run: what each rule keeps.")
    ] = None,
    measured: Annotated[
        str | None, typer.Option(help="What `python -m benchmarks.models --device cuda --json --no-peers` printed.")
    ] = None,
    figures: Annotated[
        str | None, typer.Option("--figures", help="Your own prices and measurements, as in figures.yaml.")
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(min=0.001, max=1.0, help="Share of a GPU's peak that models not measured reach.")
    ] = None,
    like: Annotated[
        list[str] | None, typer.Option(metavar="MODEL=MODEL", help="Which known model one of the recipe's is.")
    ] = None,
    keep_versions: KeepVersions = versions.KEPT,
    sources: Annotated[bool, typer.Option("--sources", help="Show also how each figure is computed.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Plan a run on Dataflow: machines, hours, cost, shuffle and storage, each figure with its source."""
    loaded = _recipe(recipe, as_json)
    with _exit_status(as_json, verbose):
        from pipeline.estimate.view import plan_of, show

        plan = plan_of(
            loaded, samples, settings, samples_per_shard, bytes_per_sample, funnel, measured, figures, utilisation,
            like or [], keep_versions,
        )  # fmt: skip
        if as_json:
            print(json.dumps({"recipe": recipe, **plan.content}))
        else:
            show(plan, f"{recipe}: {plan.value('samples'):,.0f} samples on Dataflow", sources, Console())


@app.command()
def launch(
    recipe: Annotated[str, typer.Argument(help="The recipe's path; a local one is put beside the templates.")],
    pool: GsPool,
    output: GsOutput,
    settings: LaunchSettings,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE",
            help="Start this template alone: single_modality, cross_modality, distribution_alignment or all_stages. "
            "Without it a workflow is started that runs the three stages in turn.",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Tell of it until it ends; Ctrl-C lets it go on.")] = False,
    poll_seconds: Annotated[float, typer.Option(min=0.01, help="How often to look, with --follow.")] = 20.0,
    keep_versions: KeepVersions = versions.KEPT,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Start a recipe on Dataflow: the workflow of the three stages, or one template with --stage. What runs already
    with the same parameters is adopted; with others over the same output, it is refused."""
    with _exit_status(as_json, verbose):
        from pipeline.dataflow.commands import Asked, launch_template, launch_workflow
        from pipeline.dataflow.follow import Screen

        asked, screen = Asked(recipe, pool, output, settings, keep_versions), Screen(_errors, as_json)
        if stage:
            launch_template(asked, stage, follow, dry_run, poll_seconds, screen)
        else:
            launch_workflow(asked, follow, dry_run, poll_seconds, screen)


@app.command()
def schedule(
    recipe: Annotated[str | None, typer.Argument(help="The recipe's path; needless with --delete.")] = None,
    pool: Annotated[str | None, typer.Option("--input", help="The pool on gs://; needless with --delete.")] = None,
    *,
    output: GsOutput,
    settings: LaunchSettings,
    weekly: Annotated[str | None, typer.Option(metavar="DAY HH:MM", help='For example "Mon 03:00".')] = None,
    cron: Annotated[str | None, typer.Option(metavar="CRON", help='For example "0 3 * * 1".')] = None,
    time_zone: Annotated[str, typer.Option(help="In which these are meant, for example Europe/Berlin.")] = "Etc/UTC",
    keep_versions: KeepVersions = versions.KEPT,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the schedule of this output.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe on Dataflow again and again: create or change the Cloud Scheduler job of an output folder, and the
    workflow of the three stages that it starts."""
    with _exit_status(as_json, verbose):
        from pipeline.dataflow import commands
        from pipeline.dataflow.follow import Screen

        screen = Screen(_errors, as_json)
        if delete:
            commands.delete_schedule(settings, output, dry_run, screen)
            return
        if recipe is None or pool is None or (weekly is None) == (cron is None):
            raise UsageError("schedule: name RECIPE, --input, and one of --weekly and --cron")
        when = commands.cron_of(weekly) if weekly is not None else commands.checked_cron(cron or "")
        asked = commands.Asked(recipe, pool, output, settings, keep_versions)
        commands.put_schedule(asked, when, time_zone, dry_run, screen)


def _recipe(path: str, as_json: bool) -> Recipe:
    try:
        return load_recipe(path)
    except SettingsError as error:
        _faults(error, as_json, {"recipe": path})


def _faults(error: SettingsError, as_json: bool, told: dict[str, Any]) -> NoReturn:
    if as_json:
        print(json.dumps({**told, "faults": error.faults}))
    else:
        for fault in error.faults:
            _say(f"{error.source}: {fault}")
    raise typer.Exit(2) from error


def _run(
    recipe: Recipe,
    pool: str,
    output: str,
    stages: list[str],
    beam_options: list[str],
    as_json: bool,
    verbose: bool,
    keep_versions: int = versions.KEPT,
) -> None:
    with _exit_status(as_json, verbose):
        from pipeline.report.progress import Progress
        from pipeline.runs.run import run

        outcome = run(recipe, pool, output, stages, beam_options, Progress(_errors, as_json), keep_versions)
    _tell(outcome, output, as_json)


def _tell(outcome: Outcome, output: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"event": "done", "output": output, "funnel": outcome.funnel}))
    elif outcome.funnel:
        _show(outcome.funnel, outcome.layout)


@contextlib.contextmanager
def _exit_status(as_json: bool, verbose: bool) -> Iterator[None]:
    """Exits with status 2 where the body was asked for something that cannot be done, with 1 where it failed."""
    log = logging.StreamHandler()
    log.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    if verbose:
        logging.getLogger("pipeline").setLevel(logging.DEBUG)
    else:
        log.addFilter(_is_no_noise)
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    hook, threading.excepthook = threading.excepthook, _log_thread
    try:
        yield
    except SettingsError as error:
        _faults(error, as_json, {"event": "error", "message": str(error)})
    except UsageError as error:
        _fail(2, str(error), as_json)
    except Failure as error:
        _fail(1, str(error), as_json)
    except Exception as error:
        if verbose:
            raise
        _fail(1, f"{_last_line(error)} (--verbose shows the whole traceback)", as_json)
    finally:
        threading.excepthook = hook


def _show_resharded(done: Resharded, as_json: bool) -> None:
    """What was written, and how far apart the copies of one sample are."""
    subset, spread, folder = done.subset, done.spread, done.folder
    several = spread.most_copies > 1
    if as_json:
        content = {
            "event": "done",
            "output": folder.output,
            "samples": subset.samples,
            "copies": subset.tally.rows,
            "tars": spread.tars,
            "least_rows_apart": spread.least_rows_apart if several else None,
            "least_tars_apart": spread.least_tars_apart if several else None,
        }
        print(json.dumps(content))
        return
    print(f"{folder.output}: {subset.tally.rows:,} copies of {subset.samples:,} samples in {spread.tars:,} tars")
    if several:
        print(
            f"copies of one sample are at least {spread.least_rows_apart:,} rows apart; the numbers of their tars "
            f"differ by at least {spread.least_tars_apart:,}"
        )
    else:
        print("no sample stands in it twice")


def _show(funnel: dict[str, Any], layout: Layout) -> None:
    """The funnel as a table, and where everything lies."""
    console = Console()
    table = Table(title="Funnel", title_justify="left")
    for name in ("stage", "rule"):
        table.add_column(name)
    for name in ("in", "dropped", "kept"):
        table.add_column(name, justify="right")
    table.add_row("", "samples found", "", "", f"{funnel['in']:,}")
    left = funnel["in"]
    for reason, count in funnel["dead_letters"].items():
        table.add_row("dead letter", reason, f"{left:,}", f"{count:,}", f"{left - count:,}")
        left -= count
    for rule in funnel["rules"]:
        table.add_row(rule["stage"], rule["name"], *(f"{rule[column]:,}" for column in ("in", "dropped", "kept")))
    console.print(table)
    console.print(
        f"{funnel['survivors']:,} survivors; the training subset holds {funnel['samples']:,} of them, "
        f"{funnel['copies']:,} copies in all\n"
    )
    places = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, where in (
        ("training subset", layout.subset),
        ("decision of every sample", layout.decisions("").rpartition("/")[0] + "/"),
        ("scores and features", f"{layout.output}/annotations/"),
        ("clusters", layout.clusters),
        ("the same, to look at", layout.clusters_figure),
        ("what could not be judged", f"{layout.output}/dead_letters/"),
        ("this table, for machines", layout.funnel),
        ("recipe, models, versions", layout.manifest),
    ):
        places.add_row(what, where)
    console.print(places, highlight=False)


def _is_no_noise(record: logging.LogRecord) -> bool:
    """Beam tells of an error at each place that it passes; what it comes to is our last line."""
    message = record.getMessage()
    return not record.exc_info and not any(noise in message for noise in _NOISE)


def _log_thread(failed: threading.ExceptHookArgs) -> None:
    """Beam's threads that talk to a worker fail with it; the runner tells."""
    assert failed.exc_value is not None
    logging.error("thread %s failed", failed.thread and failed.thread.name, exc_info=failed.exc_value)


def _last_line(error: BaseException) -> str:
    # Not `splitlines`: text of a pool, quoted in the message, would choose with "\r" which part of it is shown.
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    # From a worker process an error comes as the text of its traceback.
    return _EXCEPTION_NAME.sub("", lines[-1]) if lines else type(error).__name__


def _fail(status: int, message: str, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps({"event": "error", "message": message}))
    else:
        _say(message)
    raise typer.Exit(status)


def _say(message: str) -> None:
    _errors.print(f"pairsift: {printable(message)}", highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
