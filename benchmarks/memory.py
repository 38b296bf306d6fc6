"""Memory of each stage per additional sample of the pool, on the local runner.

    python -m benchmarks.memory [--quick] [--json]

Runs all three stages, each in its own process, with all rules of stage 1 except faces, a tiny CLIP, and tiny images.
The result is the slope of the peak resident set between 4 and 40 shards of 500 samples, in bytes per sample. A slope
excludes the constant size of libraries and models. Stage 1 runs a second time with another `max_hamming`: its
per-shard features exist by then, so only its passes over the pool run.
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
from pipeline.report.progress import Progress
from pipeline.runs.run import run
from transforms.core import recipe as recipes
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY
from transforms.core.records import Annotation, Sample
from transforms.cross_modality.flipped_clip import FlippedClipSettings
from transforms.distribution_alignment.semantic_dedup import SemanticDedupSettings
from transforms.single_modality.captions import CaptionFrequencySettings, CaptionLengthSettings
from transforms.single_modality.image_shape import AspectRatioSettings, MinSideSettings
from transforms.single_modality.language import LanguageSettings
from transforms.single_modality.near_duplicate import NearDuplicateSettings
from transforms.single_modality.pos_pattern import PosPatternSettings

SHARD_SAMPLES = 500
SIDE_PX = 48
POOL_WIDE = "single_modality, passes over the pool alone"
MEASURED = (SINGLE_MODALITY, POOL_WIDE, CROSS_MODALITY, DISTRIBUTION_ALIGNMENT)
"""The measured steps in the order in which they run; each needs the tables of the steps before it."""


def recipe(model: Path, max_hamming: int) -> recipes.Recipe:
    """All rules of stage 1 except faces, which is slow and stores only one number; only a tiny CLIP in stage 2."""
    clip = FlippedClipSettings(model=str(model), min=-1.0)
    return recipes.Recipe(
        name="benchmark",
        single_modality=recipes.SingleModalitySettings(
            near_duplicate=NearDuplicateSettings(max_hamming=max_hamming),
            caption_length=CaptionLengthSettings(),
            language=LanguageSettings(),
            pos_pattern=PosPatternSettings(),
            caption_frequency=CaptionFrequencySettings(),
            aspect_ratio=AspectRatioSettings(),
            min_side=MinSideSettings(min_px=SIDE_PX),
        ),
        cross_modality=recipes.CrossModalitySettings(flipped_clip=clip),
        distribution_alignment=recipes.DistributionAlignmentSettings(
            target=recipes.TargetSettings(survivors=True),
            clusters=recipes.ClustersSettings(count=20),
            semantic_dedup=SemanticDedupSettings(),
            quality_duplication=recipes.QualityDuplicationSettings(),
        ),
    )


def write_pool(folder: Path, count: int) -> None:
    """Write `count` pairs of a small noise image and a unique caption."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(count):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)).save(out, "JPEG")
        annotation = Annotation("0" * 32, "s", "k", f"caption number {number} of a picture of noise")
        samples.append(Sample(annotation, {}, out.getvalue()))
    pictures.write_tars(folder, samples, max(1, count // SHARD_SAMPLES))


def peaks_bytes(folder: Path, count: int) -> dict[str, int]:
    """The peak resident set in bytes of each step of `MEASURED` over `count` samples, each in its own process."""
    pool, output = folder / f"pool{count}", folder / f"out{count}"
    write_pool(pool, count)
    arguments = [str(folder / "clip"), str(pool), str(output)]
    found = {}
    for what in MEASURED:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", "--measure", what, *arguments],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found[what] = int(done.stdout.splitlines()[-1])
    return found


def measure(what: str, model: str, pool: str, output: str) -> None:
    """The child process: run one step of `MEASURED` and print the peak resident set of this process in bytes."""
    stage, max_hamming = (SINGLE_MODALITY, 2) if what == POOL_WIDE else (what, 3 if what == SINGLE_MODALITY else 2)
    run(recipe(Path(model), max_hamming), pool, output, [stage], [], Progress(Console(file=io.StringIO())))
    # `ru_maxrss` does not work here: a process inherits it from its parent.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(int(peak) * 1024)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="smaller pools, to check that the benchmark runs; the slope is meaningless"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(*arguments.measure)
    few, many = (500, 1500) if arguments.quick else (2000, 20000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_models.save_tiny_clip(folder / "clip")
        small, large = peaks_bytes(folder, few), peaks_bytes(folder, many)
    figures = {f"{what}: bytes a further sample": (large[what] - small[what]) / (many - few) for what in MEASURED}
    for count, peaks in ((few, small), (many, large)):
        figures |= {f"{what}: peak at {count} samples, bytes": peaks[what] for what in MEASURED}
    for what, value in figures.items():
        print(f"{what}: {value:,.0f}")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
