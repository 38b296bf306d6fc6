"""What workers count and measure, by name: Beam's metrics in the namespace `pairsift`. Every name is in `METRICS`.

Names say the unit. They are raised once a batch or a shard, never once a sample. RunInference's own metrics are off
(`SampleBatchHandler`): it takes a joined batch, with samples that the model is not asked about, for one of the model's,
and the loading of a model, which happens when the first sample comes, for its work.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.metrics.metric import MetricResults
from apache_beam.metrics.metricbase import Counter, Distribution

from transforms.core.recipe import RULES

NAMESPACE = "pairsift"

SHARDS_FINISHED_BEFORE = "shards_finished_before"
SHARDS_DONE = "shards_done"
SAMPLES_DONE = "samples_done"
SAMPLES_BACK = "samples_back"
TARS_OPENED = "tars_opened"
MODELS_LOADED = "models_loaded"
NAMES = (SHARDS_FINISHED_BEFORE, SHARDS_DONE, SAMPLES_DONE, SAMPLES_BACK, TARS_OPENED, MODELS_LOADED)
"""The counts of run.json."""

TAR_BYTES_READ = "tar_bytes_read"
PICTURES_DECODED = "pictures_decoded"
DECODE_BATCH_MS = "decode_batch_ms"
FUNNEL_IN = "funnel_in"
FUNNEL_SURVIVORS = "funnel_survivors"
FUNNEL_SAMPLES = "funnel_samples"
FUNNEL_COPIES = "funnel_copies"

FEATURES = ("image_features", "caption_length", "language", "pos_pattern", "face_area")
"""The steps of stage 1 that look at samples, batch by batch."""
MODELS = ("flipped_clip", "image_text_matching", "digit")


def batch_ms(step: str) -> str:
    """A feature's time for a batch, or a model's for one call at its fixed shape, without making its inputs."""
    return f"{step}_batch_ms"


def batch_samples(model: str) -> str:
    """Samples in one call of a model; the rest of its fixed shape is padding."""
    return f"{model}_batch_samples"


def samples(model: str) -> str:
    """Samples that a model was asked about."""
    return f"{model}_samples"


def load_ms(step: str) -> str:
    """Time to load a model, once in each worker process that needs it."""
    return f"{step}_load_ms"


def dead_letters(reason: str) -> str:
    """Samples (or tars) found now that cannot be judged."""
    return f"{_DEAD_LETTERS}{reason}"


def funnel_dropped(rule: str) -> str:
    """Samples whose first failing rule this is, as funnel.json has it."""
    return f"funnel_dropped_{rule}"


def funnel_dead_letters(reason: str) -> str:
    """All samples (or tars) that cannot be judged, as funnel.json has it."""
    return f"{_FUNNEL_DEAD_LETTERS}{reason}"


_DEAD_LETTERS, _FUNNEL_DEAD_LETTERS = "dead_letters_", "funnel_dead_letters_"
PREFIXES = (_DEAD_LETTERS, _FUNNEL_DEAD_LETTERS)
"""What counters begin with that end in the reason of a dead letter."""


class Metric(NamedTuple):
    """A metric's name, its kind, and what it says."""

    name: str
    kind: Literal["counter", "distribution"]
    meaning: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric(SHARDS_FINISHED_BEFORE, "counter", "shards whose table was there and holds"),
        Metric(SHARDS_DONE, "counter", "shards whose table was written"),
        Metric(SAMPLES_DONE, "counter", "samples in those tables that were looked at now"),
        Metric(SAMPLES_BACK, "counter", "of those: in a shard that was scored before, and wanted only now"),
        Metric(TARS_OPENED, "counter", "times that a tar was opened"),
        Metric(MODELS_LOADED, "counter", "times that a model was loaded"),
        Metric(TAR_BYTES_READ, "counter", "bytes read of tars"),
        Metric(PICTURES_DECODED, "counter", "pictures that were decoded, or that failed in it"),
        Metric(DECODE_BATCH_MS, "distribution", "a batch's decoding, summed over threads"),
        *(Metric(batch_ms(step), "distribution", f"{step} of a batch") for step in FEATURES),
        *(Metric(batch_ms(model), "distribution", f"one call of the model of {model}") for model in MODELS),
        *(Metric(batch_samples(model), "distribution", f"samples in one call of {model}'s") for model in MODELS),
        *(Metric(samples(model), "counter", f"samples that {model} was asked about") for model in MODELS),
        *(
            Metric(load_ms(step), "distribution", f"loading the model of {step}")
            for step in ("language", "pos_pattern", "face_area", *MODELS)
        ),
        Metric(FUNNEL_IN, "counter", "funnel.json: all samples"),
        *(
            Metric(funnel_dropped(rule), "counter", f"funnel.json: dropped by {rule}")
            for rules in RULES.values()
            for rule in rules
        ),
        Metric(FUNNEL_SURVIVORS, "counter", "funnel.json: dropped by no rule"),
        Metric(FUNNEL_SAMPLES, "counter", "funnel.json: survivors in the training subset"),
        Metric(FUNNEL_COPIES, "counter", "funnel.json: rows of the training subset"),
    )
}

Counts = dict[str, int]


def counter(name: str) -> Counter:
    """The counter of this name, to be raised on a worker."""
    assert name.startswith(PREFIXES) or METRICS[name].kind == "counter", name
    return Metrics.counter(NAMESPACE, name)


def distribution(name: str) -> Distribution:
    """The distribution of this name, of whole numbers, to be updated on a worker."""
    assert METRICS[name].kind == "distribution", name
    return Metrics.distribution(NAMESPACE, name)


@contextlib.contextmanager
def timed_ms(name: str) -> Iterator[None]:
    """Adds the milliseconds that the body takes to a distribution, where it raises nothing."""
    started = time.perf_counter()
    yield
    distribution(name).update(round(1000 * (time.perf_counter() - started)))


def count_dead_letters(reasons: Iterable[str]) -> None:
    """Raise the counter of each reason, once for each time it is there."""
    for reason, count in Tally(reasons).items():
        counter(dead_letters(reason)).inc(count)


def counts_of(metrics: MetricResults) -> Counts:
    """The counts of run.json by name, 0 where nothing was counted."""
    found = metrics.query(MetricsFilter().with_namespace(NAMESPACE))["counters"]
    counts = dict.fromkeys(NAMES, 0)
    for result in found:  # one for each step that counts
        if result.key.metric.name in counts:
            counts[result.key.metric.name] += result.result or 0  # the portable runner has None for a 0
    return counts
