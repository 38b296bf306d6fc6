"""What each further sample of a pool costs stage 2 in memory, on the local runner.

    python -m benchmarks.memory [--quick] [--json]

Stage 2 with a tiny CLIP and a tiny picture a sample, each pool in a process of its own; the slope of the peak resident
set between 2,000 and 20,000 samples, in bytes a sample. A slope, so that what the libraries and the model weigh in any
case hides nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks import pictures, random_models
from pipeline import recipe as recipes
from pipeline.progress import Progress
from pipeline.recipe import CROSS_MODALITY, SINGLE_MODALITY
from pipeline.records import Annotation, Sample
from pipeline.run import run

SHARD_SAMPLES = 500


def recipe(model: Path) -> recipes.Recipe:
    """Stage 2 with nothing but a tiny CLIP."""
    clip = recipes.FlippedClip(model=str(model), min=-1.0)
    return recipes.Recipe(
        name="benchmark",
        single_modality=recipes.SingleModality(),
        cross_modality=recipes.CrossModality(flipped_clip=clip),
        distribution_alignment=recipes.DistributionAlignment(target=recipes.Target(survivors=True)),
    )


def write_pool(folder: Path, count: int) -> None:
    """`count` pairs of small noise and a caption of their own."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(count):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(out, "JPEG")
        annotation = Annotation("0" * 32, "s", "k", f"caption number {number} of a picture of noise")
        samples.append(Sample(annotation, {}, out.getvalue()))
    pictures.write_tars(folder, samples, max(1, count // SHARD_SAMPLES))


def peak_bytes(folder: Path, count: int) -> int:
    """The peak resident set of a process that runs stage 2 over so many samples."""
    pool, output = folder / f"pool{count}", folder / f"out{count}"
    write_pool(pool, count)
    command = [sys.executable, "-m", "benchmarks.memory", "--stage"]
    for stage in (SINGLE_MODALITY, CROSS_MODALITY):
        done = subprocess.run(
            [*command, stage, str(folder / "clip"), str(pool), str(output)], capture_output=True, text=True, check=True
        )
    return int(done.stdout.splitlines()[-1])


def run_stage(stage: str, model: str, pool: str, output: str) -> None:
    """The child process: run one stage and print its own peak resident set in bytes."""
    run(recipe(Path(model)), pool, output, [stage], [], Progress(Console(file=io.StringIO())))
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(int(peak) * 1024)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller pools: shows that it runs, not the slope")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--stage", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        return run_stage(*arguments.stage)
    few, many = (500, 1500) if arguments.quick else (2000, 20000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_models.save_tiny_clip(folder / "clip")
        small, large = peak_bytes(folder, few), peak_bytes(folder, many)
    figures = {
        "stage 2, bytes a further sample": (large - small) / (many - few),
        f"peak at {few} samples, bytes": small,
        f"peak at {many} samples, bytes": large,
    }
    for what, value in figures.items():
        print(f"{what}: {value:,.0f}")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
