"""The run that owns an output folder: the newest one that got its lock.

A job on a cluster may outlive the process that started it, whose lock is free then. Such a job has a token. The next
run takes the folder over, and the job finds that when it is about to write a table or to publish. Its work folder and
the folder of its version carry the token, so no other run writes or reads there.
"""

from __future__ import annotations

import uuid

from pipeline.output_folder.layout import Layout
from transforms.storage import files


class NotHeld(RuntimeError):
    """Another run took over the output folder before this run had finished."""


def new_token() -> str:
    """A token for a run that may outlive the process that starts it."""
    return uuid.uuid4().hex[:16]


def take(layout: Layout) -> None:
    """Take the folder over. The caller must hold its lock."""
    if layout.token:
        files.write_bytes(layout.owner, layout.token.encode())
    else:
        files.delete_if_there(layout.owner)


def release(layout: Layout) -> None:
    """Forget the owner: its run has ended."""
    files.delete_if_there(layout.owner)


def owns(layout: Layout) -> bool:
    """Whether no other run has taken the folder over. A run without a token ends with its process, so it owns it."""
    if not layout.token:
        return True
    return files.exists(layout.owner) and files.read_bytes(layout.owner) == layout.token.encode()


def check(layout: Layout) -> None:
    """Raise NotHeld if another run has taken the folder over."""
    if not owns(layout):
        raise not_held(layout, f"run {layout.token}")


def not_held(layout: Layout, name: str) -> NotHeld:
    """The error of the run of that name."""
    return NotHeld(
        f"{layout.output}: another run has taken over this folder from {name}; wait for it to end, then run again: "
        "finished work is not repeated"
    )
