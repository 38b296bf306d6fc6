"""The listing of a pool: its shards as a run found them.

Graphs read the listing at run time, so a graph's size does not depend on the number of shards, and all stages see the
same pool even if tars are added meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline.output_folder.layout import Layout
from transforms.core.records import Shard
from transforms.storage import files


def write_listing(layout: Layout, shards: Sequence[Shard]) -> None:
    """Write the listing of `shards`."""
    # ASCII: the name of a tar may hold bytes that are not UTF-8, which Python represents as lone surrogates.
    files.write_bytes(layout.shards, json.dumps([list(shard) for shard in shards], indent=2).encode("ascii"))


def read_listing(layout: Layout) -> tuple[Shard, ...]:
    """The shards of the listing. Raises OSError or ValueError if there is no readable listing."""
    return tuple(Shard(*shard) for shard in json.loads(files.read_bytes(layout.shards)))
