"""The offsets of the selected samples in the pool's tars, so that each sample can be read with a seek."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa

from pipeline.output_folder import tables
from pipeline.output_folder.layout import Layout
from pipeline.sources.members import File, Members
from pipeline.sources.tars import BrokenTar
from pipeline.sources.webdataset import key_of, read_pairs
from transforms.core.recipe import PoolSettings
from transforms.core.records import DeadLetter, Sample, Shard

NAME = "reshard"

_FILE = pa.struct(
    [
        ("extension", pa.string()),
        ("offset", pa.int64()),
        ("size_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("content", pa.binary()),
    ]
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

`files` lists the image, txt and json: the byte of the tar at which each begins, its size, and its sha256 in hex. A
caption that is no file in the pool has its bytes in `content` instead. `fault` says why `files` is null; it is null for
a valid sample.
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
        for members, samples in read_pairs(shard, bounds, NAME) if shard.path and wanted else ():
            for sample in samples:
                row = wanted.pop(key_of(sample), None)
                if row is not None:
                    row["fault"] = _fault(sample, row)
                    row["files"] = None if row["fault"] else _files(members, row["caption"])
            if not wanted:
                break
    except BrokenTar as error:
        not_found = f"the tar is damaged {error}"
    for row in wanted.values():
        row["fault"] = not_found
    return rows


def _files(members: Members, caption: str) -> list[dict[str, Any]]:
    """Return the files of a sample, under the extensions that trainers look for."""
    assert members.image is not None
    files = [_file(members.image, members.image.extension)]
    if members.caption is not None:
        files.append(_file(members.caption, "txt"))
    else:
        files.append({"extension": "txt", "content": caption.encode()})
    if members.metadata is not None:
        files.append(_file(members.metadata, "json"))
    return files


def _file(file: File, extension: str) -> dict[str, Any]:
    return {
        "extension": extension,
        "offset": file.offset,
        "size_bytes": len(file.content),
        "sha256": hashlib.sha256(file.content).hexdigest(),
    }


def _fault(sample: Sample | DeadLetter, row: dict[str, Any]) -> str | None:
    """Return how a sample differs from the one that the run read; None if it is the same."""
    if isinstance(sample, DeadLetter) and sample.reason.startswith("missing_"):
        return f"no longer has an image and a caption ({sample.message})"
    if isinstance(sample, DeadLetter):
        return f"{sample.reason}: {sample.message}"
    if hashlib.sha256(sample.image_bytes).hexdigest() != row["image_sha256"]:
        return "the image has changed since the run"
    if sample.annotation.caption != row["caption"]:
        return "the caption has changed since the run"
    return None
