"""The speed of stage 1, compared with bare decoding of the same images.

    python -m benchmarks.single_modality [--quick] [--json] [--pairs N] [--rounds R]

Two tables:

- the steps one by one, in microseconds of CPU time a sample, on one thread: decoding, image features, and each rule
  of paper.yaml that looks at one sample;
- the whole stage from tars on disk to written tables, in samples per second: in one worker process, in two, and bare
  decoding by as many threads as there are cores. Each figure is the slope between a small and a large pool, which
  removes start-up. Measurements alternate in rounds, and a ratio is the median over the rounds, because machines are
  shared.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from benchmarks import pictures
from pipeline.decoding.images import decode
from pipeline.graphs import DRAFT_SIDE_PX
from pipeline.output_folder.layout import Layout
from pipeline.report.progress import Progress
from pipeline.runs.run import run
from transforms.core import catalogue
from transforms.core.catalogue import Annotator
from transforms.core.recipe import SINGLE_MODALITY, Recipe, load_recipe
from transforms.core.records import Sample
from transforms.single_modality.images import ImageAnnotator

RECIPES = Path(__file__).parent.parent / "recipes"
CORES = len(os.sched_getaffinity(0))
TWO_PROCESSES = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]


def annotators(recipe: Recipe) -> Iterator[tuple[str, Annotator]]:
    """What the per-sample steps of stage 1 compute with, by step."""
    yield "image features", ImageAnnotator()
    for score in catalogue.per_sample_scores():
        settings = recipe.settings_of(score)
        if settings is not None and score.annotator:
            yield score.name, score.annotator(settings)


def microseconds_by_step(recipe: Recipe, samples: list[Sample]) -> dict[str, float]:
    """The CPU time of each step a sample, on this thread."""
    decoded: list[Sample] = []
    found: dict[str, float] = {}
    with _timed(found, "decode", len(samples)):
        for sample in samples:
            pixels, (width, height) = decode(sample.image_bytes, pictures.BOUNDS.max_image_pixels, DRAFT_SIDE_PX)
            annotation = sample.annotation.with_columns(width_px=width, height_px=height)
            decoded.append(Sample(annotation, sample.metadata, sample.image_bytes, pixels))
    for name, annotator in annotators(recipe):
        annotator.load()
        annotator.columns(decoded[0])  # warm
        with _timed(found, name, len(samples)):
            for sample in decoded:
                annotator.columns(sample)
    return found


class _timed:
    """Adds the thread's CPU time inside the context, divided by `count`, to `found`."""

    def __init__(self, found: dict[str, float], name: str, count: int) -> None:
        self._found, self._name, self._count = found, name, count

    def __enter__(self) -> None:
        self._started = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self._found[self._name] = 1e6 * (time.thread_time() - self._started) / self._count


def bare_decode_seconds(samples: list[Sample]) -> float:
    """Wall seconds of decoding the images at their full size by a thread for each core."""
    started = time.monotonic()
    with ThreadPoolExecutor(CORES) as threads:
        for _ in threads.map(lambda sample: decode(sample.image_bytes, pictures.BOUNDS.max_image_pixels), samples):
            pass
    return time.monotonic() - started


def stage_seconds(recipe: Recipe, samples: list[Sample], beam_options: list[str]) -> float:
    """Wall seconds of stage 1 from tars on disk to tables."""
    with tempfile.TemporaryDirectory() as folder:
        pool = str(pictures.write_tars(Path(folder) / "pool", samples, 2))
        output = Layout(f"{folder}/out")
        run(recipe, pool, output.output, [SINGLE_MODALITY], beam_options, Progress(Console(file=io.StringIO())))
        return float(json.loads(Path(output.run).read_text())["seconds"][SINGLE_MODALITY])


def slope(seconds: Callable[[list[Sample]], float], samples: list[Sample]) -> float:
    """Samples per second between a small pool and all samples."""
    small = samples[: len(samples) // 4]
    return (len(samples) - len(small)) / (seconds(samples) - seconds(small))


def rates(recipe: Recipe, samples: list[Sample], rounds: int) -> dict[str, list[float]]:
    """Samples per second of each way, in each round."""
    ways: dict[str, Callable[[list[Sample]], float]] = {
        "bare decode": bare_decode_seconds,
        "stage 1, one process": lambda some: stage_seconds(recipe, some, []),
        "stage 1, two processes": lambda some: stage_seconds(recipe, some, TWO_PROCESSES),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, seconds in ways.items():
            found[name].append(slope(seconds, samples))
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs, one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--pairs", type=int, default=2400)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    count, rounds = (400, 1) if options.quick else (options.pairs, options.rounds)
    paper, demo = (load_recipe(str(RECIPES / f"{name}.yaml")) for name in ("paper", "demo"))
    # Stage 1 of the paper; the demo's models exist on every machine, and are not run.
    recipe, samples = demo.model_copy(update={"single_modality": paper.single_modality}), pictures.pairs(count)

    steps = microseconds_by_step(recipe, samples[:400])
    for name, microseconds in steps.items():
        print(f"{name:24} {microseconds:8.0f} us of CPU a sample")
    print(f"{'all':24} {sum(steps.values()):8.0f} us of CPU a sample")
    found = rates(recipe, samples, rounds)
    bare = found["bare decode"]
    ratios = {
        name: statistics.median(rate / decoding for rate, decoding in zip(by_round, bare, strict=True))
        for name, by_round in found.items()
    }
    for name, by_round in found.items():
        print(f"{name:24} {statistics.median(by_round):8.0f} samples/s, {ratios[name]:.2f} of bare decode")
    if options.json:
        medians = {name: statistics.median(by_round) for name, by_round in found.items()}
        print(json.dumps({"ratio_to_bare_decode": ratios, "samples_per_s": medians, "cpu_us_per_sample": steps}))


if __name__ == "__main__":
    main()
