"""Where in the pool's tars the chosen samples lie, so that each can be read again without reading what is before it."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.sources.tars import BrokenTar
from pipeline.sources.webdataset import IMAGE_EXTENSIONS, Members, read_members
from transforms.core.recipe import PoolSettings
from transforms.core.records import Shard

_FILE = pa.struct(
    [("extension", pa.string()), ("offset", pa.int64()), ("size_bytes", pa.int64()), ("sha256", pa.string())]
)
PLACES = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("copies", pa.int32()),
        ("files", pa.list_(_FILE)),
        ("fault", pa.string()),
    ]
)
"""A row of each sample with copies >= 1, in the order of the decisions. `files`: image, txt and json, at which byte
of the tar each begins, and its sha256 in hex; `fault`: why there are none (null: there are)."""


def find_places(shard: Shard, layout: Layout, bounds: PoolSettings) -> list[dict[str, Any]]:
    """Rows of PLACES, from one pass over the shard's tar; each sample is compared with what was judged.

    The pool may have changed since: a sample that is not there, or has another image or caption, has a fault. A shard
    without a path is one that the pool no longer has.
    """
    columns = ["uid", "key", "caption", "image_sha256", "copies"]
    rows = [row for row in tables.read_table(layout.decisions(shard.name), columns) if row["copies"] > 0]
    wanted = {row["key"]: row for row in rows}
    not_found = "not in the tar any more" if shard.path else "the pool no longer has that shard"
    try:
        for members in read_members(shard.path, bounds) if shard.path and wanted else ():
            row = wanted.pop(members.key, None)
            if row is not None:
                row["fault"] = _fault(members, row)
                row["files"] = None if row["fault"] else _files(members)
            if not wanted:
                break
    except BrokenTar as error:
        not_found = f"the tar is broken {error}"
    for row in wanted.values():
        row["fault"] = not_found
    return rows


def _files(members: Members) -> list[dict[str, Any]]:
    contents = dict.fromkeys(IMAGE_EXTENSIONS, members.image) | {"txt": members.caption, "json": members.metadata}
    return [
        {
            "extension": extension,
            "offset": members.offsets[extension],
            "size_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        for extension, content in contents.items()
        if content is not None and extension in members.offsets
    ]


def _fault(members: Members, row: dict[str, Any]) -> str | None:
    """What is no longer as it was judged; None where all is."""
    if members.fault:
        return f"{members.fault[0]}: {members.fault[1]}"
    if members.image is None or members.caption is None:
        return "has no image or no caption any more"
    if hashlib.sha256(members.image).hexdigest() != row["image_sha256"]:
        return "has another image than the one that was judged"
    if members.caption != row["caption"].encode():
        return "has another caption than the one that was judged"
    return None
