"""Local copies of remote files, for libraries that open local paths only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from transforms.storage import files


def cache_folder() -> Path:
    """This user's folder for files that can be made again: `PAIRSIFT_CACHE`, else one in the user's cache folder."""
    if named := os.environ.get("PAIRSIFT_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "pairsift"
    except RuntimeError:  # a container may run as a number that has no home
        return _private(Path(tempfile.gettempdir()) / f"pairsift-{os.getuid()}")


def _private(folder: Path) -> Path:
    """Make a folder that only this user can enter, or check that it is one: everyone may write beside it, so another
    user may have made it first, to have its files loaded as models. Raises PermissionError."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(
            f"{folder}: is not a folder that only this user can enter; delete it, or name another folder in "
            "PAIRSIFT_CACHE"
        )
    return folder


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a file lock. Raises OSError if the filesystem offers none."""
    from filelock import FileLock  # its import takes longer than that of all other modules here

    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in files.NO_LOCKS:
            raise
        raise OSError(
            f"{path}: its filesystem offers no file locks ({files.reason(error)}); name a folder on a local disk in "
            "PAIRSIFT_CACHE"
        ) from error
    try:
        yield
    finally:
        lock.release()


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
    with _locked(f"{copy}.lock"):  # all worker processes of a machine start at once
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
