"""Costs per sample, for `pairsift estimate`: core seconds, bytes in each table and bytes in each shuffle.

    OMP_NUM_THREADS=1 python -m benchmarks.costs [--quick] [--json]

Seconds are user CPU time, which other load on the machine affects less than wall time. They are slopes between a small
and a large pool, which removes the time for loading. One thread is used, because threads that wait for each other
count as busy. Shuffle bytes are what Beam's local runner passes to each GroupByKey, after its combiners.

The per-shard part of stage 1 runs with the rules of paper.yaml over pairs from `benchmarks.pictures`. Its passes over
the pool cost so little per sample that a measurement takes many samples, so they run over generated rows, all
different, as in `benchmarks.alignment`. So does stage 3, once with few and once with many rows in each cluster of a
shard, because each such group has a cost of its own. The names of the figures are those in
`pipeline/estimate/figures.yaml`.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from apache_beam.coders.coder_impl import create_InputStream
from apache_beam.runners.portability.fn_api_runner import execution
from rich.console import Console

from benchmarks import alignment, pictures
from pipeline import graphs
from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import write_listing
from pipeline.output_folder.manifest import identities
from pipeline.report.progress import Progress
from pipeline.runners.supported import pipeline_of
from pipeline.runs.run import run
from pipeline.sources.pool import list_shards
from transforms.core import recipe as recipes
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, load_recipe
from transforms.cross_modality.flipped_clip import FlippedClipSettings

PAPER = Path(__file__).parent.parent / "recipes" / "paper.yaml"
TARS = 2
GROUPS = "Find ranges/Group keys"
"""The shuffle that has one element for each cluster of each shard."""
TRAINING = "Train centroids/"
FINE = f"{TRAINING}Gather coarse cluster"


class Shuffles:
    """The number of elements and bytes that entered each GroupByKey while `open`, by step name."""

    def __init__(self) -> None:
        self.elements: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Count the elements that the local runner groups."""
        names: dict[int, str] = {}
        kept = []  # keeps the buffers alive, so that no id is reused
        get_buffer, append = execution.BundleContextManager.get_buffer, execution.GroupingBuffer.append

        def named(manager: Any, buffer_id: bytes, transform_id: str) -> Any:
            buffer = get_buffer(manager, buffer_id, transform_id)
            kind, name = execution.split_buffer_id(buffer_id)
            if kind == "group":
                transform = manager.execution_context.pipeline_components.transforms[name]
                names[id(buffer)] = _short(transform.unique_name)
                kept.append(buffer)
            return buffer

        def counted(buffer: Any, data: bytes) -> None:
            stream, coder = create_InputStream(data), buffer._pre_grouped_coder.get_impl()
            while stream.size() > 0:
                coder.decode_from_stream(stream, True)
                self.elements[names[id(buffer)]] += 1
            self.bytes[names[id(buffer)]] += len(data)
            append(buffer, data)

        execution.BundleContextManager.get_buffer, execution.GroupingBuffer.append = named, counted
        try:
            yield
        finally:
            execution.BundleContextManager.get_buffer, execution.GroupingBuffer.append = get_buffer, append


def _short(name: str) -> str:
    """A step's name without the names of Beam's own steps inside it."""
    parts = name.split("/")
    while len(parts) > 1 and parts[-1] in ("GroupByKey", "CombinePerKey", "Group", "ReshufflePerKey", "Reshuffle",
                                           "CoGroupByKeyImpl", "MaybeReshuffle"):  # fmt: skip
        parts.pop()
    return "/".join(dict.fromkeys(parts))


def user_seconds() -> float:
    """User CPU time in seconds of this process and its finished children."""
    return sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def stage_1(folder: Path, few: int, many: int) -> dict[str, float]:
    """Core seconds per sample of stage 1, without its passes over the pool."""
    recipe = load_recipe(str(PAPER)).model_copy(update={"cross_modality": _NOT_RUN})
    seconds: dict[int, float] = {}
    for number, count in enumerate((few, few, many)):  # the first run is a warm-up that loads everything
        run_folder = folder / f"stage 1, {number}"
        pool, output = pictures.write_tars(run_folder / "pool", pictures.pairs(count), TARS), run_folder / "out"
        job = graphs.Job(recipe, tuple(list_shards(str(pool))), Layout(str(output)), identities(recipe))
        started = user_seconds()
        run(recipe, str(pool), str(output), [SINGLE_MODALITY], [], Progress(Console(file=io.StringIO())))
        total = user_seconds() - started
        seconds[count] = total - _graph(graphs.pool_wide, job)
    return {"cpu/single_modality": (seconds[many] - seconds[few]) / (many - few)}


def pool_wide(folder: Path, few: int, many: int) -> dict[str, float]:
    """Core seconds and shuffle bytes per sample of stage 1's passes over the pool."""
    seconds, shuffles = {}, {}
    for number, count in enumerate((few, few, many)):  # the first run is a warm-up that loads everything
        job = generated(folder / f"pool-wide, {number}", count, alignment.recipe(count, "", None))
        seconds[count], shuffles[count] = _graph(graphs.pool_wide, job), Shuffles()
        with shuffles[count].open():
            _graph(graphs.pool_wide, job)
    figures = {"cpu/pool_wide": (seconds[many] - seconds[few]) / (many - few)}
    for name in shuffles[many].bytes:
        slope = (shuffles[many].bytes[name] - shuffles[few].bytes[name]) / (many - few)
        if slope >= 1:  # other shuffles have only a few bytes for each shard
            figures[f"shuffle/{SINGLE_MODALITY}/{name}/sample"] = slope
    return figures


_NOT_RUN = recipes.CrossModalitySettings(flipped_clip=FlippedClipSettings(model="bundled:clip", min=0.0))


def generated(folder: Path, rows: int, recipe: recipes.Recipe) -> graphs.Job:
    """A job over `rows` generated rows, for the graphs that read only tables."""
    alignment.write_tables(alignment.make_pool(rows), folder)
    layout, shards = Layout(str(folder / "out")), tuple(list_shards(str(folder / "pool")))
    write_listing(layout, shards)
    return graphs.Job(recipe, shards, layout, identities(recipe))


def _graph(graph: Any, job: graphs.Job) -> float:
    """Run one graph. Returns its user CPU time in seconds."""
    started = user_seconds()
    pipeline = pipeline_of([])
    graphs.build(graph, pipeline, job)
    pipeline.run().wait_until_finish()
    return user_seconds() - started


def stage_3(folder: Path, few: int, many: int, clusters: int) -> dict[str, float]:
    """Core seconds and shuffle bytes of stage 3: per sample of the pool, per candidate, per group and per cluster.

    A group is the candidates of one shard in one cluster.
    """
    timed = [
        Aligned(folder / f"stage 3, {number}", *sizes)
        for number, sizes in enumerate(
            [(few, 0.0, 10), (few, 0.0, 10), (many, 0.0, 10), (many, 0.38, 10), (few, 0.0, clusters),
             (many, 0.0, clusters)]
        )
    ][1:]  # the first run is a warm-up that loads everything  # fmt: skip
    sums = np.array([[1, each.samples, each.candidates, each.groups, each.clusters] for each in timed])
    _, sample, candidate, group, cluster = np.linalg.solve(sums, [each.seconds for each in timed])
    figures = {"cpu/decisions": sample, "cpu/candidate": candidate, "cpu/group": group, "cpu/cluster": cluster}
    dense, sparse = timed[1], timed[-1]
    for name in dense.shuffles.bytes:
        if name.startswith(TRAINING) or dense.shuffles.bytes[name] < 2 * dense.candidates:
            continue  # does not grow with candidates: a few bytes for each shard, each cluster or the job
        elements = np.array([[each.candidates, each.shuffles.elements[name]] for each in (dense, sparse)])
        row, element = np.linalg.solve(elements, [each.shuffles.bytes[name] for each in (dense, sparse)])
        figures[f"shuffle/{DISTRIBUTION_ALIGNMENT}/{name}/candidate"] = row
        figures[f"shuffle/{DISTRIBUTION_ALIGNMENT}/{name}/element"] = element
    trained = min(sparse.candidates, recipes.ClustersSettings().samples_per_cluster * clusters)
    figures[f"shuffle/{DISTRIBUTION_ALIGNMENT}/{FINE}/training_row"] = (
        sparse.shuffles.bytes[FINE] / trained - 2 * alignment.DIMENSIONS
    )
    return figures


class Aligned:
    """Two runs of stage 3 over generated rows, one for user seconds and one for shuffles.

    Rows with a cosine of at least `min_cosine` are candidates.
    """

    def __init__(self, folder: Path, rows: int, min_cosine: float, clusters: int) -> None:
        self.samples, self.clusters = rows, clusters
        recipe = alignment.recipe(rows, "", None)
        stage = recipe.distribution_alignment.model_copy(update={"clusters": recipes.ClustersSettings(count=clusters)})
        clip = recipe.cross_modality.flipped_clip.model_copy(update={"min": min_cosine})
        scores = recipe.cross_modality.model_copy(update={"flipped_clip": clip})
        recipe = recipe.model_copy(update={"distribution_alignment": stage, "cross_modality": scores})
        job = generated(folder, rows, recipe)
        self.seconds, self.shuffles = _graph(graphs.distribution_alignment, job), Shuffles()
        with self.shuffles.open():
            _graph(graphs.distribution_alignment, job)
        rules = json.loads(Path(job.layout.funnel).read_text())["rules"]
        self.candidates = next(rule["in"] for rule in rules if rule["name"] == "semantic_dedup")
        self.groups = self.shuffles.elements[GROUPS]


def table_bytes(folder: Path) -> dict[str, float]:
    """Bytes per row in each table of a demo run, with the rows of all shards in one file.

    The embedding is left out, because it does not compress.
    """
    paths = {
        "single_modality": Layout.single_modality,
        "pool_wide": Layout.pool_wide,
        "cross_modality": Layout.cross_modality,
        "decisions": Layout.decisions,
    }
    output = str(folder / "demo")
    demo = load_recipe(str(PAPER.with_name("demo.yaml")))
    pool = str(Path(graphs.__file__).parent / "demo" / "pool")
    stages = [SINGLE_MODALITY, CROSS_MODALITY, DISTRIBUTION_ALIGNMENT]
    run(demo, pool, output, stages, [], Progress(Console(file=io.StringIO())))
    schemas = {name: getattr(tables, name.upper()) for name in paths}
    figures = {}
    for name, path in paths.items():
        columns = [column for column in schemas[name].names if column != "embedding"]
        rows = [row for shard in list_shards(pool) for row in _rows(path(Layout(output), shard.name), columns)]
        one = folder / f"{name}.parquet"
        tables.write_table(str(one), rows, schemas[name].remove(schemas[name].get_field_index("embedding"))
                           if "embedding" in schemas[name].names else schemas[name])  # fmt: skip
        figures[f"bytes/{name}"] = one.stat().st_size / len(rows)
    return figures


def _rows(path: str, columns: list[str]) -> list[dict[str, Any]]:
    return pq.read_table(path, columns=columns).to_pylist()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="smaller pools and no demo, to check that the benchmark runs"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    parser.add_argument("--only", choices=["stage_1", "pool_wide", "stage_3", "tables"])
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only in (None, "stage_1"):
            figures |= stage_1(folder, *((40, 120) if arguments.quick else (200, 1100)))
        if arguments.only in (None, "pool_wide"):
            figures |= pool_wide(folder, *((2000, 10_000) if arguments.quick else (20_000, 200_000)))
        if arguments.only in (None, "stage_3"):
            figures |= stage_3(folder, *((2000, 20_000, 800) if arguments.quick else (10_000, 40_000, 5000)))
        if arguments.only == "tables" or not (arguments.only or arguments.quick):
            figures |= table_bytes(folder)
    for figure, value in figures.items():
        print(f"{figure}: {value:.6g}")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
