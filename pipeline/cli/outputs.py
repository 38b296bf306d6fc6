"""Commands around a run: the subset as tars, and the centroids of downstream tasks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.messages import beam_options_in, errors_console, exit_status, read_recipe, say
from pipeline.cli.options import Json, Verbose

if TYPE_CHECKING:
    from pipeline.centroids.command import TaskCentroids


def reshard(
    context: typer.Context,
    run_output: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a finished run.")],
    pool: Annotated[list[str], typer.Option("--input", metavar="POOL", help="The pool of that run. Repeatable.")],
    output: Annotated[str, typer.Option("--output", metavar="FOLDER", help="Folder for the tars.")],
    samples_per_shard: Annotated[
        int, typer.Option(min=1, metavar="N", help="Average number of samples in a tar.")
    ] = 10_000,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the training subset of a run as webdataset tars.

    Copies of a sample are placed far apart. The same command resumes an interrupted reshard. Arguments after `--` go to
    Beam.

    \b
    Example:
      pairsift reshard out --input pool --output tars
    """
    with exit_status(as_json, verbose):
        from pipeline.report.progress import Progress
        from pipeline.reshard.command import reshard, show_resharded
        from pipeline.sources.pool_names import joined

        progress = Progress(errors_console(), as_json)
        done = reshard(run_output, joined(pool), output, samples_per_shard, beam_options_in(context), progress)
        show_resharded(done, as_json)


def centroids(
    tasks: Annotated[
        list[str], typer.Argument(metavar="NAME=IMAGES", help="Name and images of each task: a folder or a tar.")
    ],
    recipe: Annotated[str, typer.Option("--recipe", metavar="FILE", help="Recipe whose CLIP model embeds the images.")],
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="The .npz file to write, for `cids.tasks` of a recipe.")
    ],
    centroids_per_task: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of centroids of a task.")
    ] = 16,
    tfio_python: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Python with tensorflow-io, to decode DICOM, EXR and JPEG 2000."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compute the centroids of downstream tasks from their images.

    \b
    Example:
      pairsift centroids cars=images/cars pets=images/pets.tar \\
        --recipe recipe.yaml --output tasks.npz
    """
    loaded = read_recipe(recipe, as_json)
    with exit_status(as_json, verbose):
        from pipeline.centroids.command import make_centroids

        def show(task: TaskCentroids) -> None:
            found = task.summary
            line = "{name}: {images:,} images, {unreadable:,} unreadable, {centroids:,} centroids"
            print(json.dumps(found) if as_json else line.format(**found), flush=True)

        make_centroids(
            loaded, tasks, output, centroids_per_task, tfio_python, lambda image: say(f"unreadable: {image}"), show
        )
    if not as_json:
        print(f"written: {output}")
