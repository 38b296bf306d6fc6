"""The offsets of the selected samples in the pool's tars, so that each sample can be read with a seek."""

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
OFFSETS = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("copies", pa.int32()),
        ("files", pa.list_(_FILE)),
        ("fault", pa.string()),
    ]
)
"""One row per sample with copies >= 1, in the order of the decisions.

`files` lists the image, txt and json: the byte of the tar at which each begins, its size, and its sha256 in hex.
`fault` says why `files` is null; it is null for a valid sample.
"""


def find_offsets(shard: Shard, layout: Layout, bounds: PoolSettings) -> list[dict[str, Any]]:
    """Return the rows of OFFSETS for a shard, from one pass over its tar.

    The pool may have changed since the run. A sample that is missing, or whose image or caption differs from the one
    the run read, gets a fault. A shard with an empty path is no longer in the pool.
    """
    columns = ["uid", "key", "caption", "image_sha256", "copies"]
    rows = [row for row in tables.read_table(layout.decisions(shard.name), columns) if row["copies"] > 0]
    wanted = {row["key"]: row for row in rows}
    not_found = "no longer in the tar" if shard.path else "the shard is no longer in the pool"
    try:
        for members in read_members(shard.path, bounds) if shard.path and wanted else ():
            row = wanted.pop(members.key, None)
            if row is not None:
                row["fault"] = _fault(members, row)
                row["files"] = None if row["fault"] else _files(members)
            if not wanted:
                break
    except BrokenTar as error:
        not_found = f"the tar is damaged {error}"
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
    """Return how a sample differs from the one that the run read; None if it is the same."""
    if members.fault:
        return f"{members.fault[0]}: {members.fault[1]}"
    if members.image is None or members.caption is None:
        return "no longer has an image and a caption"
    if hashlib.sha256(members.image).hexdigest() != row["image_sha256"]:
        return "the image has changed since the run"
    if members.caption != row["caption"].encode():
        return "the caption has changed since the run"
    return None
