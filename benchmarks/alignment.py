"""Stage 3 on large pools: time, memory, and whether it finds exactly the planted duplicates.

    python -m benchmarks.alignment [--quick] [--json] [--rows N N] [--only RUN] [--workers N]

The tables of stages 1 and 2 are generated from a seed: embeddings of 512 dimensions around rows/1,000 centres. 5 % of
the rows are near copies of another row above the threshold of 1 - epsilon, and 5 % are just below it. All of stage 3
runs over them in its own process: k-means with k = rows/1,000, assignment, semantic dedup, CIDS, copies and decisions.
The last run has one cluster of 200,000 rows; its centroids are given, because k-means would split that cluster. The
tile kernel is compared with plain matrix products of the same shape and precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import graphs
from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import write_listing
from pipeline.runners.supported import pipeline_of
from pipeline.sources.pool import list_shards
from transforms.core import recipe as recipes
from transforms.cross_modality.digit import DigitSettings
from transforms.cross_modality.flipped_clip import FlippedClipSettings
from transforms.distribution_alignment.duplicate_search import semantic_duplicates
from transforms.distribution_alignment.semantic_dedup import SemanticDedupSettings
from transforms.distribution_alignment.vectors import exact_products, unit_rows
from transforms.single_modality.captions import CaptionFrequencySettings, CaptionLengthSettings
from transforms.single_modality.image_shape import AspectRatioSettings, MinSideSettings
from transforms.single_modality.near_duplicate import NearDuplicateSettings

DIMENSIONS = 512
SHARD_ROWS = 10_000
EPSILON = 0.05
LARGE_CLUSTER_ROWS = 200_000
ORACLE_ROWS = 2_000


@dataclasses.dataclass(frozen=True)
class Pool:
    """Generated rows.

    units float16 (n, d); cosines float32 (n,): flipped-CLIP, which decides the rank; origin int64 (n,): the row that a
    planted row was derived from, -1 for other rows; copies bool (n,): whether a planted row is above the threshold;
    centres float32 (k, d).
    """

    units: np.ndarray
    cosines: np.ndarray
    origin: np.ndarray
    copies: np.ndarray
    centres: np.ndarray


def make_pool(rows: int, large_cluster_rows: int = 0) -> Pool:
    """Generate `rows` rows around rows/1,000 centres, `large_cluster_rows` of them around the first centre."""
    rng = np.random.default_rng(rows + large_cluster_rows)
    count = max(2, rows // 1000)
    centres = unit_rows(rng.normal(size=(count, DIMENSIONS)).astype(np.float32))
    around = rng.integers(1 if large_cluster_rows else 0, count, size=rows)
    around[rng.permutation(rows)[:large_cluster_rows]] = 0
    units = np.empty((rows, DIMENSIONS), np.float16)
    for start in range(0, rows, SHARD_ROWS):
        block = slice(start, start + SHARD_ROWS)
        noise = rng.standard_normal((len(around[block]), DIMENSIONS), np.float32) * (0.8 / DIMENSIONS**0.5)
        units[block] = unit_rows(centres[around[block]] + noise)
    chosen = rng.permutation(rows)[: rows // 5]
    planted, origins = chosen[: rows // 10], chosen[rows // 10 :][: rows // 10]
    origin, copies = np.full(rows, -1), np.zeros(rows, bool)
    origin[planted] = origins
    copies[planted[::2]] = True
    for start in range(0, len(planted), SHARD_ROWS):
        made = planted[start : start + SHARD_ROWS]
        source = unit_rows(units[origin[made]])
        aside = rng.standard_normal(source.shape, np.float32)
        aside = unit_rows(aside - source * np.einsum("ij,ij->i", aside, source)[:, None])
        cosine = np.where(copies[made], rng.uniform(0.955, 0.995, len(made)), rng.uniform(0.92, 0.945, len(made)))
        units[made] = cosine[:, None] * source + np.sqrt(1 - cosine**2)[:, None] * aside
    cosines = rng.uniform(0.2, 0.4, rows).round(4).astype(np.float32)  # rounded, so that there are ties
    return Pool(units, cosines, origin, copies, centres)


def write_tables(pool: Pool, folder: Path) -> None:
    """Write the tables of stages 1 and 2, and an empty tar for each shard."""
    layout = Layout(str(folder / "out"))
    (folder / "pool").mkdir(parents=True)
    count = len(pool.units)
    hashes = np.random.default_rng(count).integers(0, 2**64, count, np.uint64)
    thumbnails = np.random.default_rng(count + 1).integers(0, 2**8, (count, 48), np.uint8)
    for number, start in enumerate(range(0, count, SHARD_ROWS)):
        shard, rows = f"{number:05d}", range(start, min(start + SHARD_ROWS, count))
        (folder / "pool" / f"{shard}.tar").write_bytes(bytes(10_240))
        same = {"uid": [f"{row:032x}" for row in rows], "key": [f"{row:09d}" for row in rows]}
        stop = slice(rows.start, rows.stop)
        columns: dict[str, tuple[pa.Schema, dict[str, Any]]] = {
            layout.single_modality(shard): (
                tables.single_modality_schema(),
                {"shard": [shard] * len(rows), "caption": [f"caption of picture {row}" for row in rows],
                 "width_px": [512] * len(rows), "height_px": [384] * len(rows),
                 "original_width_px": [512] * len(rows), "original_height_px": [384] * len(rows),
                 "perceptual_hash": [f"{hashes[row]:016x}" for row in rows],
                 "image_thumbnail": [thumbnails[row].tobytes() for row in rows],
                 "word_count": [4] * len(rows), "character_count": [26] * len(rows)},
            ),
            layout.pool_wide(shard): (
                tables.pool_wide_schema(), {"pool_samples": [count] * len(rows), "caption_image_count": [1] * len(rows)}
            ),
            layout.cross_modality(shard): (
                tables.cross_modality_schema(),
                {"flipped_clip_cosine": pool.cosines[stop], "digit_probability": (pool.cosines[stop] * 7919) % 1,
                 "embedding": [row.tobytes() for row in pool.units[stop]]},
            ),
        }  # fmt: skip
        for path, (schema, given) in columns.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            values: dict[str, Any] = {**dict.fromkeys(schema.names), **same, **given}
            arrays = [
                pa.nulls(len(rows), f.type) if values[f.name] is None else pa.array(values[f.name], f.type)
                for f in schema
            ]
            pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, compression="zstd")
    np.save(folder / "centres.npy", pool.centres)
    rng = np.random.default_rng(1)
    vectors = {name: rng.normal(size=(8, DIMENSIONS)).astype(np.float32) for name in ("digits", "pets")}
    np.savez(folder / "tasks.npz", allow_pickle=False, **vectors)


def recipe(rows: int, tasks: str, centroids: str | None) -> recipes.Recipe:
    """All rules of stage 3 (`cids` only if `tasks` is given), and rules of the earlier stages that all rows pass."""
    return recipes.Recipe(
        name="benchmark",
        single_modality=recipes.SingleModalitySettings(
            caption_length=CaptionLengthSettings(),
            aspect_ratio=AspectRatioSettings(),
            min_side=MinSideSettings(),
            near_duplicate=NearDuplicateSettings(),
            caption_frequency=CaptionFrequencySettings(),
        ),
        cross_modality=recipes.CrossModalitySettings(
            flipped_clip=FlippedClipSettings(model="bundled:clip", min=0.19),
            digit=DigitSettings(model="bundled:digit"),
        ),
        distribution_alignment=recipes.DistributionAlignmentSettings(
            target=recipes.TargetSettings(pool_share=0.2),
            clusters=recipes.ClustersSettings(count=max(2, rows // 1000), centroids=centroids),
            semantic_dedup=SemanticDedupSettings(epsilon=EPSILON),
            cids=recipes.CidsSettings(tasks=tasks) if tasks else None,
            quality_duplication=recipes.QualityDuplicationSettings(),
            digit_enhancement=recipes.DigitEnhancementSettings(),
        ),
    )


def run_stage(folder: str, rows: str, centroids: str, *beam_options: str) -> None:
    """The child process: run stage 3 over the tables under `folder` and print its seconds."""
    settings = recipe(int(rows), f"{folder}/tasks.npz", centroids or None)
    job = graphs.Job(settings, tuple(list_shards(f"{folder}/pool")), Layout(f"{folder}/out"), {})
    write_listing(job.layout, job.shards)
    started = time.monotonic()
    pipeline = pipeline_of(list(beam_options))
    graphs.build(graphs.distribution_alignment, pipeline, job)
    pipeline.run().wait_until_finish()
    print(time.monotonic() - started)


def stage_figures(pool: Pool, folder: Path, workers: int, centroids: str = "") -> dict[str, float]:
    """Seconds and peak memory in bytes of stage 3 over `pool`, and how its decisions compare with the planted rows."""
    write_tables(pool, folder)
    options = [f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"] if workers > 1 else []
    command = [sys.executable, "-m", "benchmarks.alignment", "--stage", str(folder), str(len(pool.units)), centroids]
    child = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    with PeakBytes(child.pid) as peak:
        text = child.communicate()[0]
    if child.returncode:
        raise RuntimeError(f"stage 3 over {folder} ended with status {child.returncode}")
    return {"seconds": float(text.splitlines()[-1]), "peak_bytes": peak.bytes, **found(pool, folder)}


class PeakBytes:
    """The peak of the summed resident sets of a process and its children, sampled every 50 ms."""

    def __init__(self, pid: int) -> None:
        self._process, self._done, self.bytes = psutil.Process(pid), threading.Event(), 0

    def __enter__(self) -> PeakBytes:
        self._follower = threading.Thread(target=self._follow)
        self._follower.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._follower.join()

    def _follow(self) -> None:
        while not self._done.wait(0.05):
            try:
                family = [self._process, *self._process.children(recursive=True)]
                self.bytes = max(self.bytes, sum(process.memory_info().rss for process in family))
            except psutil.NoSuchProcess:
                continue  # a process ended in the meantime


def found(pool: Pool, folder: Path) -> dict[str, float]:
    """Compare the decisions with the planted duplicates, and with an oracle on some rows of the largest cluster."""
    rows = len(pool.units)
    cluster, keeper = np.empty(rows, np.int64), np.full(rows, -1)
    for path in sorted((folder / "out" / "decisions").glob("*.parquet")):
        table = pq.read_table(path, columns=["uid", "cluster", "semantic_duplicate_of"]).to_pydict()
        numbers = [int(uid, 16) for uid in table["uid"]]
        cluster[numbers] = table["cluster"]
        keeper[numbers] = [-1 if uid is None else int(uid, 16) for uid in table["semantic_duplicate_of"]]
    # The worse of the two is dropped. Uids are row numbers, so ties keep the smaller row.
    planted = np.flatnonzero(pool.origin >= 0)
    pairs = np.column_stack([planted, pool.origin[planted]])
    worse_first = np.take_along_axis(pairs, np.lexsort((-pairs, pool.cosines[pairs]), axis=1), axis=1)
    worse = worse_first[:, 0]
    together = cluster[pairs[:, 0]] == cluster[pairs[:, 1]]
    above, dropped = pool.copies[planted], keeper >= 0
    explained = np.zeros(rows, bool)
    explained[worse[above & together]] = True
    return {
        "planted_above": int((above & together).sum()),
        "planted_above_found": int(dropped[worse[above & together]].sum()),
        "planted_above_parted_by_k_means": int((above & ~together).sum()),
        "planted_below": int((~above).sum()),
        "dropped_otherwise": int((dropped & ~explained).sum()),
        "largest_cluster_rows": int(np.bincount(cluster).max()),
        "oracle_rows": min(ORACLE_ROWS, rows),
        "oracle_differs": oracle_differences(pool, cluster, keeper),
    }


def oracle_differences(pool: Pool, cluster: np.ndarray, keeper: np.ndarray) -> int:
    """The number of rows, in a sample of the largest cluster, whose keeper differs from the definition in float64."""
    members = np.flatnonzero(cluster == np.bincount(cluster).argmax())
    members = members[np.lexsort((members, -pool.cosines[members]))]
    units = unit_rows(pool.units[members])
    differing = 0
    places = np.random.default_rng(2).permutation(len(members))[:ORACLE_ROWS]
    for start in range(0, len(places), 64):
        some = places[start : start + 64]
        products = units.astype(np.float32) @ units[some].T
        for column, place in enumerate(some):
            near = np.flatnonzero(products[:place, column] > 1 - EPSILON - 1e-3)
            exact = exact_products(units[near], np.repeat(units[place : place + 1], len(near), axis=0))
            keepers = members[near[exact > 1 - EPSILON]]
            differing += keeper[members[place]] != (keepers[0] if len(keepers) else -1)
    return int(differing)


def kernel_ratios(rows: int = 8192, block: int = 1024) -> dict[str, float]:
    """The speed of the tile kernel relative to plain float32 products of the same blocks.

    Measured on rows for which the bound avoids most products, and on rows for which it avoids none.
    """
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(1, DIMENSIONS))
    spread = {"distinct rows": 1.0, "all rows just below the threshold": 0.28}
    ratios = {}
    for name, noise in spread.items():
        units = unit_rows(centre + noise * rng.normal(size=(rows, DIMENSIONS)))

        def bare(units: np.ndarray = units) -> None:
            for column in range(0, rows, block):
                for row in range(0, column + 1, block):
                    units[row : row + block] @ units[column : column + block].T

        def kernel(units: np.ndarray = units) -> None:
            semantic_duplicates(units, EPSILON)

        ratios[f"tile kernel / bare products, {name}"] = _seconds(bare) / _seconds(kernel)
    return ratios


def _seconds(work: Callable[[], None]) -> float:
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smaller pools, to check that the benchmark runs; the growth is meaningless",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    parser.add_argument("--rows", type=int, nargs=2, default=[250_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the local runner")
    parser.add_argument("--only", choices=["few", "many", "skewed"], help="only one of the runs, without the ratios")
    parser.add_argument("--stage", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        return run_stage(*arguments.stage)
    few, many = (10_000, 40_000) if arguments.quick else arguments.rows
    large = LARGE_CLUSTER_ROWS // (10 if arguments.quick else 1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for what, rows, large_rows in (("few", few, 0), ("many", many, 0), ("skewed", 2 * large, large)):
            if arguments.only not in (None, what):
                continue
            folder = Path(name) / what
            pool = make_pool(rows, large_rows)
            centroids = str(folder / "centres.npy") if large_rows else ""
            for figure, value in stage_figures(pool, folder, arguments.workers, centroids).items():
                figures[f"{what}: {figure}"] = value
                print(f"{what}, {rows:,} rows: {figure}: {value:,.6g}", flush=True)
    if arguments.only is None:
        growth = figures["many: seconds"] / figures["few: seconds"]
        ratios = {**kernel_ratios(), f"seconds, {many:,} rows / {few:,} rows": growth}
        for figure, value in ratios.items():
            print(f"{figure}: {value:.4g}")
        figures = ratios | figures
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
