"""Versions: what stage 3 leaves lies in a folder of its own for each run, and readers change over in one step.

    OUT/versions/3/…                        whole once its manifest.json is there
    OUT/current -> versions/3               replaced by a rename
    OUT/decisions -> current/decisions      and so on: the paths that readers know

A reader of several files resolves `current` once (`newest` does) and reads one version throughout, whatever is written
meanwhile. Cloud Storage has no links: there `current.json` names the version, and whoever replaces it names the
generation that he saw, so that a slower run never takes readers back.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid

from pipeline.output_folder.defaults import KEPT_VERSIONS as KEPT
from pipeline.output_folder.layout import Layout
from transforms.storage import files, generations

LINKED = (
    "decisions", "subset.npy", "funnel.json", "clusters.parquet", "clusters.svg", "centroids.npy", "manifest.json",
)  # fmt: skip
_CURRENT = "current"
__all__ = ["KEPT", "VersionConflict", "begin", "newest", "prune", "switch"]


class VersionConflict(RuntimeError):
    """Another run has switched readers to a later version: two have written one output folder."""


def newest(output: str) -> Layout:
    """The layout of the version that readers are to see; its `results` are empty where there is none yet."""
    if files.in_cloud_storage(output):
        pointer = generations.read(_pointer(output))
        return Layout(output, _folder(output, _version_in(pointer)) if pointer else "")
    link = os.path.join(output, _CURRENT)
    return Layout(output, os.path.join(output, os.readlink(link)) if os.path.islink(link) else "")


def begin(output: str) -> Layout:
    """The layout of a new version. What an interrupted run left of it goes."""
    number = max(_whole(output), default=0) + 1
    folder = _folder(output, number)
    files.delete_folder(folder)
    return Layout(output, folder)


def switch(layout: Layout) -> None:
    """Let readers see the version of `layout`, which is whole. May be done again. Raises VersionConflict."""
    number = _number(layout)
    if files.in_cloud_storage(layout.output):
        _switch_pointer(layout.output, number)
        return
    for name in LINKED:
        path = os.path.join(layout.output, name)
        if not os.path.islink(path):
            files.delete_if_there(path)
            os.symlink(os.path.join(_CURRENT, name), path)
    aside = os.path.join(layout.output, f".{_CURRENT}.tmp-{uuid.uuid4().hex}")
    os.symlink(os.path.join("versions", str(number)), aside)
    os.replace(aside, os.path.join(layout.output, _CURRENT))


def prune(layout: Layout, keep: int) -> None:
    """Delete all versions before that of `layout` but for the newest `keep` that are whole, it included."""
    output, own = layout.output, _number(layout)
    kept = sorted(number for number in _whole(output) if number <= own)[-keep:]
    for number in sorted(number for number in _numbers(output) if number < own and number not in kept):
        older = Layout(output, _folder(output, number))
        files.delete_if_there(older.manifest)  # first: without it the rest is no version
        files.delete_folder(older.results)


def _switch_pointer(output: str, number: int) -> None:
    path = _pointer(output)
    while (there := generations.read(path)) is None or (shown := _version_in(there)) != number:
        if there and shown > number:
            raise VersionConflict(
                f"{output}: version {number} is whole, but another run has switched readers to version {shown} "
                "meanwhile, and they stay with that; let one run at a time write there, then run again"
            )
        with contextlib.suppress(generations.GenerationConflict):  # then what lies there now decides
            content = json.dumps({"version": number}).encode() + b"\n"
            generations.replace(path, content, there.generation if there else generations.NOTHING)


def _pointer(output: str) -> str:
    return files.join(output, f"{_CURRENT}.json")


def _version_in(pointer: generations.Object) -> int:
    return int(json.loads(pointer.content)["version"])


def _whole(output: str) -> set[int]:
    """The numbers of the versions that are whole."""
    return {number for number in _numbers(output) if files.exists(Layout(output, _folder(output, number)).manifest)}


def _numbers(output: str) -> set[int]:
    """The numbers of the versions of which anything lies there."""
    return {int(name) for name in files.folders_in(files.join(output, "versions")) if name.isdigit()}


def _number(layout: Layout) -> int:
    return int(layout.results.rpartition("/")[2])


def _folder(output: str, number: int) -> str:
    return files.join(output, "versions", str(number))
