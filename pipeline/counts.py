"""Counts of the work that a stage did, kept as Beam's metrics so that every worker's are in them."""

from __future__ import annotations

from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.metrics.metric import MetricResults
from apache_beam.metrics.metricbase import Counter

NAMESPACE = "pairsift"

SHARDS_FINISHED_BEFORE = "shards_finished_before"
SHARDS_DONE = "shards_done"
SAMPLES_DONE = "samples_done"
SAMPLES_BACK = "samples_back"  # of those: in a shard that was scored before, and wanted only now
TARS_OPENED = "tars_opened"
MODELS_LOADED = "models_loaded"
NAMES = (SHARDS_FINISHED_BEFORE, SHARDS_DONE, SAMPLES_DONE, SAMPLES_BACK, TARS_OPENED, MODELS_LOADED)

FUNNEL_IN = "funnel_in"
FUNNEL_SURVIVORS = "funnel_survivors"
FUNNEL_SAMPLES = "funnel_samples"
FUNNEL_COPIES = "funnel_copies"


def dead_letters(reason: str) -> str:
    """Samples (or tars) found now that cannot be judged."""
    return f"dead_letters_{reason}"


def funnel_dropped(rule: str) -> str:
    """Samples whose first failing rule this is, as funnel.json has it."""
    return f"funnel_dropped_{rule}"


def funnel_dead_letters(reason: str) -> str:
    """All samples (or tars) that cannot be judged, as funnel.json has it."""
    return f"funnel_dead_letters_{reason}"


Counts = dict[str, int]


def counter(name: str) -> Counter:
    """The counter of this name, to be raised on a worker."""
    return Metrics.counter(NAMESPACE, name)


def counts_of(metrics: MetricResults) -> Counts:
    """Every count by its name, 0 where nothing was counted."""
    found = metrics.query(MetricsFilter().with_namespace(NAMESPACE))["counters"]
    counts = dict.fromkeys(NAMES, 0)
    for result in found:  # one for each step that counts
        counts[result.key.metric.name] += result.result
    return counts
