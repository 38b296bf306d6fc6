"""Versions: what stage 3 leaves lies in a folder of its own for each run, and readers change over in one step.

    OUT/versions/3/…                        whole once its manifest.json is there
    OUT/current -> versions/3               replaced by a rename
    OUT/decisions -> current/decisions      and so on: the paths that readers know

A reader of several files resolves `current` once (`newest` does) and reads one version throughout, whatever is written
meanwhile. An object store has no links: there `current.json` names the version, and is replaced as a whole.
"""

from __future__ import annotations

import json
import os
import uuid

from apache_beam.io.filesystems import FileSystems

from pipeline import files
from pipeline.layout import Layout

LINKED = (
    "decisions", "subset.npy", "funnel.json", "clusters.parquet", "clusters.svg", "centroids.npy", "manifest.json",
)  # fmt: skip
KEPT = 3
"""Versions that stay readable unless the command line says otherwise, the newest included."""
_CURRENT = "current"


def newest(output: str) -> Layout:
    """The layout of the version that readers are to see; its `results` are empty where there is none yet."""
    if "://" not in output:
        link = os.path.join(output, _CURRENT)
        return Layout(output, os.path.join(output, os.readlink(link)) if os.path.islink(link) else "")
    pointer = files.join(output, f"{_CURRENT}.json")
    if not files.exists(pointer):
        return Layout(output)
    return Layout(output, files.join(output, "versions", str(json.loads(files.read_bytes(pointer))["version"])))


def begin(output: str) -> Layout:
    """The layout of a new version. What an interrupted run left of it goes."""
    number = max(_whole(output), default=0) + 1
    folder = _folder(output, number)
    files.delete_folder(folder)
    return Layout(output, folder)


def switch(layout: Layout) -> None:
    """Let readers see the version of `layout`, which is whole."""
    number = layout.results.rpartition("/")[2]
    if "://" in layout.output:
        files.write_json(files.join(layout.output, f"{_CURRENT}.json"), {"version": int(number)})
        return
    for name in LINKED:
        path = os.path.join(layout.output, name)
        if not os.path.islink(path):
            files.delete_if_there(path)
            os.symlink(os.path.join(_CURRENT, name), path)
    aside = os.path.join(layout.output, f".{_CURRENT}.tmp-{uuid.uuid4().hex}")
    os.symlink(os.path.join("versions", number), aside)
    os.replace(aside, os.path.join(layout.output, _CURRENT))


def prune(output: str, keep: int) -> None:
    """Delete all versions but the newest `keep` that are whole."""
    for number in sorted(_numbers(output, "**") - set(sorted(_whole(output))[-keep:])):
        layout = Layout(output, _folder(output, number))
        files.delete_if_there(layout.manifest)  # first: without it the rest is no version
        files.delete_folder(layout.results)


def _whole(output: str) -> set[int]:
    """The numbers of the versions that are whole."""
    return _numbers(output, "*/manifest.json")


def _numbers(output: str, pattern: str) -> set[int]:
    """The numbers of the versions in which something matches."""
    folder = files.join(output, "versions")
    found = FileSystems.match([files.join(files.literal(folder), pattern)])[0].metadata_list
    return {int(metadata.path.removeprefix(folder).lstrip("/").partition("/")[0]) for metadata in found}


def _folder(output: str, number: int) -> str:
    return files.join(output, "versions", str(number))
