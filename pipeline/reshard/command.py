"""The `reshard` command: writes the subset of a finished run as webdataset tars, with copies of a sample far apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import apache_beam as beam

from pipeline.output_folder import versions
from pipeline.output_folder.layout import Layout
from pipeline.report.progress import Progress
from pipeline.reshard.copy_placement import CopyPlacement
from pipeline.reshard.offsets import NAME
from pipeline.reshard.subset import Subset, read_subset
from pipeline.reshard.tars import ReshardedFolder, WriteResharded
from pipeline.runners.supported import check, pipeline_of
from pipeline.runners.workers import run_to_end
from pipeline.runs.claim import check_path, claim
from pipeline.sources import pool_names
from pipeline.sources.pool import list_shards
from transforms.core.errors import UsageError
from transforms.core.recipe import PoolSettings
from transforms.core.records import Shard
from transforms.storage import files


@dataclasses.dataclass(frozen=True)
class Resharded:
    """The subset that was written, the placement of its copies, and the output folder."""

    subset: Subset
    placement: CopyPlacement
    folder: ReshardedFolder


def reshard(
    run_output: str,
    pool: str,
    output: str,
    samples_per_shard: int,
    beam_options: list[str],
    progress: Progress,
) -> Resharded:
    """Write the subset that the run in `run_output` selected from `pool` as tars to the folder `output`.

    `pipeline.reshard.copy_placement` determines the position of each copy. An interrupted reshard resumes in the same
    folder. Raises UsageError (or NoShards) before anything is written if the run is not finished, its subset is empty,
    the pool has no tars, or the folder holds something else.
    """
    paths = {"OUT": run_output, **pool_names.options_of(pool), "--output": output}
    for option, path in paths.items():
        check_path(option, path)
    check(beam_options, paths, {}, needs_gpu=False)
    if any(_is_in_pool(part, output) for part in pool_names.split(pool)):
        raise UsageError(
            f"--output: {output} is inside the pool, so the next run would read the copies as samples; choose a folder "
            "outside the pool"
        )
    layout = versions.newest(run_output.rstrip("/") or run_output)
    bounds, subset = _finished_run(layout)
    tables = _tables_of_decisions(layout)
    in_pool = {shard.name: shard for shard in list_shards(pool)}
    shards = [in_pool.get(name, Shard(name, "", "")) for name in tables]

    placement = CopyPlacement.plan(subset.samples, subset.most_copies, subset.checksum.rows, samples_per_shard)
    folder = ReshardedFolder(output.rstrip("/") or output, placement.tars)
    claim(folder, _manifest(tables, layout, subset, placement))
    if not _is_complete(folder):
        with progress.following(NAME, _line(folder)):
            pipeline = pipeline_of(beam_options)
            _ = (
                pipeline
                | "Shards" >> beam.Create(shards)
                | "Spread shards" >> beam.Reshuffle()
                | "Write resharded" >> WriteResharded(layout, bounds, subset, placement, folder)
            )
            run_to_end(pipeline, NAME)
    files.delete_folder(folder.offsets_folder)
    return Resharded(subset, placement, folder)


def show_resharded(done: Resharded, as_json: bool) -> None:
    """Print what was written, and the least distance between copies of a sample."""
    subset, placement, folder = done.subset, done.placement, done.folder
    has_copies = placement.most_copies > 1
    if as_json:
        content = {
            "event": "done",
            "output": folder.output,
            "samples": subset.samples,
            "copies": subset.checksum.rows,
            "tars": placement.tars,
            "least_rows_apart": placement.least_rows_apart if has_copies else None,
            "least_tars_apart": placement.least_tars_apart if has_copies else None,
        }
        print(json.dumps(content))
        return
    print(f"{folder.output}: {subset.checksum.rows:,} copies of {subset.samples:,} samples in {placement.tars:,} tars")
    if has_copies:
        print(
            f"copies of one sample are at least {placement.least_rows_apart:,} rows apart; the numbers of their tars "
            f"differ by at least {placement.least_tars_apart:,}"
        )
    else:
        print("no sample occurs twice")


def _is_complete(folder: ReshardedFolder) -> bool:
    existing = files.names_in(folder.output)
    return files.exists(folder.sizes) and all(folder.tar_name(index) in existing for index in range(folder.tars))


def _line(folder: ReshardedFolder) -> Callable[[], str]:
    """Return a function that describes the progress: the number of tars written and the elapsed time."""
    started = time.monotonic()

    def line() -> str:
        tars = sum(name.endswith(".tar") for name in files.names_in(folder.output))
        return f"{NAME}: {tars}/{folder.tars} tars, {time.monotonic() - started:.0f} s"

    return line


def _finished_run(layout: Layout) -> tuple[PoolSettings, Subset]:
    """Return the run's limits on what is read from a pool, and its subset.

    Raises UsageError if there is no finished run, or if its subset is empty.
    """
    try:
        recipe = json.loads(files.read_bytes(layout.manifest))["recipe"]
        bounds, subset = PoolSettings.model_validate(recipe["pool"]), read_subset(layout.subset)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{layout.output}: holds no finished run ({reason}); finish `pairsift run` first") from error
    if not subset.samples:
        raise UsageError(f"{layout.output}: the training subset of this run is empty, so there is nothing to reshard")
    return bounds, subset


def _tables_of_decisions(layout: Layout) -> dict[str, int]:
    """Return the size in bytes of each shard's table of decisions, sorted by shard name."""
    folder, _, name = layout.decisions("*").rpartition("/")
    before, _, after = name.partition("*")
    return {
        name.removeprefix(before).removesuffix(after): size
        for name, size in sorted(files.sizes_bytes_in(folder).items())
        if name.startswith(before) and name.endswith(after)
    }


def _manifest(tables: dict[str, int], layout: Layout, subset: Subset, placement: CopyPlacement) -> dict[str, Any]:
    """Return the content of reshard.json: the inputs that determine the tars, independent of the paths of run and pool.

    Recomputed tables of decisions are byte-identical, so their sizes are enough to identify them.
    """
    return {
        "subset_sha256": files.sha256(layout.subset),
        "decisions_sha256": hashlib.sha256(json.dumps(tables).encode()).hexdigest(),
        "samples": subset.samples,
        "copies": subset.checksum.rows,
        "most_copies": subset.most_copies,
        "tars": placement.tars,
        "pairsift": version("pairsift"),
    }


def _is_in_pool(folder: str, path: str) -> bool:
    """Return whether `path` is in the pool `folder` or, if that is a pattern, whether tars in `path` would match it."""
    if folder.endswith(".tar"):
        return files.matches(files.absolute(folder), files.join(files.absolute(path), "00000.tar"))
    if files.in_cloud_storage(folder) or files.in_cloud_storage(path):
        return f"{path}/".startswith(f"{folder.rstrip('/')}/")
    return Path(path).resolve().is_relative_to(Path(folder).resolve())
