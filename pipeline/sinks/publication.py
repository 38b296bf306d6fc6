"""The last step of a run: publishes the results and deletes stale files.

It is a step of the graph of stage 3, because no process waits for a job on a cluster. A runner may retry a step, so
publishing is idempotent, and does nothing if another run has taken over the output folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pipeline.output_folder import owner, versions
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import read_listing
from pipeline.output_folder.lock import HeldForJob, is_held, release_for_job
from pipeline.output_folder.owner import NotHeld
from pipeline.sinks.decisions import DEAD_LETTER_STEPS, SMALLER_BATCHES
from transforms.storage import files

__all__ = ["NotHeld", "Publication", "holds", "publish", "vanished"]


@dataclasses.dataclass(frozen=True)
class Publication:
    """The settings of `publish`.

    `manifest` is the content of the manifest that is known when the graph is built. `keep_versions` is the number of
    versions to keep, including this one. `holder` identifies the lock held for a job, which `publish` releases at the
    end; it is None for a run in a local process, which releases its own lock.
    """

    manifest: Mapping[str, Any]
    keep_versions: int = versions.KEPT
    holder: HeldForJob | None = None


def holds(layout: Layout, publication: Publication | None) -> bool:
    """Return whether this run still holds the output folder; False if a retry finds that it has been published.

    Raises NotHeld if another run has taken over the folder before this run was published.
    """
    holder = publication.holder if publication else None
    if owner.owns(layout) and (not holder or is_held(layout.output, holder)):
        return True
    if not files.exists(layout.manifest):
        raise owner.not_held(layout, holder.job.name if holder else f"run {layout.token}")
    return False


def publish(layout: Layout, publication: Publication) -> None:
    """Publish the version `layout`, whose other files are complete.

    Writes the manifest and makes this version the current one. Then deletes older versions, and the tables of shards
    that are no longer in the pool. Raises NotHeld.
    """
    if not holds(layout, publication):
        return
    funnel = json.loads(files.read_bytes(layout.funnel))
    # The manifest names smaller batches, because scores of another batch shape differ in their last bits.
    smaller = {SMALLER_BATCHES: funnel[SMALLER_BATCHES]} if funnel.get(SMALLER_BATCHES) else {}
    files.write_json(layout.manifest, {**publication.manifest, **smaller})
    versions.switch(layout)
    versions.prune(layout, publication.keep_versions)
    for name in vanished(layout):
        for path in (
            *(layout.dead_letters(step, name) for step in DEAD_LETTER_STEPS),
            layout.cross_modality(name),
            layout.pool_wide(name),
            layout.single_modality(name),  # last, because `vanished` finds the shard by this table
        ):
            files.delete_if_there(path)
    if publication.holder:
        release_for_job(layout.output, publication.holder)


def vanished(layout: Layout) -> set[str]:
    """Return the names of shards that have tables but are no longer in the pool."""
    tables = files.names_in(layout.single_modality("x").rpartition("/")[0])
    return {name.removesuffix(".parquet") for name in tables} - {shard.name for shard in read_listing(layout)}
