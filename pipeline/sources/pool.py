"""The shards of a pool: which tars it has and how each is named."""

from __future__ import annotations

import contextlib
import hashlib
import re
import urllib.parse

from transforms.core.errors import UsageError
from transforms.core.records import Shard
from transforms.storage import files

_GLOB = re.compile(r"[*?[]")
_MAX_SHARD_NAME = 160  # characters; file systems allow 255 for the file names derived from it


class NoShards(UsageError):
    """No tar was found under the pool path."""


def list_shards(pool: str) -> list[Shard]:
    """Return the tars under the folder `pool`, or those that match the pattern `pool` (`*.tar`), sorted by name.

    A shard is named after its path relative to the pool, escaped so that output paths stay inside the output folder.
    Raises NoShards.
    """
    if pool.endswith(".tar"):
        pattern = pool if "/" in pool else f"./{pool}"  # a pattern is listed in an explicit folder
        folder = _GLOB.split(pattern)[0].rpartition("/")[0]
    else:
        folder = pool.rstrip("/") or pool
        pattern = files.join(files.literal(folder), "**.tar")
    try:
        found = files.matching(pattern)
    except OSError as error:
        raise NoShards(f"{pool}: cannot be listed ({error}); check the path and your permissions") from error
    if not found:
        raise NoShards(f"{pool}: contains no *.tar; give a folder of webdataset tars, or a pattern that ends in .tar")
    return sorted(
        Shard(
            name=_escaped(_relative(metadata.path, folder).removesuffix(".tar")),
            path=metadata.path,
            fingerprint=_fingerprint(metadata),
        )
        for metadata in found
    )


def check_unchanged(shard: Shard) -> None:
    """Raise files.ReadFailed if the tar has changed since it was listed, because the samples may mix both versions."""
    now = None
    with contextlib.suppress(OSError):
        now = files.status(shard.path)
    if now is None or _fingerprint(now) != shard.fingerprint:
        raise files.ReadFailed(
            f"{shard.path}: changed or was deleted after this run listed it; once the file is complete, repeat the "
            "same command to resume"
        )


def _fingerprint(file: files.FileStatus) -> str:
    return f"{file.size_bytes}-{file.updated_seconds:.3f}"


def _escaped(name: str) -> str:
    return shortened(urllib.parse.quote(name, safe="", errors="surrogateescape"), _MAX_SHARD_NAME)


def shortened(name: str, max_characters: int) -> str:
    """Return `name`, or its beginning and its hash if it is longer than `max_characters`.

    A shortened name has `max_characters` + 1 characters, so that it differs from every name that was not shortened.
    """
    if len(name) <= max_characters:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return f"{name[: max_characters - 32]}-{digest}"


def _relative(path: str, folder: str) -> str:
    folder = folder.rstrip("/") + "/" if folder else ""
    if not files.in_cloud_storage(path) and folder:
        path, folder = path.removeprefix("./"), folder.removeprefix("./")
    return path.removeprefix(folder)
