"""The metrics of the workers: Beam's metrics in the namespace `pairsift`. Every name is in `all_metrics()`.

Names carry units. Metrics are updated once per batch or shard, never once per sample. RunInference's own metrics are
off (`SampleBatchHandler`): it would count a joined batch, with samples that the model does not score, as the model's,
and the loading of a model, which happens when the first sample arrives, as inference.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.metrics.metric import MetricResults
from apache_beam.metrics.metricbase import Counter, Distribution

from transforms.core import catalogue

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

def batch_ms(step: str) -> str:
    """Time of a feature for one batch, or of a model for one call at its fixed shape, without making its inputs."""
    return f"{step}_batch_ms"


def batch_samples(model: str) -> str:
    """Samples in one call of a model. The rest of its fixed shape is padding."""
    return f"{model}_batch_samples"


def samples(model: str) -> str:
    """Samples that a model scored."""
    return f"{model}_samples"


def load_ms(step: str) -> str:
    """Time to load a model, once in each worker process that uses it."""
    return f"{step}_load_ms"


def dead_letters(reason: str) -> str:
    """Samples (or tars) that became dead letters in this run."""
    return f"{_DEAD_LETTERS}{reason}"


def funnel_dropped(rule: str) -> str:
    """Samples whose first failing rule this is, as in funnel.json."""
    return f"funnel_dropped_{rule}"


def funnel_dead_letters(reason: str) -> str:
    """All samples (or tars) that are dead letters, as in funnel.json."""
    return f"{_FUNNEL_DEAD_LETTERS}{reason}"


_DEAD_LETTERS, _FUNNEL_DEAD_LETTERS = "dead_letters_", "funnel_dead_letters_"
PREFIXES = (_DEAD_LETTERS, _FUNNEL_DEAD_LETTERS)
"""Prefixes of counters that end in the reason of a dead letter."""


class Metric(NamedTuple):
    """A metric: its name, its kind, and its meaning."""

    name: str
    kind: Literal["counter", "distribution"]
    meaning: str


@functools.cache
def all_metrics() -> dict[str, Metric]:
    """Every metric by its name, those of installed rules of other packages included."""
    features = ("image_features", *(score.name for score in _annotated()))
    models = tuple(score.name for score in catalogue.model_scores())
    loading = (*(score.name for score in _annotated() if score.loads_model), *models)
    rules = [rule.name for stage in catalogue.STAGES for rule in catalogue.rules_of_stage(stage)]
    found = (
        Metric(SHARDS_FINISHED_BEFORE, "counter", "shards with a complete and valid table"),
        Metric(SHARDS_DONE, "counter", "shards whose table was written"),
        Metric(SAMPLES_DONE, "counter", "samples in those tables that were computed in this run"),
        Metric(SAMPLES_BACK, "counter", "of those: samples of shards scored before, needed for the first time"),
        Metric(TARS_OPENED, "counter", "number of times that a tar was opened"),
        Metric(MODELS_LOADED, "counter", "number of times that a model was loaded"),
        Metric(TAR_BYTES_READ, "counter", "bytes read from tars"),
        Metric(PICTURES_DECODED, "counter", "images decoded, or failed to decode"),
        Metric(DECODE_BATCH_MS, "distribution", "decoding of a batch, summed over threads"),
        *(Metric(batch_ms(step), "distribution", f"{step} of a batch") for step in features),
        *(Metric(batch_ms(model), "distribution", f"one call of the model of {model}") for model in models),
        *(Metric(batch_samples(model), "distribution", f"samples in one call of {model}'s model") for model in models),
        *(Metric(samples(model), "counter", f"samples scored by {model}") for model in models),
        *(Metric(load_ms(step), "distribution", f"loading the model of {step}") for step in loading),
        Metric(FUNNEL_IN, "counter", "funnel.json: all samples"),
        *(Metric(funnel_dropped(rule), "counter", f"funnel.json: dropped by {rule}") for rule in rules),
        Metric(FUNNEL_SURVIVORS, "counter", "funnel.json: dropped by no rule"),
        Metric(FUNNEL_SAMPLES, "counter", "funnel.json: survivors in the training subset"),
        Metric(FUNNEL_COPIES, "counter", "funnel.json: rows of the training subset"),
    )
    return {metric.name: metric for metric in found}


def _annotated() -> list[catalogue.Score[Any]]:
    return [score for score in catalogue.scores() if score.annotator]


Counts = dict[str, int]


def counter(name: str) -> Counter:
    """The counter of this name, to increment on a worker."""
    assert name.startswith(PREFIXES) or all_metrics()[name].kind == "counter", name
    return Metrics.counter(NAMESPACE, name)


def distribution(name: str) -> Distribution:
    """The distribution of this name, of integers, to update on a worker."""
    assert all_metrics()[name].kind == "distribution", name
    return Metrics.distribution(NAMESPACE, name)


@contextlib.contextmanager
def timed_ms(name: str) -> Iterator[None]:
    """Adds the milliseconds that the body takes to a distribution, unless it raises."""
    started = time.perf_counter()
    yield
    distribution(name).update(round(1000 * (time.perf_counter() - started)))


def count_dead_letters(reasons: Iterable[str]) -> None:
    """Increment the counter of each reason by the number of its occurrences."""
    for reason, count in collections.Counter(reasons).items():
        counter(dead_letters(reason)).inc(count)


def counts_of(metrics: MetricResults) -> Counts:
    """The counts of run.json by name; 0 if nothing was counted."""
    found = metrics.query(MetricsFilter().with_namespace(NAMESPACE))["counters"]
    counts = dict.fromkeys(NAMES, 0)
    for result in found:  # one for each step with that counter
        if result.key.metric.name in counts:
            counts[result.key.metric.name] += result.result or 0  # the portable runner reports None for 0
    return counts
