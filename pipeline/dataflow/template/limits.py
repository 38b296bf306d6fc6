"""What Dataflow and Cloud Storage refuse, or are slow with, and what can be known of it before a job is launched.

Sources: Dataflow's pages "Quotas and limits" (workers a job, job names) and "Request quotas" (sizes of a job), Cloud
Storage's page "Quotas and limits" (names of objects).
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.graphs import Job
from pipeline.output_folder.layout import POOL_WIDE
from transforms.core.recipe import STAGES

MAX_REQUEST_BYTES = 20 * 10**6
"""Of a job's request, as JSON."""
MAX_GRAPH_BYTES = 10 * 10**6
"""Of a job's graph."""
MAX_OBJECT_NAME_BYTES = 1024
"""Of the name of an object in a bucket, in UTF-8."""
MAX_SIDE_INPUT_BYTES = 100 * 10**6
"""Our own bound. A side input is held once for each thread of each process of a worker (measured)."""

_ALLOCATION_COLUMNS = 8  # of 8 bytes, beside one for each task: `ClusterImportance`
_ASIDE_CHARACTERS = len("..tmp-") + 32  # `files.write_aside` names a file so while it is written


def exceeded_before(job: Job, tasks: int) -> Iterator[str]:
    """What is known before the graph is built: each limit that is exceeded, and what to do. `tasks`: downstream tasks
    of the recipe."""
    layout = job.layout
    for shard in sorted(job.shards, key=lambda shard: -len(shard.name))[:1]:
        paths = (
            layout.single_modality(shard.name), layout.pool_wide(shard.name), layout.cross_modality(shard.name),
            layout.decisions(shard.name), *(layout.dead_letters(step, shard.name) for step in (*STAGES, POOL_WIDE)),
        )  # fmt: skip
        longest = max(map(_object_name, paths), key=len)
        size_bytes = len(longest.encode()) + _ASIDE_CHARACTERS
        if size_bytes > MAX_OBJECT_NAME_BYTES:
            yield (
                f"the name of {longest} has {size_bytes} bytes while it is written, Cloud Storage takes "
                f"{MAX_OBJECT_NAME_BYTES}; give an --output with a shorter path"
            )
    clusters = job.recipe.distribution_alignment.clusters.count
    side_input_bytes = clusters * (tasks + _ALLOCATION_COLUMNS) * 8
    if side_input_bytes > MAX_SIDE_INPUT_BYTES:
        yield (
            f"distribution_alignment.clusters.count: {clusters:,} clusters and {tasks} tasks make a side input of "
            f"{side_input_bytes / 1e6:,.0f} MB, at most {MAX_SIDE_INPUT_BYTES / 1e6:,.0f} MB are held by each thread; "
            "take fewer clusters"
        )


def exceeded_by(request_bytes: int, graph_bytes: int) -> Iterator[str]:
    """What is known once the job is described: each limit that is exceeded, and what to do."""
    for what, size_bytes, limit_bytes in (
        ("request", request_bytes, MAX_REQUEST_BYTES),
        ("graph", graph_bytes, MAX_GRAPH_BYTES),
    ):
        if size_bytes > limit_bytes:
            yield (
                f"the job's {what} has {size_bytes / 1e6:,.1f} MB, Dataflow takes {limit_bytes / 1e6:,.0f} MB; what "
                "grows it are settings of the recipe that list much (prompts, tags, tasks): shorten them, or launch "
                "the stages one by one where this is all of them in one job"
            )


def _object_name(path: str) -> str:
    """The path without its bucket."""
    return path.removeprefix("gs://").partition("/")[2] if path.startswith("gs://") else path
