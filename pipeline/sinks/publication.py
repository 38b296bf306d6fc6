"""The end of a run: readers are let see its results, and what is of no use any more goes.

The last step of stage 3's graph, because nothing waits for a job on a cluster. A runner may try a step again, so doing
all of it once more changes nothing; and where the folder is another's by then, nothing is done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pipeline.output_folder import versions
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import read_listing
from pipeline.output_folder.lock import HeldForJob, is_held, release_for_job
from pipeline.sinks.decisions import DEAD_LETTER_STEPS, SMALLER_BATCHES
from transforms.storage import files


@dataclasses.dataclass(frozen=True)
class Publication:
    """What is published with the results: the content of their manifest, as far as it is known when the graph is built.
    `keep_versions` is how many versions stay readable, this one included; `holder` says how the output folder is held
    for the job, which lets go of it last. A process holds it itself, throughout."""

    manifest: Mapping[str, Any]
    keep_versions: int = versions.KEPT
    holder: HeldForJob | None = None


class NotHeld(RuntimeError):
    """A job whose output folder was taken over before it was through."""


def holds(layout: Layout, publication: Publication | None) -> bool:
    """Whether the folder is still this run's: False where its last step is done again, and was through before.

    Raises NotHeld where another run has taken the folder over before that.
    """
    holder = publication.holder if publication else None
    if not holder or is_held(layout.output, holder):
        return True
    if not files.exists(layout.manifest):
        raise NotHeld(
            f"{layout.output}: was held for {holder.job.name}, and another run has taken it over; let that run end, "
            "then run again: what is finished is not computed again"
        )
    return False


def publish(layout: Layout, publication: Publication) -> None:
    """Make the version of `layout`, of which all else is written, whole, and let readers see it; delete older versions,
    and what is known of shards that the pool no longer has. Raises NotHeld."""
    if not holds(layout, publication):
        return
    funnel = json.loads(files.read_bytes(layout.funnel))
    # Scores of another batch shape differ in their last bits.
    smaller = {SMALLER_BATCHES: funnel[SMALLER_BATCHES]} if funnel.get(SMALLER_BATCHES) else {}
    files.write_json(layout.manifest, {**publication.manifest, **smaller})
    versions.switch(layout)
    versions.prune(layout, publication.keep_versions)
    for name in vanished(layout):
        for path in (
            *(layout.dead_letters(step, name) for step in DEAD_LETTER_STEPS),
            layout.cross_modality(name),
            layout.pool_wide(name),
            layout.single_modality(name),  # last: by it the others are found
        ):
            files.delete_if_there(path)
    files.delete_folder(layout.in_progress_folder)
    if publication.holder:
        release_for_job(layout.output, publication.holder)


def vanished(layout: Layout) -> set[str]:
    """The names of shards that tables are of and that the pool no longer has."""
    there = files.names_in(layout.single_modality("x").rpartition("/")[0])
    return {name.removesuffix(".parquet") for name in there} - {shard.name for shard in read_listing(layout)}
