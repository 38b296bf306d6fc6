"""The funnel of a run as a table on a terminal, and where its files are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from transforms.core.records import SIZE_NOT_USED, UID_REPLACED

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.output_folder.layout import Layout


_NOTES = {
    UID_REPLACED: "the pool's uid is no UUID, no whole number and not 32 hex digits; another one was derived",
    SIZE_NOT_USED: "the pool's original size cannot be that of the image; the stored size was judged",
}


def show_funnel(funnel: dict[str, Any], layout: Layout, console: Console) -> None:
    """Print `funnel` (the content of funnel.json) as a table, and the paths of the outputs in `layout`."""
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
    for note, count in funnel.get("pool_notes", {}).items():
        console.print(f"{count:,} samples: {_NOTES[note]} ({note})", highlight=False)
    places = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, path in (
        ("training subset", layout.subset),
        ("decision for each sample", layout.decisions("").rpartition("/")[0] + "/"),
        ("scores and features", f"{layout.output}/annotations/"),
        ("clusters, table", layout.clusters),
        ("clusters, figure", layout.clusters_figure),
        ("dead letters", f"{layout.output}/dead_letters/"),
        ("this table as JSON", layout.funnel),
        ("recipe, models, versions", layout.manifest),
    ):
        places.add_row(what, path)
    console.print(places, highlight=False)
