"""The demo, run once for all tests of its outputs."""

from __future__ import annotations

import importlib.resources
import itertools
import os
import tarfile
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from pipeline.report.progress import Progress
from pipeline.runs.run import run
from pipeline.sources.pool import list_shards
from transforms.core.recipe import STAGES, load_recipe

POOL = importlib.resources.files("pipeline") / "demo" / "pool"
RECIPE = importlib.resources.files("recipes") / "demo.yaml"
COMPARED = (
    "annotations", "decisions", "subset.npy", "funnel.json", "clusters.parquet", "clusters.svg", "centroids.npy",
    "dead_letters",
)  # fmt: skip


def run_demo(output: Path, *beam_options: str, pool: Path | str = str(POOL)) -> dict:
    """Run the demo's recipe on `pool`, with the output folder `output`, and return its funnel."""
    progress = Progress(Console(stderr=True))
    outcome = run(load_recipe(str(RECIPE)), str(pool), str(output), list(STAGES), list(beam_options), progress)
    assert outcome.funnel is not None
    return outcome.funnel


def write_small_pool(folder: Path, samples: int = 40, pool: Path | str = str(POOL)) -> Path:
    """Write the first samples of each shard of `pool`, by default the demo's, under `folder`."""
    folder.mkdir(parents=True)
    for shard in list_shards(str(pool)):
        with tarfile.open(shard.path) as tar, tarfile.open(folder / f"{shard.name}.tar", "w") as small:
            for member in itertools.islice(tar, 3 * samples):
                small.addfile(member, tar.extractfile(member))
    return folder


def demo_output(folders: pytest.TempPathFactory) -> Path:
    """Return the output folder of a finished demo. All test processes share it, so tests must not change it."""
    shared = folders.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    output = shared / "demo-of-all" / "out"
    with FileLock(shared / "demo-of-all.lock"):
        if not (output / "run.json").exists():  # written last
            run_demo(output)
    return output


def snapshot(folder: Path) -> dict[str, bytes]:
    files = [file for name in COMPARED for file in (folder / name, *(folder / name).rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
