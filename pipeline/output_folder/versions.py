"""Versions of the results: stage 3 of each run writes a folder of its own, and readers switch to it in one step.

    OUT/versions/3/…                        complete once its manifest.json exists
    OUT/current -> versions/3               replaced by a rename
    OUT/decisions -> current/decisions      and so on, for the paths that readers know

A reader of several files resolves `current` once (`newest` does) and reads that version throughout, even if another is
published meanwhile. Cloud Storage has no links: `current.json` names the version there. It is replaced only at the
generation that was read, so a slower run never moves readers back to an older version.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid

from pipeline.output_folder.defaults import KEPT_VERSIONS as KEPT
from pipeline.output_folder.layout import Layout
from transforms.storage import durable, files, generations

LINKED = (
    "decisions", "subset.npy", "funnel.json", "clusters.parquet", "clusters.svg", "centroids.npy", "manifest.json",
)  # fmt: skip
_CURRENT = "current"
__all__ = ["KEPT", "VersionConflict", "begin", "newest", "prune", "switch"]


class VersionConflict(RuntimeError):
    """Another run has published a later version: two runs have written the same output folder."""


def newest(output: str) -> Layout:
    """The layout of the current version; its `results` is empty if there is none yet."""
    if files.in_cloud_storage(output):
        pointer = generations.read(_pointer(output))
        return Layout(output, _folder(output, _version_in(pointer)) if pointer else "")
    link = os.path.join(output, _CURRENT)
    return Layout(output, os.path.join(output, os.readlink(link)) if os.path.islink(link) else "")


def begin(output: str) -> Layout:
    """The layout of a new version. Deletes what an interrupted run left in its folder."""
    number = max(_complete(output), default=0) + 1
    folder = _folder(output, number)
    files.delete_folder(folder)
    return Layout(output, folder)


def switch(layout: Layout) -> None:
    """Make the version of `layout`, which must be complete, the current one. Idempotent. Raises VersionConflict."""
    number = _number(layout)
    if files.in_cloud_storage(layout.output):
        _switch_pointer(layout.output, number)
        return
    # First on the disk: after a power loss `current` must not name a version whose data is lost.
    durable.sync_tree(layout.results)
    durable.sync(os.path.dirname(layout.results))
    durable.sync(layout.output)
    aside = os.path.join(layout.output, f".{_CURRENT}.tmp-{uuid.uuid4().hex}")
    try:
        os.symlink(os.path.join("versions", str(number)), aside)
        os.replace(aside, os.path.join(layout.output, _CURRENT))
    finally:
        files.delete_if_there(aside)
    # Only now, so that a killed run leaves no link to nothing; the next run makes those that are missing.
    for name in LINKED:
        path = os.path.join(layout.output, name)
        if not os.path.islink(path):
            files.delete_if_there(path)
            os.symlink(os.path.join(_CURRENT, name), path)
    durable.sync(layout.output)


def prune(layout: Layout, keep: int) -> None:
    """Delete the versions before that of `layout`, except the newest `keep` complete ones, itself included."""
    output, own = layout.output, _number(layout)
    kept = sorted(number for number in _complete(output) if number <= own)[-keep:]
    for number in sorted(number for number in _numbers(output) if number < own and number not in kept):
        older = Layout(output, _folder(output, number))
        files.delete_if_there(older.manifest)  # first: a folder without a manifest is no version
        files.delete_folder(older.results)


def _switch_pointer(output: str, number: int) -> None:
    path = _pointer(output)
    while (pointer := generations.read(path)) is None or (shown := _version_in(pointer)) != number:
        if pointer and shown > number:
            raise VersionConflict(
                f"{output}: version {number} is complete, but another run has published version {shown} meanwhile, "
                "which stays current; let one run at a time write the folder, then run again"
            )
        with contextlib.suppress(generations.GenerationConflict):  # the next iteration reads the new state
            content = json.dumps({"version": number}).encode() + b"\n"
            generations.replace(path, content, pointer.generation if pointer else generations.NOTHING)


def _pointer(output: str) -> str:
    return files.join(output, f"{_CURRENT}.json")


def _version_in(pointer: generations.Object) -> int:
    return int(json.loads(pointer.content)["version"])


def _complete(output: str) -> set[int]:
    """The numbers of the complete versions."""
    return {number for number in _numbers(output) if files.exists(Layout(output, _folder(output, number)).manifest)}


def _numbers(output: str) -> set[int]:
    """The numbers of all versions, complete or not."""
    return {int(name) for name in files.folders_in(files.join(output, "versions")) if name.isdigit()}


def _number(layout: Layout) -> int:
    return int(layout.results.rpartition("/")[2])


def _folder(output: str, number: int) -> str:
    return files.join(output, "versions", str(number))
