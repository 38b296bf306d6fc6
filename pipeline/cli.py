"""The command line. Exit status: 0 done, 1 failed, 2 wrong use."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import logging
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline import versions
from pipeline.layout import Layout
from pipeline.printable import PrintableFormatter, printable
from pipeline.recipe import STAGES, Recipe, RecipeError, load_recipe

if TYPE_CHECKING:
    from pipeline.reshard import Resharded
    from pipeline.run import Outcome

app = typer.Typer(
    name="pairsift",
    help="Turn a raw pool of web image-text pairs into a subset worth training a CLIP model on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_BEAM = {"allow_extra_args": True}  # after `--`; an unknown option before it is a fault
_errors = Console(stderr=True)
_NOISE = ("Traceback (most recent call last)", "No semi_persistent_directory found")
_EXCEPTION_NAME = re.compile(r"^(\w+\.)+[A-Z]\w+: ")

Json = Annotated[bool, typer.Option("--json", help="Print JSON lines, for machines.")]
KeepVersions = Annotated[int, typer.Option(min=1, help="Results of so many runs stay readable, the newest included.")]
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
        from pipeline.progress import Progress
        from pipeline.select import select

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
        from pipeline.progress import Progress
        from pipeline.reshard import reshard

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
        from pipeline.task_centroids import TaskCentroids, make_centroids

        def show(task: TaskCentroids) -> None:
            found = task.summary
            line = "{name}: {images:,} images, {unreadable:,} unreadable, {centroids:,} centroids"
            print(json.dumps(found) if as_json else line.format(**found), flush=True)

        make_centroids(
            loaded, tasks, output, centroids_per_task, tfio_python, lambda image: _say(f"unreadable: {image}"), show
        )
    if not as_json:
        print(f"written: {output}")


def _recipe(path: str, as_json: bool) -> Recipe:
    try:
        return load_recipe(path)
    except RecipeError as error:
        if as_json:
            print(json.dumps({"recipe": path, "faults": error.faults}))
        else:
            for fault in error.faults:
                _say(f"{path}: {fault}")
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
        from pipeline.progress import Progress
        from pipeline.run import run

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
    # Torch and Beam take seconds to import, which `--help` and `validate` need not wait for.
    from pipeline.run import UsageError
    from pipeline.sources.webdataset import NoShards

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
    except (UsageError, NoShards) as error:
        _fail(2, str(error), as_json)
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


def _fail(status: int, message: str, as_json: bool) -> None:
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
