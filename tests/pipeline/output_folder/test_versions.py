"""The switch of versions: what it names is on the disk, and a kill inside it leaves nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.output_folder import versions
from pipeline.output_folder.layout import Layout
from pipeline.runs.claim import clear_leftovers
from transforms.storage import files


def complete(output: Path) -> Layout:
    """A version whose files are all there."""
    layout = versions.begin(str(output))
    files.write_bytes(layout.decisions("0"), b"rows")
    for path in (layout.subset, layout.funnel, layout.manifest):
        files.write_bytes(path, b"{}")
    return layout


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_everything_is_on_the_disk_before_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def replaced(source: str, target: str) -> None:
        events.append("switch")
        replace(source, target)

    layout = complete(tmp_path)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    versions.switch(layout)
    before = events[: events.index("switch")]
    parts = ["decisions/part-0.parquet", "decisions", "subset.npy", "funnel.json", "manifest.json", "."]
    assert {os.path.normpath(f"versions/1/{part}") for part in parts} | {"versions", "."} == set(before)
    assert before.index("versions/1/decisions/part-0.parquet") < before.index("versions/1/decisions")
    assert before.index("versions/1/decisions") < before.index("versions/1") < before.index("versions")
    assert events[-1] == "."  # the switch itself


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_data_that_cannot_be_written_is_not_switched_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    layout = complete(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    if fails:
        with pytest.raises(OSError, match=os.strerror(number)):
            versions.switch(layout)
    else:
        versions.switch(layout)
    assert os.path.lexists(tmp_path / "current") is not fails


@pytest.mark.parametrize("call", ["symlink", "replace"])
def test_an_interrupt_inside_the_switch_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    layout = complete(tmp_path)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(os, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            versions.switch(layout)
    assert names(tmp_path) == {"versions"}
    versions.switch(layout)
    assert names(tmp_path) == {"versions", "current", *versions.LINKED}


def test_what_a_kill_inside_the_switch_leaves_is_cleared_by_the_next_run(tmp_path: Path) -> None:
    versions.switch(complete(tmp_path))
    for target in ("versions/1", "versions/2"):  # one that is there, and one that is not
        (tmp_path / f".current.tmp-{target[-1] * 32}").symlink_to(target)
    clear_leftovers(Layout(str(tmp_path)))
    assert names(tmp_path) == {"versions", "current", *versions.LINKED}
    assert (tmp_path / "current" / "funnel.json").is_file()
