"""Local copies of remote files, for libraries that open local paths only."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from filelock import FileLock

from transforms.storage import files


def cache_folder() -> Path:
    """This user's folder for files that can be made again: `PAIRSIFT_CACHE`, else one in the user's cache folder."""
    if named := os.environ.get("PAIRSIFT_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "pairsift"
    except RuntimeError:  # a container may run as a number that has no home
        return Path(tempfile.gettempdir()) / "pairsift"


def local_copy(path: str) -> str:
    """A local path with the content of `path`: a copy if it is a file or folder in Cloud Storage, else `path`.

    Each state of the remote files is copied once per machine. A copy gets its name when it is complete. Raises
    FileNotFoundError if there is nothing at `path`.
    """
    if not files.in_cloud_storage(path):
        return path
    url = path.rstrip("/")
    found = sorted(files.matching(files.literal(url)) or files.matching(f"{files.literal(url)}/**"))
    if not found:
        raise FileNotFoundError(f"{url}: nothing there")
    state = "\n".join(f"{file.path} {file.size_bytes} {file.updated_seconds}" for file in found)
    copy = cache_folder() / "models" / hashlib.sha256(state.encode()).hexdigest()[:32]
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):  # all worker processes of a machine start at once
        if not copy.exists():
            aside = copy.with_name(f"{copy.name}.tmp-{uuid.uuid4().hex}")
            try:
                for file in found:
                    target = aside / (file.path.removeprefix(url).lstrip("/") or url.rsplit("/", 1)[1])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with (
                        files.open_binary(file.path) as remote,
                        target.open("wb") as local,
                        files.client_errors(file.path),
                    ):
                        shutil.copyfileobj(remote, local, 2**20)
                aside.rename(copy)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return str(copy / url.rsplit("/", 1)[1] if found[0].path == url else copy)
