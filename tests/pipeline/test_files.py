"""Files: whoever sees the final name sees all of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from apache_beam.io.filesystems import FileSystems

from pipeline import files
from pipeline.layout import Layout


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_half(path: str, error: type[BaseException]) -> None:
    with files.write_aside(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 3_000_000])
def test_written_bytes_are_read_again(tmp_path: Path, content: bytes) -> None:
    path = str(tmp_path / "a" / "b" / "c.bin")
    files.write_bytes(path, content)
    assert files.read_bytes(path) == content
    assert files.sha256(path) == hashlib.sha256(content).hexdigest()
    assert everything(tmp_path) == ["a/b/c.bin"]


def test_the_final_name_is_not_there_before_the_file_is_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "c.bin")
    with files.write_aside(path) as file:
        file.write(b"half")
        assert not files.exists(path)
        file.write(b"whole")
    assert files.read_bytes(path) == b"halfwhole"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_crash_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = str(tmp_path / "c.bin")
    with pytest.raises(error):
        write_half(path, error)
    assert everything(tmp_path) == []


def test_a_crash_leaves_what_was_there_before(tmp_path: Path) -> None:
    path = str(tmp_path / "c.bin")
    files.write_bytes(path, b"old")
    with pytest.raises(RuntimeError):
        write_half(path, RuntimeError)
    assert files.read_bytes(path) == b"old"
    assert everything(tmp_path) == ["c.bin"]


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "c.bin")
    files.write_bytes(path, b"something long")
    files.write_bytes(path, b"new")
    assert files.read_bytes(path) == b"new"
    assert everything(tmp_path) == ["c.bin"]


def test_a_rename_that_did_not_happen_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileSystems, "rename", lambda sources, destinations: None)
    with pytest.raises(files.IncompleteWrite, match=r"c\.bin"):
        files.write_bytes(str(tmp_path / "c.bin"), b"new")


def test_a_rename_that_fails_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sources: list[str], destinations: list[str]) -> None:
        raise OSError("no space")

    monkeypatch.setattr(FileSystems, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_bytes(str(tmp_path / "c.bin"), b"new")
    assert everything(tmp_path) == []


def test_a_file_that_lost_bytes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(sources: list[str], destinations: list[str]) -> None:
        Path(destinations[0]).write_bytes(Path(sources[0]).read_bytes()[:-1])

    monkeypatch.setattr(FileSystems, "rename", lossy)
    with pytest.raises(files.IncompleteWrite, match="wrote 3 bytes"):
        files.write_bytes(str(tmp_path / "c.bin"), b"new")


def test_two_writers_of_one_name_both_leave_it_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "c.bin")
    with files.write_aside(path) as one, files.write_aside(path) as other:
        one.write(b"one")
        other.write(b"other")
    assert files.read_bytes(path) in (b"one", b"other")
    assert everything(tmp_path) == ["c.bin"]


@pytest.mark.parametrize("folder", ["out [1]", "o*t", "what?", "ünï", "a%2Fb", "with space"])
def test_folders_may_be_named_anything(tmp_path: Path, folder: str) -> None:
    (tmp_path / "out 1").mkdir()
    path = files.join(str(tmp_path / folder), "c.bin")
    files.write_bytes(path, b"x")
    assert files.read_bytes(path) == b"x"
    files.delete_if_there(path)
    assert not files.exists(path)


def test_a_name_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.write_bytes("c.bin", b"x")
    assert (tmp_path / "c.bin").read_bytes() == b"x"


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError):  # noqa: PT011 (which one is the filesystem's matter)
        files.write_bytes(str(tmp_path / "a" / "c.bin"), b"x")
    assert everything(tmp_path) == ["a"]


def test_nothing_is_decompressed_by_its_name(tmp_path: Path) -> None:
    path = str(tmp_path / "c.gz")
    files.write_bytes(path, b"plain")
    assert (tmp_path / "c.gz").read_bytes() == b"plain"
    assert files.read_bytes(path) == b"plain"


def test_json_keeps_its_order_and_its_letters(tmp_path: Path) -> None:
    path = str(tmp_path / "c.json")
    files.write_json(path, {"b": "ü", "a": [1, None]})
    text = Path(path).read_text("utf-8")
    assert text.endswith("\n")
    assert "ü" in text
    assert list(json.loads(text)) == ["b", "a"]


def test_deleting_takes_nothing_else_along(tmp_path: Path) -> None:
    for name in ("o*t/a", "out/a", "o[u]t/a"):
        files.write_bytes(str(tmp_path / name), b"x")
    files.delete_if_there(str(tmp_path / "o*t" / "a"))
    assert everything(tmp_path) == ["o[u]t/a", "out/a"]
    files.delete_if_there(str(tmp_path / "o[u]t"))
    assert everything(tmp_path) == ["out/a"]


def test_deleting_what_is_not_there(tmp_path: Path) -> None:
    files.delete_if_there(str(tmp_path / "nothing"))


@pytest.mark.parametrize("shard", ["00000", "a%2F..%2Fb", "..", ".", "", "%2e"])
def test_every_place_lies_below_the_output_folder_and_is_its_own(shard: str) -> None:
    layout = Layout("/out/x")
    places = [
        layout.single_modality(shard), layout.pool_wide(shard), layout.cross_modality(shard),
        layout.decisions(shard), layout.progress("a", shard), layout.progress("b", shard),
        layout.dead_letters("a", shard), layout.dead_letters("b", shard),
        layout.centroids, layout.clusters, layout.subset, layout.funnel, layout.manifest, layout.run,
    ]  # fmt: skip
    assert all(os.path.normpath(place).startswith("/out/x/") for place in places)
    assert len({os.path.normpath(place) for place in places}) == len(places)
