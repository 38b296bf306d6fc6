"""Tests of reading webdataset tars: complete samples are unchanged, and every other sample becomes a dead letter."""

from __future__ import annotations

import errno
import gzip
import io
import os
import random
import re
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.sources.webdataset import read_samples
from tests.helpers import BOUNDS, Members, jpeg, member, sample_members, tar_bytes, write_pool
from transforms.core.recipe import PoolSettings
from transforms.core.records import DeadLetter, Sample, Shard
from transforms.storage import files

STAGE = "single_modality"
BLOCK = 512


def read_bytes(folder: Path, content: bytes, bounds: PoolSettings = BOUNDS) -> list[Sample | DeadLetter]:
    path = folder / "00000.tar"
    path.write_bytes(content)
    return list(read_samples(Shard("00000", str(path), "f"), bounds, STAGE))


def read(folder: Path, members: Any, bounds: PoolSettings = BOUNDS) -> list[Sample | DeadLetter]:
    return read_bytes(folder, tar_bytes(members), bounds)


def one_letter(found: list[Sample | DeadLetter]) -> DeadLetter:
    (letter,) = found
    assert isinstance(letter, DeadLetter)
    return letter


def keys(found: list[Sample | DeadLetter]) -> list[str]:
    return [item.annotation.key if isinstance(item, Sample) else f"!{item.reason}:{item.key}" for item in found]


# Complete samples -------------------------------------------------------------------------------------------------


def test_complete_sample(tmp_path: Path) -> None:
    metadata = {"uid": "AB" * 16, "original_width": 7}
    (sample,) = read(tmp_path, sample_members("a/k0", "ein Haus\n", seed=3, metadata=metadata))
    assert isinstance(sample, Sample)
    assert sample.image_bytes == jpeg(seed=3)
    assert sample.metadata == metadata
    assert sample.pixels is None
    found = sample.annotation
    assert (found.uid, found.shard, found.key, found.caption) == ("ab" * 16, "00000", "a/k0", "ein Haus\n")


def test_samples_are_in_tar_order_and_not_sorted(tmp_path: Path) -> None:
    names = ["b", "a", "d", "c"]
    assert keys(read(tmp_path, [m for name in names for m in sample_members(name)])) == names


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG", "Png"])
def test_image_extensions(tmp_path: Path, extension: str) -> None:
    assert keys(read(tmp_path, [(f"k.{extension}", b"x"), ("k.txt", b"c")])) == ["k"]


def test_members_of_a_sample_may_come_in_any_order(tmp_path: Path) -> None:
    for members in (sample_members("k"), sample_members("k")[::-1]):
        (sample,) = read(tmp_path, members)
        assert isinstance(sample, Sample)
        assert sample.annotation.caption == "a dog on a red bench"


def test_json_may_be_absent(tmp_path: Path) -> None:
    (sample,) = read(tmp_path, sample_members("k")[:2])
    assert isinstance(sample, Sample)
    assert sample.metadata == {}


@pytest.mark.parametrize("names", [["photo.heic"], ["photo.seg.heic", "photo.jxl"]])
def test_sample_without_a_readable_member_is_a_dead_letter(tmp_path: Path, names: list[str]) -> None:
    assert keys(read(tmp_path, [(name, b"x") for name in names])) == ["!missing_image:photo"]


def test_other_files_and_folders_belong_to_no_sample(tmp_path: Path) -> None:
    folder = member("k.d/", tarfile.DIRTYPE)
    (image, text, data) = sample_members("k")
    found = read(
        tmp_path,
        [("README", b"r"), ("README.md", b"r"), ("._k.jpg", b"mac"), folder, image, ("._k.txt", b"mac"), text,
         ("k.npy", b"n"), data, (".hidden.txt", b"h"), ("sub/.jpg", b"h"), *sample_members("l")],
    )  # fmt: skip
    assert keys(found) == ["k", "l"]


def test_captions_are_unchanged(tmp_path: Path) -> None:
    caption = "\ufeff a\x00b \u2028\U0001f600 e\u0301 \u202e"
    (sample,) = read(tmp_path, [("k.jpg", b"x"), ("k.txt", caption.encode())])
    assert isinstance(sample, Sample)
    assert sample.annotation.caption == caption


# Incomplete or invalid samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "reason", "named"),
    [
        (sample_members("k")[1:], "missing_image", "avif,image.*,img.*}; the key has"),
        ([*sample_members("k")[1:], ("k.heic", b"x")], "missing_image", "the key has k.txt, k.json, k.heic"),
        ([sample_members("k")[0], sample_members("k")[2]], "missing_caption", "k.{txt,caption,"),
        ([("k.jpg", b"x"), ("k.txt", b"\xff\xfe")], "undecodable_caption", "utf-8"),
        ([("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", b"{")], "undecodable_json", ""),
        ([("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", b"[1]")], "undecodable_json", "list"),
        ([("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", b"")], "undecodable_json", ""),
        ([("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", b"\xff\x00")], "undecodable_json", ""),
        ([("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", b"[" * 200_000)], "json_too_deep", "64 levels"),
        ([("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", b'{"a":' * 150_000)], "json_too_deep", "64 levels"),
        ([("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", b'{"a": ' + b"9" * 9999 + b"}")], "undecodable_json", "digit"),
        ([("k.jpg", b"x"), ("k.png", b"y"), ("k.txt", b"c")], "duplicate_member", "k.png"),
        ([("k.jpg", b"x"), ("k.txt", b"c"), ("k.TXT", b"d")], "duplicate_member", "k.TXT"),
    ],
)  # fmt: skip
def test_invalid_sample(tmp_path: Path, members: Members, reason: str, named: str) -> None:
    found = read(tmp_path, [*sample_members("before"), *members, *sample_members("zafter")])
    assert keys(found) == ["before", f"!{reason}:k", "zafter"]
    letter = found[1]
    assert isinstance(letter, DeadLetter)
    assert letter.stage == STAGE
    assert letter.shard == "00000"
    assert re.fullmatch("[0-9a-f]{32}", letter.uid)
    assert named in letter.message


def test_dead_letter_has_the_uid_of_the_pool_if_known(tmp_path: Path) -> None:
    _, text, data = sample_members("k", metadata={"uid": "cd" * 16})
    assert one_letter(read(tmp_path, [text, data])).uid == "cd" * 16


def test_repeated_key_is_read_once(tmp_path: Path) -> None:
    found = read(tmp_path, [*sample_members("k", seed=1), *sample_members("l"), *sample_members("k", seed=2)])
    assert keys(found) == ["k", "l", "!duplicate_key:k"]
    assert isinstance(found[0], Sample)
    assert found[0].image_bytes == jpeg(seed=1)


@pytest.mark.parametrize(
    ("bound", "extension", "reason"),
    [
        ("max_image_bytes", "jpg", "image_too_large"),
        ("max_caption_bytes", "txt", "caption_too_large"),
        ("max_json_bytes", "json", "metadata_too_large"),
    ],
)
def test_members_above_the_size_limits(tmp_path: Path, bound: str, extension: str, reason: str) -> None:
    content = {"jpg": b"x" * 40, "txt": b"c" * 40, "json": b'{"a": "' + b"b" * 31 + b'"}'}
    members = [(f"k.{name}", data) for name, data in content.items()]
    assert len(content[extension]) == 40
    assert keys(read(tmp_path, members, PoolSettings.model_validate({bound: 40}))) == ["k"]
    letter = one_letter(read(tmp_path, members, PoolSettings.model_validate({bound: 39})))
    assert letter.reason == reason
    assert "40" in letter.message
    assert "39" in letter.message


def test_an_oversize_member_is_not_read_into_memory(tmp_path: Path) -> None:
    big = 64 * 2**20
    path = tmp_path / "00000.tar"
    info = tarfile.TarInfo("k.jpg")
    info.size = big
    with path.open("wb") as file:  # a sparse file, which takes little disk space
        file.write(info.tobuf())
        file.seek(BLOCK + big)
        file.write(tar_bytes(sample_members("l")))
    tracemalloc.start()
    found = list(read_samples(Shard("00000", str(path), "f"), BOUNDS, STAGE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert keys(found) == ["!image_too_large:k", "l"]
    assert peak < 16 * 2**20


@pytest.mark.parametrize(
    "type_", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_not_followed(tmp_path: Path, type_: bytes) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    image, text, _ = sample_members("k")
    for linkname in ("before.txt", str(secret)):
        found = read(tmp_path, [*sample_members("before"), image, member("k.txt", type_, linkname)])
        assert keys(found) == ["before", "!unsupported_member:k"]
    found = read(tmp_path, [member("k.jpg", type_, "before.jpg"), text])
    assert keys(found) == ["!unsupported_member:k"]


@pytest.mark.parametrize("key", ["/abs/k", "../../k", "a/../../k", "./k", "C:\\k", "a/./b", "k\n", "\x1b[31mk"])
def test_names_are_not_used_as_paths(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "pool").mkdir()
    found = read(tmp_path / "pool", sample_members(key))
    assert keys(found) == [key]
    assert [p for p in sorted(tmp_path.rglob("*")) if "pool" not in p.parts] == before
    assert [p.name for p in (tmp_path / "pool").iterdir()] == ["00000.tar"]


def test_names_with_invalid_utf8_can_be_encoded(tmp_path: Path) -> None:
    raw = tar_bytes([("kXX.jpg", b"x"), ("kXX.txt", b"c")])
    broken = b""
    for start in range(0, len(raw), BLOCK):  # put invalid UTF-8 into the headers
        block = raw[start : start + BLOCK]
        if block[257:262] == b"ustar":
            block = block.replace(b"kXX", b"k\xff\xfe")
            checksum = sum(block[:148]) + sum(block[156:]) + 8 * 32
            block = block[:148] + b"%06o\0 " % checksum + block[156:]
        broken += block
    (sample,) = read_bytes(tmp_path, broken)
    assert isinstance(sample, Sample)
    sample.annotation.key.encode("utf-8")  # tables only hold valid text
    assert sample.annotation.key.startswith("k")


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names(tmp_path: Path, format_: int) -> None:
    key = "folder/" * 12 + "schön" * 6
    if format_ != tarfile.USTAR_FORMAT:
        key += "x" * 200
    assert keys(read_bytes(tmp_path, tar_bytes(sample_members(key), format_))) == [key]


# Damaged tars -----------------------------------------------------------------------------------------------------


def offsets(content: bytes) -> list[tuple[str, int, int, int]]:
    """(name, header, data, next header) of each member."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [
            (m.name, m.offset, m.offset_data, m.offset_data + -(-m.size // BLOCK) * BLOCK) for m in tar.getmembers()
        ]


def test_truncated_tar_yields_complete_samples_and_one_dead_letter(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    content = tar_bytes([m for name in names for m in sample_members(name)])
    members = offsets(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        ends = {m.name.split(".")[0]: m.offset_data + m.size for m in tar.getmembers()}
    end = members[-1][3]
    cuts = {0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, end - 1, end}
    for _, header, data, after in members:
        cuts |= {header, header + 1, header + 300, data, data + 1, after - 1, after - BLOCK, (data + after) // 2, after}
    for cut in sorted(cut for cut in cuts if cut <= end):
        found = read_bytes(tmp_path, content[:cut])
        # A sample is complete if its last byte is there. Padding after it may be missing.
        complete = [name for name in names if cut >= ends[name]]
        *samples, letter = found
        assert keys(samples) == complete, cut
        assert isinstance(letter, DeadLetter), cut
        assert (letter.shard, letter.key, letter.uid, letter.reason) == ("00000", "", "", "broken_tar"), cut
        named = int(letter.message.split("at byte ")[1].split(":")[0])
        assert named % BLOCK == 0, cut
        assert named <= cut, cut
        assert "not read" in letter.message


def test_sample_before_the_damage_is_read(tmp_path: Path) -> None:
    content = tar_bytes([*sample_members("a"), *sample_members("b"), *sample_members("c")])
    b_header = next(header for name, header, _, _ in offsets(content) if name == "b.jpg")
    found = read_bytes(tmp_path, content[: b_header + 700])
    assert keys(found) == ["a", "!broken_tar:"]


def test_one_zero_block_ends_a_tar(tmp_path: Path) -> None:
    content = tar_bytes(sample_members("a"))
    end = offsets(content)[-1][3]
    for zeros in (BLOCK, 2 * BLOCK):
        assert keys(read_bytes(tmp_path, content[:end] + bytes(zeros))) == ["a"]


@pytest.mark.parametrize("garbage", [b"\xff" * BLOCK, b"garbage!" * 64, os.urandom(BLOCK)])
def test_a_garbage_header_in_the_middle(tmp_path: Path, garbage: bytes) -> None:
    content = tar_bytes([*sample_members("a"), *sample_members("b"), *sample_members("c")])
    header = next(header for name, header, _, _ in offsets(content) if name == "c.jpg")
    found = read_bytes(tmp_path, content[:header] + garbage + content[header + BLOCK :])
    assert keys(found) in (["a", "b", "!broken_tar:"], ["a", "!broken_tar:"])
    letter = found[-1]
    assert isinstance(letter, DeadLetter)
    assert f"at byte {header}:" in letter.message


def test_a_tar_without_members(tmp_path: Path) -> None:
    assert read(tmp_path, []) == []


@pytest.mark.parametrize("content", [b"", b"x", b"not a tar" * 1000, b"\x1f\x8b" + os.urandom(2000), jpeg()])
def test_not_a_tar(tmp_path: Path, content: bytes) -> None:
    letter = one_letter(read_bytes(tmp_path, content))
    assert letter.reason == "broken_tar"
    assert "at byte 0:" in letter.message
    assert (letter.shard, letter.key, letter.uid) == ("00000", "", "")


def test_a_compressed_tar_is_not_unpacked_by_its_name(tmp_path: Path) -> None:
    assert one_letter(read_bytes(tmp_path, gzip.compress(tar_bytes(sample_members("a"))))).reason == "broken_tar"


@pytest.mark.usefixtures("waits")
def test_a_shard_that_cannot_be_opened(tmp_path: Path) -> None:
    folder = tmp_path / "folder.tar"
    folder.mkdir()
    for path in (tmp_path / "gone.tar", folder):
        with pytest.raises(OSError, match=path.name):  # it may pass: no dead letters, no table
            list(read_samples(Shard("x", str(path), "f"), BOUNDS, STAGE))


def failing_at(offset: int) -> Callable[[str], Any]:
    """Opens a tar on a disk that fails from that byte on."""

    class Disk(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= offset:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    return Disk


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("offset", [0, 10_240, 20_480])
def test_disk_error_within_a_tar_is_not_a_broken_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    (shard,) = write_pool(tmp_path, {"a.tar": [m for n in range(9) for m in sample_members(f"k{n}")]})
    monkeypatch.setattr(files, "open_binary", failing_at(offset))
    with pytest.raises(files.ReadFailed, match=rf"a\.tar: cannot be read at byte {offset}: Input/output error"):
        list(read_samples(shard, BOUNDS, STAGE))


def extended_headers(type_: bytes, content: bytes, times: int) -> bytes:
    """Headers that say something of the next member, which is again one."""
    info = tarfile.TarInfo("././@LongLink" if type_ == tarfile.GNUTYPE_LONGNAME else "pax")
    info.type, info.size = type_, len(content)
    return (info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK)) * times


def pax_record(keyword: str, value: str) -> bytes:
    length = len(keyword) + len(value.encode()) + 3
    while len(record := f"{length} {keyword}={value}\n".encode()) != length:
        length = len(record)
    return record


@pytest.mark.parametrize(
    "headers",
    [
        extended_headers(tarfile.XHDTYPE, pax_record("comment", "c"), 2000),
        extended_headers(tarfile.GNUTYPE_LONGNAME, b"name\0", 2000),
        extended_headers(tarfile.XHDTYPE, pax_record("GNU.sparse.map", "a,b"), 1),
        extended_headers(tarfile.XHDTYPE, pax_record("GNU.sparse.size", "x") + pax_record("GNU.sparse.offset", "y"), 1),
        extended_headers(tarfile.XHDTYPE, pax_record("hdrcharset", "BINARY") + b"99999999999999999999 path=a\n", 1),
        extended_headers(tarfile.XHDTYPE, pax_record("size", "-5000"), 1),
        extended_headers(tarfile.XHDTYPE, b"0 path=a\n", 1),
        extended_headers(tarfile.XHDTYPE, b"12 hdrcharset=\xff\n", 1),
        member("s", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT)[:482] + b"\1" + bytes(29),
    ],
    ids=["pax chain", "long-name chain", "sparse map", "sparse offset", "binary", "negative size", "zero", "charset",
         "sparse"],
)  # fmt: skip
def test_hostile_headers_end_in_a_dead_letter(tmp_path: Path, headers: bytes) -> None:
    good = tar_bytes([*sample_members("a"), *sample_members("b")])
    end = offsets(good)[-1][3]
    for tail in (tar_bytes(sample_members("z")), b""):
        found = read_bytes(tmp_path, good[:end] + headers + tail)
        assert keys(found)[0] == "a"
        assert all(isinstance(item, DeadLetter) for item in found[3:])
        if not tail:
            assert keys(found)[-1] == "!broken_tar:"


@pytest.mark.parametrize("type_", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_extended_headers_are_bounded(tmp_path: Path, type_: bytes) -> None:
    big = 64 * 2**20
    info = tarfile.TarInfo("h")
    info.type, info.size = type_, big
    path = tmp_path / "00000.tar"
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.seek(BLOCK + big)
        file.write(tar_bytes(sample_members("a")))
    tracemalloc.start()
    found = list(read_samples(Shard("00000", str(path), "f"), BOUNDS, STAGE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert keys(found) == ["!broken_tar:"]
    assert peak < 16 * 2**20


def before_the_end(content: bytes) -> bytes:
    """Return a tar without its end marker."""
    return content[: offsets(content)[-1][3]]


A, Z = (tar_bytes(sample_members(key)) for key in "az")


@pytest.mark.parametrize("name", ["k.bin", "k.jpg"])
@pytest.mark.parametrize("size_bytes", [10**6, 2**40, 2**62])
def test_member_that_claims_more_bytes_than_the_file_has_ends_the_tar_at_once(
    tmp_path: Path, name: str, size_bytes: int
) -> None:
    info = tarfile.TarInfo(name)
    info.size = size_bytes  # tarfile would search for the end block by block, for years
    found = read_bytes(tmp_path, before_the_end(A) + info.tobuf(tarfile.GNU_FORMAT) + b"x" * 999)
    assert keys(found) == ["a", "!broken_tar:"]


def test_extended_header_of_digits_is_refused_at_once(tmp_path: Path) -> None:
    digits = extended_headers(tarfile.XHDTYPE, b"1" * 2**20, 1)  # CVE-2024-6232: quadratic in tarfile
    assert keys(read_bytes(tmp_path, before_the_end(A) + digits + Z)) == ["a", "!broken_tar:"]


def test_second_of_two_concatenated_tars_is_not_lost_silently(tmp_path: Path) -> None:
    found = read_bytes(tmp_path, A + Z)
    assert keys(found) == ["a", "!broken_tar:"]
    assert isinstance(found[-1], DeadLetter)
    assert "the tar ends here, but more data follows" in found[-1].message


@pytest.mark.parametrize("version", ["gnu", "gnu with a long map", "0.0", "0.1", "1.0"])
def test_sparse_member_affects_only_its_own_sample(tmp_path: Path, version: str) -> None:
    pax = {
        "0.0": pax_record("GNU.sparse.size", "9") + pax_record("GNU.sparse.offset", "0"),
        "0.1": pax_record("GNU.sparse.map", "0,9"),
        "1.0": pax_record("GNU.sparse.major", "1") + pax_record("GNU.sparse.name", "k.jpg"),
    }.get(version)
    image, text, _ = sample_members("k")
    if pax:
        sparse = extended_headers(tarfile.XHDTYPE, pax, 1) + before_the_end(tar_bytes([image]))
    else:
        block = bytearray(before_the_end(tar_bytes([image])))
        block[156:157] = tarfile.GNUTYPE_SPARSE
        maps = b""
        if version != "gnu":
            block[482], maps = 1, (bytes(504) + b"\1" + bytes(7)) * 3 + bytes(BLOCK)
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:BLOCK]) + 8 * 32)
        sparse = bytes(block[:BLOCK]) + maps + bytes(block[BLOCK:])
    found = read_bytes(tmp_path, before_the_end(A) + sparse + before_the_end(tar_bytes([text])) + Z)
    assert keys(found) == ["a", "!unsupported_member:k", "z"]


def test_extended_header_sets_name_and_size(tmp_path: Path) -> None:
    image, text, _ = sample_members("long/k")
    content = b"".join(
        extended_headers(tarfile.XHDTYPE, pax_record("path", name) + pax_record("size", str(len(data))), 1)
        + before_the_end(tar_bytes([("short", data)]))
        for name, data in (image, text)
    )
    (sample, _) = read_bytes(tmp_path, content + Z)
    assert isinstance(sample, Sample)
    assert sample.annotation.key == "long/k" and sample.image_bytes == image[1]


def test_global_header_does_not_change_samples(tmp_path: Path) -> None:
    header = extended_headers(tarfile.XGLTYPE, pax_record("path", "x.jpg") + pax_record("size", "7"), 1)
    assert keys(read_bytes(tmp_path, header + A)) == ["a"]


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_key_is_shortened(tmp_path: Path, format_: int) -> None:
    long, other = "k" * 5000, "k" * 4999
    members = [*sample_members(long)[:2], *sample_members(other)[:2], *sample_members("l")]
    found = read_bytes(tmp_path, tar_bytes(members, format_))
    assert [item.reason if isinstance(item, DeadLetter) else "" for item in found] == ["key_too_long"] * 2 + [""]
    shown = [item.key for item in found[:2] if isinstance(item, DeadLetter)]
    assert len(set(shown)) == 2  # distinct keys stay distinct
    assert all(BOUNDS.max_key_characters < len(key) <= BOUNDS.max_key_characters + 1 for key in shown)
    longest = "k" * BOUNDS.max_key_characters
    assert keys(read_bytes(tmp_path, tar_bytes(sample_members(longest), format_))) == [longest]


def test_tar_limits(tmp_path: Path) -> None:
    content = tar_bytes([*sample_members("a"), *sample_members("b")])
    for bounds, expected in (
        (PoolSettings(max_tar_members=6, max_tar_bytes=len(content)), ["a", "b"]),
        (PoolSettings(max_tar_members=5), ["a", "!tar_too_large:"]),
        (PoolSettings(max_tar_members=3), ["a", "!tar_too_large:"]),
        (PoolSettings(max_tar_bytes=len(content) - 1), None),
    ):
        found = keys(read_bytes(tmp_path, content, bounds))
        assert found == expected if expected else found[-1] == "!tar_too_large:"


def test_json_depth_limit(tmp_path: Path) -> None:
    def outcome(content: str, max_depth: int) -> str:
        members = [("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", content.encode())]
        return keys(read(tmp_path, members, PoolSettings(max_json_depth=max_depth)))[0]

    nested = '{"a": [{"b": [' + '"x"' + "]}]}"
    assert outcome(nested, 4) == "k"
    assert outcome(nested, 3) == "!json_too_deep:k"
    for flat in ('{"a": "[[[[{{{{"}', r'{"a": "\\\"[[[[", "b": [1, [2]]}', '{"a": [[], [], [], []]}', '{"a": "[[[['):
        assert outcome(flat, 3) in ("k", "!undecodable_json:k")


def test_json_depth_limit_does_not_depend_on_the_call_stack(tmp_path: Path) -> None:
    members = [("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", b'{"a":' + b"[" * 400 + b"]" * 400 + b"}")]

    def at_depth(frames: int) -> list[str]:
        return at_depth(frames - 1) if frames else keys(read(tmp_path, members, PoolSettings(max_json_depth=401)))

    assert at_depth(0) == at_depth(300) == ["k"]


def test_random_damage_raises_no_exception(tmp_path: Path) -> None:
    """No sample is returned twice, and every key is valid text."""
    members = [m for index in range(4) for m in sample_members(f"k{index}", f"caption {index}", seed=index)]
    rng = random.Random(0)
    for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        long = [(name.replace("k", "kö" * 60, 1), content) for name, content in members]
        for original in (tar_bytes(members, format_), tar_bytes(long if format_ else members, format_)):
            headers = [header for _, header, _, _ in offsets(original)]
            for _ in range(60):
                damaged = bytearray(original)
                for _ in range(rng.choice([1, 1, 3, 10])):
                    start = rng.choice(headers)
                    place = start + rng.randrange(BLOCK)
                    damaged[place] = rng.choice([0, 0x80, 0xFF, ord("7"), rng.randrange(256)])
                    block = damaged[start : start + BLOCK]
                    if rng.random() < 0.7:  # with a valid checksum, so that the damage is not detected by it
                        checksum = sum(block[:148]) + sum(block[156:]) + 8 * 32
                        damaged[start + 148 : start + 156] = b"%06o\0 " % checksum
                found = read_bytes(tmp_path, bytes(damaged))
                samples = [item.annotation.key for item in found if isinstance(item, Sample)]
                assert len(samples) == len(set(samples))
                for item in found:
                    (item.annotation.key if isinstance(item, Sample) else item.key).encode("utf-8")


def test_reading_twice_gives_the_same(tmp_path: Path) -> None:
    content = tar_bytes([*sample_members("a"), ("b.jpg", b"x"), *sample_members("c")])
    for cut in (len(content), 3000):
        assert read_bytes(tmp_path, content[:cut]) == read_bytes(tmp_path, content[:cut])


def test_messages_are_bounded(tmp_path: Path) -> None:
    key = "k" * 3000
    found = read_bytes(tmp_path, tar_bytes([(f"{key}.jpg", b"x")], tarfile.PAX_FORMAT))
    assert len(one_letter(found).message) <= 500
