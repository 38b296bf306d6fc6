"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.output_folder.defaults import KEPT_VERSIONS as KEPT_VERSIONS

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="Path of the recipe.")]
Pool = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="POOL",
        help="Pool: a folder of webdataset tars, tars as in 'a.tar::b.tar' and '{00000..00099}.tar', or a pattern "
        "ending in .tar. Repeatable.",
    ),
]
Output = Annotated[str, typer.Option("--output", metavar="FOLDER", help="Folder for all outputs.")]
GsPool = Annotated[
    list[str],
    typer.Option(
        "--input", metavar="POOL", help="Pool: a folder of webdataset tars on gs://, or a pattern. Repeatable."
    ),
]
GsOutput = Annotated[str, typer.Option("--output", metavar="FOLDER", help="Folder on gs:// for all outputs.")]
LaunchSettings = Annotated[
    str,
    typer.Option(
        "--settings", metavar="FILE", help="Launch settings: a copy of templates/dataflow.yaml with your values."
    ),
]
KeepVersions = Annotated[
    int, typer.Option(min=1, metavar="N", help="Number of past results to keep, including the newest.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the requests and send none. Needs no credentials.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show full tracebacks.")]
