"""Files: the final name always has the complete content."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import re
from pathlib import Path

import pytest

from pipeline.output_folder.layout import Layout
from transforms.storage import files
from transforms.storage.local_copies import local_copy
from transforms.storage.steady_reader import SteadyReader


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_half(path: str, error: type[BaseException]) -> None:
    with files.write_aside(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 3_000_000])
def test_written_bytes_are_read_back(tmp_path: Path, content: bytes) -> None:
    path = str(tmp_path / "a" / "b" / "c.bin")
    files.write_bytes(path, content)
    assert files.read_bytes(path) == content
    assert files.sha256(path) == hashlib.sha256(content).hexdigest()
    assert everything(tmp_path) == ["a/b/c.bin"]


def test_final_name_appears_only_when_the_file_is_complete(tmp_path: Path) -> None:
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


def test_crash_leaves_the_older_file(tmp_path: Path) -> None:
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


def test_missing_rename_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rename", lambda source, target: None)
    with pytest.raises(files.IncompleteWrite, match=r"c\.bin"):
        files.write_bytes(str(tmp_path / "c.bin"), b"new")


def test_failed_rename_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: str) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_bytes(str(tmp_path / "c.bin"), b"new")
    assert everything(tmp_path) == []


def test_truncated_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(source: str, target: str) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:-1])

    monkeypatch.setattr(os, "rename", lossy)
    with pytest.raises(files.IncompleteWrite, match="wrote 3 bytes"):
        files.write_bytes(str(tmp_path / "c.bin"), b"new")


def test_two_writers_of_one_name_leave_a_complete_file(tmp_path: Path) -> None:
    path = str(tmp_path / "c.bin")
    with files.write_aside(path) as one, files.write_aside(path) as other:
        one.write(b"one")
        other.write(b"other")
    assert files.read_bytes(path) in (b"one", b"other")
    assert everything(tmp_path) == ["c.bin"]


@pytest.mark.parametrize("folder", ["out [1]", "o*t", "what?", "ünï", "a%2Fb", "with space"])
def test_unusual_folder_names(tmp_path: Path, folder: str) -> None:
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


# What killed processes leave -------------------------------------------------------------------------------------


def killed_while_writing(path: str) -> None:
    """A process that dies before its file is complete."""
    with files.write_aside(path) as file:
        file.write(b"half")
        os._exit(1)


def test_only_temporary_files_of_killed_processes_are_deleted(tmp_path: Path) -> None:
    kept = ["a.parquet", ".a.parquet.tmp-1", "x.tmp-" + "0" * 32, f".a.tmp-{'g' * 32}", ".progress/a.count"]
    for name in kept:
        files.write_bytes(str(tmp_path / name), b"x")
    for path in (tmp_path / "sub" / "b.parquet", tmp_path / "sub [1]" / "odd\nname"):
        process = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(str(path),))
        process.start()
        process.join()
    assert len(everything(tmp_path)) == len(kept) + 2
    files.clear_aside(str(tmp_path))
    assert everything(tmp_path) == sorted(kept)
    files.clear_aside(str(tmp_path / "nowhere"))


def test_temporary_file_of_a_live_writer_is_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "c.bin")
    with files.write_aside(path) as file:
        file.write(b"whole")
        files.clear_aside(str(tmp_path))
    assert files.read_bytes(path) == b"whole"
    with files.write_aside(path) as file:
        file.write(b"closed already")
        file.close()
        files.clear_aside(str(tmp_path))
    assert files.read_bytes(path) == b"closed already"


# What the machine does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "reason", "advice"),
    [
        (errno.ENOSPC, "No space left on device", "free space there"),
        (errno.EDQUOT, "Disk quota exceeded", "free space there"),
        (errno.EACCES, "Permission denied", "allow this user to write there"),
        (errno.EROFS, "Read-only file system", "allow this user to write there"),
        (errno.EIO, "Input/output error", "fix the cause"),
    ],
)
@pytest.mark.parametrize("when", ["create", "write", "rename"])
def test_failed_write_names_path_reason_and_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, number: int, reason: str, advice: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    class Failing(io.FileIO):
        def write(self, content: object) -> int:
            raise OSError(number, os.strerror(number))

    path = str(tmp_path / "c.bin")
    if when == "write":
        monkeypatch.setattr(files, "create", lambda path: Failing(path, "wb"))
    elif when == "create":
        monkeypatch.setattr(files, "create", fail)
    else:
        monkeypatch.setattr(os, "rename", fail)
    expected = f"{path}: cannot be written: {reason}; {advice}, then run the same command again"
    with pytest.raises(files.WriteFailed, match=re.escape(expected)):
        files.write_bytes(path, b"new")
    assert everything(tmp_path) == []


def test_error_of_the_content_is_not_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_half(str(tmp_path / "c.bin"), FileNotFoundError)


class Flaky(io.FileIO):
    """A file on a disk that fails at every third read, or on opening, for a limited number of times."""

    failures = 0
    opened = 0

    def __init__(self, path: str) -> None:
        Flaky.opened += 1
        if Flaky.failures and Flaky.opened % 2 == 0:
            Flaky.failures -= 1
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        super().__init__(path)
        self._reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self._reads += 1
        if Flaky.failures and self._reads % 3 == 0:
            Flaky.failures -= 1
            raise ValueError("an error of a cloud's client")
        return super().read(size)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    monkeypatch.setattr(files, "open_binary", Flaky)
    Flaky.failures = Flaky.opened = 0
    return Flaky


def test_failed_read_resumes_at_its_position(tmp_path: Path, flaky: type[Flaky], waits: list[float]) -> None:
    content = bytes(range(256)) * 40
    path = tmp_path / "c.bin"
    path.write_bytes(content)
    flaky.failures = 6
    with SteadyReader(str(path)) as file:
        found = b"".join(iter(lambda: file.read(700), b""))
    assert found == content
    assert flaky.failures == 0
    assert len(waits) == 6


def test_permanently_unreadable_file_is_an_error_after_seconds(tmp_path: Path, waits: list[float]) -> None:
    path = str(tmp_path / "gone.tar")
    expected = f"{path}: cannot be read at byte 0: No such file or directory; put it back or mend its access"
    with SteadyReader(path) as file, pytest.raises(files.ReadFailed, match=re.escape(expected)):
        file.read(10)
    assert waits == [0.5, 1, 2, 4]


def test_file_name_does_not_cause_decompression(tmp_path: Path) -> None:
    path = str(tmp_path / "c.gz")
    files.write_bytes(path, b"plain")
    assert (tmp_path / "c.gz").read_bytes() == b"plain"
    assert files.read_bytes(path) == b"plain"


def test_json_keeps_order_and_characters(tmp_path: Path) -> None:
    path = str(tmp_path / "c.json")
    files.write_json(path, {"b": "ü", "a": [1, None]})
    text = Path(path).read_text("utf-8")
    assert text.endswith("\n")
    assert "ü" in text
    assert list(json.loads(text)) == ["b", "a"]


def test_delete_removes_nothing_else(tmp_path: Path) -> None:
    for name in ("o*t/a", "out/a", "o[u]t/a"):
        files.write_bytes(str(tmp_path / name), b"x")
    files.delete_if_there(str(tmp_path / "o*t" / "a"))
    assert everything(tmp_path) == ["o[u]t/a", "out/a"]
    files.delete_if_there(str(tmp_path / "o[u]t"))
    assert everything(tmp_path) == ["out/a"]


def test_delete_of_a_missing_path(tmp_path: Path) -> None:
    files.delete_if_there(str(tmp_path / "nothing"))


@pytest.mark.parametrize("shard", ["00000", "a%2F..%2Fb", "..", ".", "", "%2e"])
def test_every_path_is_unique_and_inside_the_output_folder(shard: str) -> None:
    layout = Layout("/out/x")
    places = [
        layout.single_modality(shard), layout.pool_wide(shard), layout.cross_modality(shard),
        layout.decisions(shard), layout.progress("a", shard), layout.progress("b", shard),
        layout.dead_letters("a", shard), layout.dead_letters("b", shard),
        layout.centroids, layout.clusters, layout.subset, layout.funnel, layout.manifest, layout.run,
    ]  # fmt: skip
    assert all(os.path.normpath(place).startswith("/out/x/") for place in places)
    assert len({os.path.normpath(place) for place in places}) == len(places)


@pytest.mark.parametrize("path", ["s3://bucket/a", "hdfs://host/a", "file:///a"])
def test_other_schemes_are_refused(path: str) -> None:
    expected = f"{re.escape(path)}: [a-z0-9]+:// is not supported; give a local path or gs://BUCKET/"
    calls = (files.read_bytes, files.exists, files.matching, files.names_in, files.delete_if_there, local_copy)
    for call in calls:
        with pytest.raises(files.UnsupportedScheme, match=expected):
            call(path)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("/a/*.tar", "/a/b.tar", True),
        ("/a/*.tar", "/a/b/c.tar", False),
        ("/a/*.tar", "/a/b\\c.tar", False),
        ("/a/**.tar", "/a/b/c\nd.tar", True),
        ("/a?b", "/a/b", True),
        ("/[xy]/a", "/y/a", True),
        ("/[!xy]/a", "/y/a", False),
        ("/[^x]", "/^", True),
        ("/[]]", "/]", True),
        ("/a[", "/a[", True),
        ("/[]", "/[]", True),
        (r"/[\]", "/\\", True),
        ("/[*][?][[]", "/*?[", True),
        ("/a.b", "/axb", False),
    ],
)
def test_patterns(pattern: str, path: str, expected: bool) -> None:
    assert files.matches(pattern, path) is expected
