"""The speed of a model in the pipeline, compared with its bare forward pass and with other tools.

    python -m benchmarks.models [--quick] [--json] [--device cpu|cuda] [--only clip|itm|digit] [--pairs N] [--rounds R]
                                [--no-peers]

Measured for each model and precision, in pairs per second:

- the bare forward pass on prepared tensors (for our precision, the mean of one run before and one after the others);
- RunInference on prepared batches (for our precision only);
- all of stage 2, from tars on disk to written tables.

Then clip-retrieval and data-juicer on the same images with the same weights (run `make bench-peers` first). Each figure
is the slope between a small and a large pool, which removes loading and warming up. Measurements alternate in rounds,
and each ratio is the median over the rounds, because machines are shared.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import torch
from apache_beam.ml.inference.base import RunInference
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers, pictures, random_models
from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.report.progress import Progress
from pipeline.runs.run import run
from transforms.core import recipe as recipes
from transforms.core.recipe import CROSS_MODALITY, SINGLE_MODALITY
from transforms.core.records import Sample, SampleBatch, Shard
from transforms.models import prepare
from transforms.models.blip import BlipHandler
from transforms.models.blip2 import Blip2Handler
from transforms.models.clip import ClipHandler
from transforms.models.pictures import normalised
from transforms.models.precision import resolve

Rates = dict[str, list[float]]
PeerSeconds = Callable[[list[Sample], Path], float]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model to measure: its handler, its forward pass, and the stage-2 settings that run only this model.

    `small` and `large` are the numbers of pairs in the two pools; `large_fp32` replaces `large` for fp32, the precision
    of the peers.
    """

    name: str
    sections: dict[str, Any]
    handler: Callable[[recipes.CrossModalitySettings], Any]
    forward: Callable[[Any, list[Any]], Callable[[], Any]]
    batch_size: int
    small: int
    large: int
    large_fp32: int

    def settings(self, device: str, precision: str) -> recipes.CrossModalitySettings:
        """Stage-2 settings with this model (after a tiny CLIP, for BLIP and BLIP-2)."""
        return recipes.CrossModalitySettings(**{"device": device, "precision": precision, **self.sections})


def clip_forward(model: Any, inputs: list[Any]) -> Callable[[], Any]:
    """The forward pass of both CLIP towers on prepared tensors."""
    tokens = np.stack([row.tokens for row in inputs])
    images = normalised([row.views[0] for row in inputs], model.table)
    return lambda: (model.text(tokens), model.model.encode_image(images))


def itm_forward(model: Any, inputs: list[Any]) -> Callable[[], Any]:
    """The forward pass of BLIP on prepared tensors."""
    device = model.table.device
    tokens, mask = (torch.from_numpy(np.stack(column)).to(device) for column in list(zip(*inputs, strict=True))[1:])
    images = normalised([row.pixels for row in inputs], model.table)

    def forward() -> Any:
        with device:
            return model.model(input_ids=tokens, pixel_values=images, attention_mask=mask).itm_score

    return forward


def digit_forward(model: Any, inputs: list[Any]) -> Callable[[], Any]:
    """The forward pass of BLIP-2 on prepared tensors."""
    images = normalised(inputs, model.table)
    prompt = model.prompts[0].repeat(len(inputs), 1)

    def forward() -> Any:
        return model._first_answer_logits(prompt, model.model.get_image_features(images, return_dict=True))

    return forward


def bare_rate(subject: Subject, handler: Any, model: Any, samples: list[Sample]) -> float:
    """Pairs per second of the bare forward pass, with full batches of each input shape, weighted as in `samples`."""
    by_shape: dict[Any, list[Any]] = {}
    for sample in samples:
        prepared = model.prepare(pictures.decoded(sample))
        by_shape.setdefault(handler.shape_of(prepared), []).append(prepared)
    seconds = 0.0
    with torch.inference_mode():
        for rows in by_shape.values():
            forward = subject.forward(model, (rows * subject.batch_size)[: subject.batch_size])
            _timed(forward)  # warm
            calls = len(rows) // subject.batch_size or 1
            seconds += len(rows) / subject.batch_size * sum(_timed(forward) for _ in range(calls)) / calls
    return len(samples) / seconds


def inference_rate(
    subject: Subject, handler: Any, settings: recipes.CrossModalitySettings, samples: list[Sample]
) -> float:
    """Pairs per second of RunInference on prepared batches in memory."""
    prepared = prepare.load_prepare(settings)
    _Ready.samples = [prepared(pictures.decoded(sample)) for sample in samples]

    def seconds(count: int) -> float:
        started = time.monotonic()
        with beam.Pipeline(FnApiRunner()) as pipeline:
            _ = (
                pipeline
                | beam.Create([count])
                | beam.ParDo(_Ready(_joined_size(subject)))
                | RunInference(handler)
                | beam.Map(len)
            )
        return time.monotonic() - started

    return _slope({count: seconds(count) for count in (subject.small, len(samples))})


class _Ready(beam.DoFn):
    """Emits batches of `samples`, which is a class attribute so that nothing is copied into the pipeline."""

    samples: list[Sample] = []  # noqa: RUF012

    def __init__(self, size: int) -> None:
        self._size = size

    def process(self, count: int) -> Iterator[SampleBatch]:
        for index, start in enumerate(range(0, count, self._size)):
            rows = tuple(self.samples[start : min(start + self._size, count)])
            yield SampleBatch(Shard("s", "s.tar", ""), index, start + self._size >= count, rows)


def _joined_size(subject: Subject) -> int:
    return subject.batch_size if subject.name == "clip" else 16 * subject.batch_size


def stage_rate(subject: Subject, settings: recipes.CrossModalitySettings, samples: list[Sample], folder: Path) -> float:
    """Pairs per second of all of stage 2, from tars to tables."""
    recipe = recipes.Recipe(
        name="benchmark",
        single_modality=recipes.SingleModalitySettings(),
        cross_modality=settings,
        distribution_alignment=recipes.DistributionAlignmentSettings(target=recipes.TargetSettings(survivors=True)),
    )
    seconds = {}
    for count in (subject.small, len(samples)):
        pool = str(pictures.write_tars(folder / f"pool{count}", samples[:count], 1))
        output = str(folder / f"out{count}")
        for stage in (SINGLE_MODALITY, CROSS_MODALITY):
            run(recipe, pool, output, [stage], [], Progress(Console(file=io.StringIO())))
        seconds[count] = json.loads((Path(output) / "run.json").read_text())["seconds"][CROSS_MODALITY]
    return _slope(seconds)


def peer_rate(seconds: PeerSeconds, subject: Subject, samples: list[Sample], folder: Path) -> float:
    """Pairs per second of a peer's command, also as a slope without start-up."""
    taken = {}
    for count in (subject.small, len(samples)):
        (folder / str(count)).mkdir(parents=True)
        taken[count] = seconds(samples[:count], folder / str(count))
    return _slope(taken)


def _slope(seconds: dict[int, float]) -> float:
    """Pairs per second as the slope between a small and a large pool, from the seconds by pool size."""
    small, large = sorted(seconds)
    return (large - small) / (seconds[large] - seconds[small])


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large matrix product: an upper bound for a model."""
    side = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    _timed(lambda: left @ right)
    return 2 * side**3 / min(_timed(lambda: left @ right) for _ in range(5))


def forward_flops(subject: Subject, model: Any, sample: Sample) -> float:
    """Floating-point operations of one pair's forward pass."""
    forward = subject.forward(model, [model.prepare(pictures.decoded(sample))])
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see the fast path
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        forward()
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def subjects(folder: Path, arguments: argparse.Namespace) -> list[Subject]:
    """The models to measure. Writes their weights under `folder`."""
    quick, cuda = arguments.quick, arguments.device == "cuda"
    architecture = "ViT-L-14" if cuda else "ViT-B-32"
    batch = 256 if cuda else 64
    more = [batch if quick else pairs for pairs in (arguments.pairs, arguments.pairs_fp32)]
    large, large_fp32 = (batch * (1 + pairs // batch) for pairs in more)
    itm_batch, itm_pairs = (128, (128, 128 + 4096, 128 + 4096)) if cuda else (16, (16, 16 + 96, 16 + 48))
    random_models.save_clip(folder / "clip", architecture)
    captions = " ".join(sample.annotation.caption.lower() for sample in pictures.pairs(300))
    words = sorted(set(re.findall(r"[a-z]+", captions)))
    clip = {"model": str(folder / "clip"), "min": -1.0, "batch_size": batch}
    found = [
        Subject(
            "clip", {"flipped_clip": clip},
            lambda s: ClipHandler(s.flipped_clip, s.device, s.precision),
            clip_forward, batch, batch, large, large_fp32,
        )
    ]  # fmt: skip
    if not quick:
        random_models.save_itm(folder / "itm", words)
        itm = {"model": str(folder / "itm"), "min": 0.0, "batch_size": itm_batch}
        random_models.save_tiny_clip(folder / "tiny")
        tiny = {"model": str(folder / "tiny"), "min": -1.0}
        found.append(
            Subject(
                "itm", {"flipped_clip": tiny, "image_text_matching": itm},
                lambda s: BlipHandler(s.image_text_matching, s.device, None, s.precision),
                itm_forward, itm_batch, *itm_pairs,
            )
        )  # fmt: skip
    if cuda and not quick:
        random_models.save_digit(folder / "digit", random_models.word_tokenizer())
        digit = {"model": str(folder / "digit"), "batch_size": itm_batch}
        found.append(
            Subject(
                "digit", {"flipped_clip": tiny, "digit": digit},
                lambda s: Blip2Handler(s.digit, s.device, None, None, s.precision),
                digit_forward, itm_batch, *itm_pairs,
            )
        )  # fmt: skip
    return [subject for subject in found if arguments.only in (None, subject.name)]


def measure(arguments: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures by name, ratios first."""
    rates: Rates = {}
    figures: dict[str, float] = {}
    # No fp32 on a GPU: it is not used there in practice, and the models of earlier pipelines stay in memory.
    ours = resolve("auto", arguments.device)
    precisions = list(dict.fromkeys([ours, *(["fp32"] if arguments.device == "cpu" else [])]))
    architecture = "ViT-L-14" if arguments.device == "cuda" else "ViT-B-32"
    for subject in subjects(folder, arguments):
        samples = pictures.pairs(subject.large)
        for number in range(1 if arguments.quick else arguments.rounds):
            for precision in precisions:
                settings = subject.settings(arguments.device, precision)
                handler, name = subject.handler(settings), f"{subject.name} {precision}"
                some = samples[: subject.large_fp32] if precision == "fp32" else samples
                model = handler.load_on(torch.device(arguments.device))
                bare = [bare_rate(subject, handler, model, some[subject.small :])]
                if number == 0:
                    work = forward_flops(subject, model, samples[0]) * bare[0]
                    dtype = model.table.dtype
                    figures[f"{name}: bare forward / matrix-product peak"] = work / peak_flops(arguments.device, dtype)
                if precision == precisions[0]:
                    _add(rates, f"{name} RunInference", inference_rate(subject, handler, settings, some), say)
                there = folder / "stage" / name / str(number)
                _add(rates, f"{name} stage 2", stage_rate(subject, settings, some, there), say)
                if precision == precisions[0]:  # measured again, because the speed of the machine changes over time
                    bare.append(bare_rate(subject, handler, model, some[subject.small :]))
                _add(rates, f"{name} bare", statistics.mean(bare), say)
                del model
            for peer, seconds in _peers(subject, folder, architecture, arguments).items():
                there = folder / "peers" / subject.name / peer.replace(" ", "-") / str(number)
                rate = peer_rate(seconds, subject, samples[: subject.large_fp32], there)
                _add(rates, f"{subject.name} {peer}", rate, say)
        figures |= drift(subject, folder / "stage", precisions)
    ratios: dict[str, float] = {}
    for name, per_round in rates.items():
        model_name, *_, what = name.split(" ", 2)
        if what in ("RunInference", "stage 2"):
            ratios[f"{name} / bare"] = _ratio(per_round, rates[name.removesuffix(what) + "bare"])
        elif what != "bare":
            for precision in dict.fromkeys([ours, "fp32"]):
                ratios[f"{model_name} {precision} stage 2 / {what}"] = _ratio(
                    rates[f"{model_name} {precision} stage 2"], per_round
                )
    machine = {"cpus": torch.get_num_threads(), "processor": platform.machine(), "device": arguments.device}
    if arguments.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    medians = {f"{name}, pairs/s": statistics.median(per_round) for name, per_round in rates.items()}
    return {**ratios, **figures, **medians, "rounds": arguments.rounds, **machine}


def drift(subject: Subject, stages: Path, precisions: list[str]) -> dict[str, float]:
    """The differences between the scores of a precision and those of fp32, on the pairs that both scored."""
    if len(precisions) < 2:
        return {}
    column = {"clip": "flipped_clip_cosine", "itm": "match_probability", "digit": "digit_probability"}[subject.name]
    scores = {}
    for precision, count in zip(precisions, (subject.large, subject.large_fp32), strict=True):
        output = stages / f"{subject.name} {precision}" / "0" / f"out{count}"
        rows = tables.read_table(Layout(str(output)).cross_modality("00000"), ["key", column])
        scores[precision] = {row["key"]: row[column] for row in rows}
    low, full = (scores[precision] for precision in precisions)
    differences = np.abs([low[key] - full[key] for key in low.keys() & full.keys()])
    name = f"{subject.name} |{precisions[0]} - {precisions[1]}| of {len(differences)} random-weight scores"
    return {f"{name}, largest": float(differences.max()), f"{name}, mean": float(differences.mean())}


def _peers(subject: Subject, folder: Path, architecture: str, arguments: argparse.Namespace) -> dict[str, PeerSeconds]:
    if arguments.quick or arguments.no_peers or subject.name == "digit":
        return {}
    if subject.name == "itm":
        model = {"hf_blip": str(folder / "itm" / "hf4")}
        return {
            "peer data-juicer": lambda samples, there: peers.data_juicer_seconds(
                samples, "image_text_matching_filter", model, there
            )
        }
    clip = {"hf_clip": str(folder / "clip" / "hf")}
    weights = folder / "clip" / "open_clip.pt"
    return {
        "peer clip-retrieval": lambda samples, there: peers.clip_retrieval_seconds(
            samples, weights, architecture, there
        ),
        "peer data-juicer": lambda samples, there: peers.data_juicer_seconds(
            samples, "image_text_similarity_filter", clip, there
        ),
    }


def _add(rates: Rates, name: str, rate: float, say: Callable[[str], None]) -> None:
    rates.setdefault(name, []).append(rate)
    say(f"{name}: {rate:.2f} pairs/s")


def _ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="CLIP only, no peers, few pairs")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pairs", type=int, default=None, help="pairs between the small and the large pool")
    parser.add_argument("--pairs-fp32", type=int, default=256, help="the same for fp32 and the peers")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=["clip", "itm", "digit"])
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    arguments.pairs = arguments.pairs or (4096 if arguments.device == "cuda" else 768)
    compared = not arguments.no_peers and not arguments.quick
    if compared and not (peers.CLIP_RETRIEVAL.exists() and peers.DATA_JUICER.exists()):
        parser.error("the peers' environments do not exist: run `make bench-peers` first, or pass --no-peers")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, Path(folder), lambda line: print(line, flush=True))
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
