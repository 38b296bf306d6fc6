"""Walks local folders, through symbolic links, and tells what is not a readable file.

Every real folder is visited once, so links that form a cycle, or that multiply, end the walk as soon as others do. A
folder that several paths lead to is visited under the path without links if there is one under the root, else under
the first one in order of names: adding a link renames nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

DANGLING, UNREADABLE, NOT_A_FILE = "dangling_link", "unreadable", "not_a_file"


class FileStatus(NamedTuple):
    """A file's path, size in bytes, and time of its last change (Unix time, seconds).

    `fault` says why there is no regular file to read at `path`; it is empty for files. A folder that cannot be listed
    has a path that ends with a slash.
    """

    path: str
    size_bytes: int
    updated_seconds: float
    fault: str = ""


def walk(folder: str) -> Iterator[FileStatus]:
    """Yield what is under a local folder, except folders. Files are not opened."""
    visited: set[tuple[int, int]] = set()
    links = [folder]
    while links:
        reached: list[str] = []
        for link in sorted(links):
            yield from _walk_real(link, visited, reached)
        links = reached


def _walk_real(folder: str, visited: set[tuple[int, int]], links: list[str]) -> Iterator[FileStatus]:
    """Yield what is under a folder without following links; those to folders are added to `links`."""
    pending = [folder]
    while pending:
        place = pending.pop()
        try:
            identity = os.stat(place)
            if (identity.st_dev, identity.st_ino) in visited:
                continue
            visited.add((identity.st_dev, identity.st_ino))
            with os.scandir(place) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            yield FileStatus(os.path.join(place, ""), 0, 0.0, UNREADABLE)
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif (found := look(entry.path)) is not None:
                yield found
            else:
                links.append(entry.path)


def look(path: str) -> FileStatus | None:
    """Return what is at a local path; None for a folder, or a link to one."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return FileStatus(path, 0, 0.0, DANGLING)
    except OSError:  # a link to itself, a failing disk
        return FileStatus(path, 0, 0.0, UNREADABLE)
    if stat.S_ISDIR(found.st_mode):
        return None
    return FileStatus(path, found.st_size, found.st_mtime, "" if stat.S_ISREG(found.st_mode) else NOT_A_FILE)


def check_regular(path: str) -> None:
    """Raise OSError if a local path is a pipe, a socket or a device, whose reader may wait for ever."""
    found = look(path)
    if found is not None and found.fault == NOT_A_FILE:
        raise OSError(errno.EINVAL, "is not a regular file", path)
