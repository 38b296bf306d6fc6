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
