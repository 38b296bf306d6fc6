"""Limits of Dataflow and Cloud Storage that can be checked before a job is launched.

Sources: Dataflow's pages "Quotas and limits" (workers per job, job names) and "Request quotas" (sizes of a job), and
Cloud Storage's page "Quotas and limits" (object names).
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.graphs import Job
from pipeline.output_folder.layout import POOL_WIDE
from transforms.core.recipe import STAGES

MAX_REQUEST_BYTES = 20 * 10**6
"""The size limit of a job request as JSON."""
MAX_GRAPH_BYTES = 10 * 10**6
"""The size limit of a job's graph."""
MAX_OBJECT_NAME_BYTES = 1024
"""The size limit of an object's name in UTF-8."""
MAX_SIDE_INPUT_BYTES = 100 * 10**6
"""pairsift's own limit. Each thread of each process of a worker holds a copy of a side input (measured)."""

_ALLOCATION_COLUMNS = 8  # of 8 bytes each, plus one per task, in `ClusterImportance`
_ASIDE_CHARACTERS = len("..tmp-") + 32  # what `files.write_aside` adds to a name while writing


def exceeded_before(job: Job, tasks: int) -> Iterator[str]:
    """Yield a message for each exceeded limit that can be checked before the graph is built.

    `tasks` is the number of downstream tasks of the recipe.
    """
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
                f"{longest}: has a name of {size_bytes} bytes while it is being written, but Cloud Storage allows "
                f"{MAX_OBJECT_NAME_BYTES}; give an --output with a shorter path"
            )
    clusters = job.recipe.distribution_alignment.clusters.count
    side_input_bytes = clusters * (tasks + _ALLOCATION_COLUMNS) * 8
    if side_input_bytes > MAX_SIDE_INPUT_BYTES:
        yield (
            f"distribution_alignment.clusters.count: {clusters:,} clusters and {tasks} tasks give a side input of "
            f"{side_input_bytes / 1e6:,.0f} MB, which each thread holds; at most {MAX_SIDE_INPUT_BYTES / 1e6:,.0f} MB "
            "are allowed; reduce the number of clusters"
        )


def exceeded_by(request_bytes: int, graph_bytes: int) -> Iterator[str]:
    """Yield a message for each limit that the built job exceeds."""
    for what, size_bytes, limit_bytes in (
        ("request", request_bytes, MAX_REQUEST_BYTES),
        ("graph", graph_bytes, MAX_GRAPH_BYTES),
    ):
        if size_bytes > limit_bytes:
            yield (
                f"the job's {what} has {size_bytes / 1e6:,.1f} MB, but Dataflow allows {limit_bytes / 1e6:,.0f} MB; "
                "shorten long lists in the recipe (prompts, tags, tasks), or, if this is a job of all stages, launch "
                "the stages one by one"
            )


def _object_name(path: str) -> str:
    """Return the path without its bucket."""
    return path.removeprefix("gs://").partition("/")[2] if path.startswith("gs://") else path
