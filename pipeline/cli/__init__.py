"""The command line. Exit status: 0 done, 1 failed, 2 wrong use.

Each command imports what it runs: `--help` needs neither Beam nor Torch, which take seconds to import.
"""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli import cloud, local, outputs

app = typer.Typer(
    name="pairsift",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text wraps well at 80 columns, and spares the import of rich
    context_settings={"help_option_names": ["-h", "--help"]},
)

_BEAM = {"allow_extra_args": True}  # after `--`; an unknown option before it is an error


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        print(f"pairsift {version('pairsift')}")
        raise typer.Exit


@app.callback()
def _pairsift(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Filter a raw pool of web image-text pairs into a subset for training a CLIP model.

    \b
    Examples:
      pairsift demo
      pairsift validate recipe.yaml
      pairsift run recipe.yaml --input pool --output out

    `pairsift COMMAND --help` describes a command and its options.
    """


app.command(context_settings=_BEAM)(local.demo)
app.command()(local.validate)
app.command(context_settings=_BEAM)(local.run)
app.command(context_settings=_BEAM)(local.select)
app.command(context_settings=_BEAM)(outputs.reshard)
app.command()(outputs.centroids)
app.command()(cloud.estimate)
app.command()(cloud.launch)
app.command()(cloud.schedule)


def main() -> None:
    """Entry point of `pairsift` and `python -m pipeline.cli`."""
    app(prog_name="pairsift")
