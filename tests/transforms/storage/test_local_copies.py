"""The folder of copies: only this user can put files into it, which are then loaded as models."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from transforms.storage import local_copies


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a home; returns the cache folder of this user under the temporary folder."""

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PAIRSIFT_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path / f"pairsift-{os.getuid()}"


def test_a_cache_under_the_temporary_folder_is_private(homeless: Path) -> None:
    before = os.umask(0)
    try:
        assert local_copies.cache_folder() == local_copies.cache_folder() == homeless
    finally:
        os.umask(before)
    assert stat.S_IMODE(homeless.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["open", "link", "file"])
def test_a_folder_that_others_may_have_filled_is_refused(homeless: Path, tmp_path: Path, kind: str) -> None:
    if kind == "open":
        homeless.mkdir()
        homeless.chmod(0o777)
    elif kind == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        homeless.symlink_to("theirs")
    else:
        homeless.touch(0o600)
    with pytest.raises(PermissionError, match=rf"{homeless}: is not a folder that only this user can enter; delete it"):
        local_copies.cache_folder()


def test_another_owner_is_refused(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homeless.mkdir(mode=0o700)
    found = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: found + 1)
    homeless.rename(homeless.with_name(f"pairsift-{found + 1}"))
    with pytest.raises(PermissionError, match="only this user"):
        local_copies.cache_folder()


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_a_cache_on_a_filesystem_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    path = str(tmp_path / "a.lock")
    refused = pytest.raises(OSError, match=f"{path}: its filesystem offers no file locks .*PAIRSIFT_CACHE")
    with refused, local_copies._locked(path):
        pass
