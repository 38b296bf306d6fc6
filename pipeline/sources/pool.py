"""The shards of a pool: which tars it has, which are missing or cannot be read, and how each is named."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import urllib.parse
from collections.abc import Iterator

from pipeline.output_folder.img2dataset_stats import SUFFIX, successes
from pipeline.sources import pool_names
from pipeline.sources.pool_names import NoShards as NoShards
from pipeline.sources.pool_names import Part
from transforms.core.records import DeadLetter, Shard
from transforms.storage import files, globs, trees

_MAX_SHARD_NAME = 160  # characters; file systems allow 255 for the file names derived from it
_SHOWN = 5

MISSING = "missing_shard"
_FAULTS = {
    MISSING: "there is no such file, though a stats file of img2dataset or a range of names speaks of it",
    trees.DANGLING: "is a link to nothing",
    trees.UNREADABLE: "cannot be read; check the permissions and the disk",
    trees.NOT_A_FILE: "is a pipe, a socket or a device, not a regular file",
}


def list_shards(pool: str) -> list[Shard]:
    """Return the tars of `pool`, sorted by name: see `pipeline.sources.pool_names` for what a pool may be.

    Folders are searched through symbolic links. A tar that is missing or cannot be read is a shard with a `fault`. A
    shard is named after its path relative to the pool, escaped so that output paths stay inside the output folder.
    Raises NoShards.
    """
    try:
        parts = [pool_names.parsed(text) for text in pool_names.split(pool)]
        roots = [files.absolute(part.folder or ".") for part in parts]
        labels = pool_names.labels(set(roots))
        found: dict[str, Shard] = {}
        # A tar of two inputs counts once, for the input whose folder comes first: the order given decides nothing.
        for root, part in sorted(zip(roots, parts, strict=True)):
            for file in _tars(part):
                name = _escaped(labels[root] + _relative(file.path, part.folder).removesuffix(".tar"))
                found.setdefault(files.absolute(file.path), Shard(name, file.path, _fingerprint(file), file.fault))
    except OSError as error:
        raise NoShards(f"{pool}: cannot be listed ({error}); check the path and your permissions") from error
    return sorted(found.values())


def dead_shard(shard: Shard, stage: str) -> DeadLetter:
    """Return the dead letter of a shard with a `fault`."""
    return DeadLetter(shard.name, "", "", stage, shard.fault, f"{shard.path}: {_FAULTS[shard.fault]}"[:500])


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


def _tars(part: Part) -> list[files.FileStatus]:
    """Return the tars that an input names. Raises NoShards if not one of them is there, and OSError."""
    found = _named(part) if part.names else []
    for pattern in part.patterns:
        found += _matching(part, pattern)
    if not any(file.fault != MISSING for file in found):
        raise NoShards(f"{part.text}: {_what_is_there(part)}")
    return [_checked(file) for file in found]


def _named(part: Part) -> list[files.FileStatus]:
    """Return the tars with the given names; those that are not there have a fault."""
    if files.in_cloud_storage(part.names[0]):
        there = {file.path: file for file in files.under(part.text.partition("{")[0])}
        return [there.get(path, _missing(path)) for path in part.names]
    found = []
    for path in part.names:
        file = trees.look(path) if os.path.lexists(path) else _missing(path)
        found += [file] if file else []
    return found


def _matching(part: Part, pattern: str) -> list[files.FileStatus]:
    """Return the tars that match a pattern, those that img2dataset's stats report, and folders that cannot be read."""
    regex, found, stats, compressed = globs.regex(pattern), {}, [], []
    for file in _under(pattern):
        if file.fault and (regex.fullmatch(file.path) or _may_hide_tars(file)):
            found[file.path] = file
        elif file.fault:
            continue
        elif regex.fullmatch(file.path):
            found[file.path] = file
        elif file.path.endswith(SUFFIX):
            stats.append(f"{file.path.removesuffix(SUFFIX)}.tar")
        elif pool_names.is_compressed(file.path):
            compressed.append(file.path)
    if found and compressed:
        shown = ", ".join(sorted(compressed)[:_SHOWN]) + (", …" if len(compressed) > _SHOWN else "")
        logging.warning("%d compressed tars are not read; decompress them: %s", len(compressed), shown)
    gone = [path for path in stats if path not in found and regex.fullmatch(path)]
    if found:
        found |= {path: _missing(path) for path in gone if successes(path) is not None}
    return list(found.values())


def _under(pattern: str) -> Iterator[files.FileStatus]:
    """Return the files that may match a pattern, and others. Raises OSError if a local folder cannot be listed."""
    fixed = pool_names.before_glob(pattern)
    if files.in_cloud_storage(pattern):
        return files.under(fixed)
    folder = os.path.dirname(fixed)
    if not os.path.isdir(folder):
        return iter(())
    os.scandir(folder).close()
    return files.under(folder)


def _may_hide_tars(file: files.FileStatus) -> bool:
    """Return whether there may be tars under a path that cannot be read: a folder, or a dangling link to one."""
    extension = os.path.splitext(file.path)[1]
    return file.path.endswith("/") or (file.fault == trees.DANGLING and not extension[1:].isalpha())


def _what_is_there(part: Part) -> str:
    """Return why an input has no shards, and what to give instead."""
    advice = "give a folder of webdataset tars, or a pattern that ends in .tar"
    place = part.folder or "."
    if not files.in_cloud_storage(place) and not os.path.isdir(place):
        what = "is not a folder" if os.path.exists(place) else "does not exist"
        return f"contains no *.tar because {place} {what}; check the path, or {advice}"
    there = [file.path for file in files.under(files.join(place, "")) if not file.fault]
    compressed = "; decompress .tar.gz files first" if any(map(pool_names.is_compressed, there)) else ""
    if part.names and not part.patterns:
        return f"does not exist; there is no *.tar of that name in {place} ({pool_names.kinds(there)}); {advice}"
    return f"contains no *.tar ({pool_names.kinds(there)}){compressed}; {advice}"


def _missing(path: str) -> files.FileStatus:
    return files.FileStatus(path, 0, 0.0, MISSING)


def _checked(file: files.FileStatus) -> files.FileStatus:
    """Return the file with a fault if this user may not read it."""
    if file.fault or files.in_cloud_storage(file.path) or os.access(file.path, os.R_OK):
        return file
    return file._replace(fault=trees.UNREADABLE)


def _fingerprint(file: files.FileStatus) -> str:
    return f"dead-{file.fault}" if file.fault else f"{file.size_bytes}-{file.updated_seconds:.3f}"


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
