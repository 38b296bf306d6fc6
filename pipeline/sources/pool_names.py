"""What `--input` may name: folders, tars, patterns, `{00000..00099}` and `a.tar::b.tar`, and how the shards are named.

A pool is one string. `::` joins its parts, as in webdataset; several `--input` are such parts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from transforms.core.errors import UsageError
from transforms.storage import braces, files

_SEPARATOR = "::"
_GLOB = re.compile(r"[*?[]")
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|zstd|lz4|lzma|z)|t[gbx]z|tbz2|tzst)$", re.IGNORECASE)


class NoShards(UsageError):
    """No tar was found under the pool path."""


class Part(NamedTuple):
    """One part of a pool: `names` are paths of tars, `patterns` are globs. Shards are named relative to `folder`."""

    text: str
    folder: str
    names: list[str]
    patterns: list[str]


def joined(inputs: Iterable[str]) -> str:
    """Return several inputs as one pool."""
    return _SEPARATOR.join(inputs)


def split(pool: str) -> list[str]:
    """Return the inputs that a pool joins. A local path that exists is taken as it is."""
    return [pool] if _is_there(pool) else pool.split(_SEPARATOR)


def options_of(pool: str) -> dict[str, str]:
    """Return the inputs of a pool by the option that names them, for messages."""
    inputs = split(pool)
    return {"--input" if len(inputs) == 1 else f"--input {n}": path for n, path in enumerate(inputs, 1)}


def absolute(pool: str) -> str:
    """Return the same pool, as named from any working folder and whatever the order of its inputs."""
    return joined(sorted({files.absolute(part).rstrip("/") or "/" for part in split(pool)}))


def parsed(text: str) -> Part:
    """Return what one input names. Raises NoShards if that can be no shard of a pool."""
    if _COMPRESSED.search(text):
        raise NoShards(f"{text}: is a compressed tar, which is not read; decompress it to a .tar")
    if _is_there(text) or (files.in_cloud_storage(text) and not re.search("[{*?[]", text)):
        expanded = [text]
    else:
        try:
            expanded = braces.expanded(text)
        except braces.TooManyNames as error:
            raise NoShards(str(error)) from error
    names, patterns = [], []
    for path in expanded:
        if not path.endswith(".tar") or (_is_there(path) and os.path.isdir(path)):
            folder = path.rstrip("/") or path
            patterns.append(files.join(files.literal(folder), "**.tar"))
        elif _is_there(path) or not _GLOB.search(path):
            names.append(_in_a_folder(path))
        else:
            patterns.append(_in_a_folder(path))
    if expanded == [text] and (not text.endswith(".tar") or _is_there(text)):
        folder = (text.rstrip("/") or text) if patterns else _in_a_folder(text).rpartition("/")[0]
    else:
        special = "[*?[]" if expanded == [text] else "[{*?[]"
        folder = re.split(special, _in_a_folder(text), maxsplit=1)[0].rpartition("/")[0]
    return Part(text, folder, names, patterns)


def labels(folders: Collection[str]) -> Mapping[str, str]:
    """Return what comes before the names of the shards of each folder: nothing if there is one, else its own name.

    Neither depends on the order of the folders. Where two have the same name, a hash of the path tells them apart.
    """
    if len(folders) == 1:
        return dict.fromkeys(folders, "")
    names = {folder: folder.rstrip("/").rpartition("/")[2] for folder in folders}
    taken = list(names.values())
    return {
        folder: f"{name}-{hashlib.sha256(folder.encode(errors='surrogateescape')).hexdigest()[:16]}/"
        if taken.count(name) > 1
        else f"{name}/"
        for folder, name in names.items()
    }


def before_glob(pattern: str) -> str:
    """Return the part of a glob pattern that is the same in all paths that match."""
    return _GLOB.split(pattern, maxsplit=1)[0]


def is_compressed(path: str) -> bool:
    """Return whether a path is named as a compressed tar."""
    return _COMPRESSED.search(path) is not None


def kinds(paths: Iterable[str]) -> str:
    """Return how many files there are of each kind, as `3 .parquet, 0 .tar`."""
    counts: dict[str, int] = {}
    for path in paths:
        name = path.rpartition("/")[2]
        compressed = _COMPRESSED.search(name)
        kind = compressed[0] if compressed else os.path.splitext(name)[1][:20] or "without extension"
        counts[kind] = counts.get(kind, 0) + 1
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {kind}" for kind, count in most[:5]]
    if len(most) > 5:
        shown.append(f"{sum(count for _, count in most[5:])} others")
    return ", ".join([*shown, "0 .tar"])


def _is_there(path: str) -> bool:
    """Return whether a local path exists, be it as a dangling link."""
    return "://" not in path and "\0" not in path and os.path.lexists(path)


def _in_a_folder(path: str) -> str:
    return path if "/" in path else f"./{path}"
