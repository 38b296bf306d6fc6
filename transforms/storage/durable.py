"""Makes local files survive a power loss: a rename may otherwise reach the disk before the data that it names."""

from __future__ import annotations

import errno
import os

_NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def sync_tree(folder: str) -> None:
    """Write everything under a local folder to the disk: the files, then the folders that name them. Raises OSError."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                sync(path)
        sync(place)


def sync(path: str) -> None:
    """Write a local file, or the names in a local folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:  # some network filesystems have none, of folders at least
            raise
    finally:
        os.close(descriptor)
