"""Running one stage: build its graph, wait for the runner, record seconds and counts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

from pipeline import graphs
from pipeline.output_folder import owner, versions
from pipeline.report.progress import Progress
from pipeline.runners import supported
from pipeline.runners.workers import run_to_end
from pipeline.sinks.publication import Publication
from transforms.core.metrics import Counts, counts_of
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT
from transforms.storage import files


@dataclasses.dataclass(frozen=True)
class WorkDone:
    """Seconds and counts of each stage of a run."""

    seconds: dict[str, float]
    counts: dict[str, Counts]

    @property
    def content(self) -> dict[str, Any]:
        """The fields of run.json."""
        return {"seconds": self.seconds, "counts": self.counts}


def token_of(beam_options: list[str]) -> str:
    """The token of a run on that runner; empty if its job ends with this process."""
    return owner.new_token() if supported.may_outlive_client(beam_options) else ""


def run_stage(stage: str, job: graphs.Job, beam_options: list[str], progress: Progress, work: WorkDone) -> None:
    """Run one stage, show its progress, and add its seconds and counts to `work`."""
    started = time.monotonic()
    try:
        with progress.stage(stage, job.layout, job.shards), _torch_threads_kept(stage):
            work.counts[stage] = _run_stage(stage, job, beam_options)
    finally:
        files.delete_folder(job.layout.progress_folder)
    progress.counted(stage, work.counts[stage])
    work.seconds[stage] = round(time.monotonic() - started, 3)


@contextlib.contextmanager
def _torch_threads_kept(stage: str) -> Iterator[None]:
    """Restore the number of Torch's threads, which models in this process set for the whole of it."""
    if stage != CROSS_MODALITY:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decide(
    job: graphs.Job, publication: Publication, beam_options: list[str], progress: Progress, work: WorkDone
) -> dict[str, Any]:
    """Run stage 3 into a new version of the results, publish it, and return its funnel."""
    version = versions.begin(job.layout.output, job.layout.token)
    publishing = dataclasses.replace(job, layout=version, publication=publication)
    run_stage(DISTRIBUTION_ALIGNMENT, publishing, beam_options, progress, work)
    return json.loads(files.read_bytes(publishing.layout.funnel))


def _run_stage(stage: str, job: graphs.Job, beam_options: list[str]) -> Counts:
    return run_graph(graphs.GRAPHS[stage], job, beam_options)


def run_graph(graph: graphs.Graph, job: graphs.Job, beam_options: list[str]) -> Counts:
    """Run one graph to its end and return its counts; they are empty if the runner reports no metrics."""
    pipeline = supported.pipeline_of(beam_options)
    graphs.build(graph, pipeline, job)
    result = run_to_end(pipeline, graph.__name__)
    return counts_of(result.metrics()) if supported.has_metrics(beam_options) else {}
