"""A look at the first samples of a pool before a run begins, so that a wrong setting costs seconds and no models.

Only members are looked at: what the decoder and the models refuse is counted over the whole pool after stage 1
(`pipeline.output_folder.accounting`). Both fail for the same share and reasons.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

from pipeline.output_folder.dead_pool import check_alive, dead_by_reason
from pipeline.output_folder.layout import TABLE_OF, Layout
from pipeline.sources.webdataset import read_samples
from transforms.core.recipe import SINGLE_MODALITY, PoolSettings
from transforms.core.records import DeadLetter, Shard

_SHARDS = 4
_SAMPLES = 64  # of each shard


def look_first(shards: Sequence[Shard], pool: PoolSettings, layout: Layout) -> None:
    """Raise DeadPool if nearly all of the first samples are dead letters for one reason (`max_dead_share`).

    The first shards in the order of their names decide, whatever the machine. Does nothing where stage 1 has tables,
    of which the pool is judged after stage 1, so that no tar of a finished run is opened.
    """
    if pool.max_dead_share == 1.0 or layout.shards_with(TABLE_OF[SINGLE_MODALITY]):
        return
    first = [shard for shard in shards if not shard.fault][:_SHARDS]
    judged, dead = 0, []
    for shard in first:
        letters: list[DeadLetter] = []
        # An error of the filesystem is the run's to report: it says what to do, and may be over by then.
        with contextlib.suppress(OSError):
            for sample in itertools.islice(read_samples(shard, pool, SINGLE_MODALITY), _SAMPLES):
                if isinstance(sample, DeadLetter):
                    letters.append(sample)
                else:
                    judged += 1
        dead.append(dead_by_reason(letters))
    check_alive("the pool's first shards", judged, dead, pool.max_dead_share)
