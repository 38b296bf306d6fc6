"""Claiming an output folder: one writer at a time, and only over outputs of the same pool or command."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pipeline.output_folder import lock, owner, versions
from pipeline.output_folder.layout import OWNER, Layout
from transforms.core.errors import UsageError
from transforms.storage import files


@contextlib.contextmanager
def only_writer(layout: Layout) -> Iterator[None]:
    """Lock the output folder while the body runs, and delete the leftovers of a killed run first.

    Raises UsageError if another run holds the lock.
    """
    try:
        with lock.only_writer(layout.output):
            clear_leftovers(layout)
            yield
            if layout.token:
                owner.release(layout)
                files.delete_folder(layout.alignment_folder)
    except lock.Held as error:
        raise UsageError(str(error)) from error


def clear_leftovers(layout: Layout) -> None:
    """Take the folder over from a killed run and delete its temporary files. The caller must hold the folder's lock."""
    owner.take(layout)
    files.clear_aside(layout.output)
    for folder in (layout.progress_folder, layout.alignment_folder, layout.select_folder):
        files.delete_folder(folder)


def shown(layout: Layout) -> Layout:
    """The layout whose paths a user opens: in Cloud Storage the newest version, elsewhere `layout` with its links."""
    return versions.newest(layout.output) if files.in_cloud_storage(layout.output) else layout


def check_path(option: str, path: str) -> None:
    """Raise UsageError unless `path` is a local path or `gs://BUCKET/…`."""
    if not path:
        raise UsageError(f"{option}: is empty; name a folder")
    scheme, separator, rest = path.partition("://")
    if separator and scheme != "gs":
        raise UsageError(f"{option}: {path}: {scheme}:// is not supported; name a local folder or gs://BUCKET/FOLDER")
    if separator and not rest.partition("/")[0]:
        raise UsageError(f"{option}: {path}: names no bucket; allowed: gs://BUCKET/FOLDER")


class Claimable(Protocol):
    """An output folder with a manifest."""

    @property
    def output(self) -> str:
        """The folder."""

    @property
    def manifest(self) -> str:
        """The path of the manifest, which says what the outputs were computed from."""


def claim(layout: Claimable, content: dict[str, Any]) -> None:
    """Write the manifest `content` into a new or empty output folder, or check that the manifest there equals it.

    Deletes temporary files of a killed run. Raises UsageError if the folder holds other outputs.
    """
    if files.exists(layout.manifest):
        existing = _json_object(files.read_bytes(layout.manifest))
        differing = sorted(key for key in content if existing.get(key) != content[key])
        if differing:
            raise UsageError(
                f"{layout.output}: holds another run (it differs in {', '.join(differing)}); name another --output"
            )
        files.clear_aside(layout.output)
        return
    _check_empty(layout.output)
    files.clear_aside(layout.output)
    files.write_json(layout.manifest, content)


def check_pool(layout: Layout, pool: str) -> None:
    """Raise UsageError if the output folder holds anything but runs over `pool`."""
    if not files.exists(layout.newest_manifest):
        _check_empty(layout.output)
        return
    earlier = _json_object(files.read_bytes(layout.newest_manifest)).get("pool")
    if str(earlier).rstrip("/") != pool.rstrip("/"):
        raise UsageError(
            f"{layout.output}: holds another pool's run (of {earlier}, and --input is {pool}); name another --output"
        )


def _check_empty(output: str) -> None:
    if not files.in_cloud_storage(output) and Path(output).is_file():
        raise UsageError(f"{output}: is a file; name a folder")
    if files.holds_files(output, besides=(*lock.NAMES, OWNER)):
        raise UsageError(f"{output}: is not empty and holds no run of pairsift; name another --output")


def _json_object(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`; an empty one if `text` holds no JSON object."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
