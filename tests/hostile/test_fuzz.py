"""Fuzz tests of everything that reads a pool: only declared exceptions, no hangs, and no lost samples.

By default these tests try a few inputs, the same ones each time. `make fuzz` tries more, and different ones each time.
"""

from __future__ import annotations

import faulthandler
import io
import json
import math
import os
import random
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.decoding.images import UndecodableImage, decode
from pipeline.report.printable import printable
from pipeline.sources.webdataset import read_samples
from tests.helpers import encode, picture, sample_members, tar_bytes
from tests.hostile import malformed
from transforms.core.plain_text import plain_text
from transforms.core.recipe import PoolSettings
from transforms.core.records import DeadLetter, Sample, Shard
from transforms.single_modality import language, pos_pattern
from transforms.single_modality.captions import caption_key, caption_length
from transforms.single_modality.faces import boxes_from_metadata, union_area
from transforms.single_modality.image_shape import original_size_px
from transforms.single_modality.pos_pattern import PENN_TAGS

LONG = "FUZZ_EXAMPLES" in os.environ
HANGS_S = 60  # for one input, generous because the machine may be busy
TABLE = "table"  # conftest.py prints what tests record under this name
BOUNDS = PoolSettings(max_image_bytes=50_000, max_tar_members=500, max_json_bytes=20_000)
TAR_REASONS = {"broken_tar", "tar_too_large"}
SAMPLE_REASONS = {
    "missing_image", "missing_caption", "undecodable_caption", "undecodable_json", "json_too_deep", "key_too_long",
    "duplicate_member", "duplicate_key", "unsupported_member", "image_too_large", "caption_too_large",
    "metadata_too_large", "json_too_many_values", "too_many_captions", "broken_tar",
}  # fmt: skip

Check = Callable[[Any], None]


def tries(strategy: st.SearchStrategy[Any], short: int, check: Check, record_property: Any, what: str) -> None:
    """Run `check` on many values. If one hangs, the process exits with a traceback."""
    tried = Counter[str]()

    @settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", short)),
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def one(value: Any) -> None:
        tried["inputs"] += 1
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        check(value)

    try:
        one()
    finally:
        faulthandler.cancel_dump_traceback_later()
    record_property(TABLE, f"fuzz, {what}: {tried['inputs']:,} inputs")


# Tars -------------------------------------------------------------------------------------------------------------


def _sound_tars() -> list[bytes]:
    """Return small tars of every format, with long names and with every kind of header in the corpus."""
    members = [member for n in range(3) for member in sample_members(f"k{n}", f"caption {n}", seed=n)]
    small = [(name, content if name.endswith("txt") else content[:40]) for name, content in members]
    long = [(f"{'ö' * 70}/{name}", content) for name, content in small]
    tars = [tar_bytes(small, format_) for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    tars += [tar_bytes(long, format_) for format_ in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    odd = [malformed.KINDS[kind] for kind in ("sparse member", "odd headers", "symbolic link", "name with NUL")]
    for index in range(8):
        parts = (make(random.Random(f"{index}"), f"k{n}")[0] for n, make in enumerate(odd))
        tars.append(b"".join(parts)[:60_000] + bytes(1024))
    return tars


SOUND_TARS = _sound_tars()
SIZES = [0, 1, 511, 512, 513, 2**31, 2**33 - 1, 2**40, 2**62, -1, -512]


@st.composite
def mutated_tars(draw: st.DrawFn) -> bytes:
    """Concatenated valid tars with a few changed bytes, cuts, splices, and headers with changed fields or checksums."""
    tars = draw(st.lists(st.sampled_from(SOUND_TARS), min_size=1, max_size=3))
    content = bytearray(
        b"".join(tar.rstrip(b"\0").ljust(-(-len(tar.rstrip(b"\0")) // 512) * 512, b"\0") for tar in tars)
    )
    content += bytes(1024)
    for _ in range(draw(st.integers(1, 6))):
        block = draw(st.integers(0, max(0, len(content) // 512 - 1))) * 512
        match draw(st.integers(0, 7)):
            case 0:
                at = draw(st.integers(0, max(0, len(content) - 1)))
                content[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del content[draw(st.integers(0, len(content))) :]
            case 2:
                del content[block : block + 512 * draw(st.integers(1, 9))]
            case 3:
                other = draw(st.sampled_from(SOUND_TARS))
                start = draw(st.integers(0, len(other) // 512)) * 512
                content[block:block] = other[start : start + 512 * draw(st.integers(1, 9))]
            case 4:
                content[block:block] = draw(st.binary(max_size=1100))
            case 5:
                at = block + draw(st.integers(0, 511))
                content[at : at + 12] = draw(st.binary(max_size=12))
            case 6:
                info = tarfile.TarInfo(draw(st.sampled_from(["k.jpg", "k1.txt", "x", "././@LongLink", "a/"])))
                info.size = draw(st.sampled_from(SIZES))
                info.type = bytes([draw(st.sampled_from(b"0\x001234567gxXSLKZ"))])
                content[block:block] = info.tobuf(tarfile.GNU_FORMAT)
            case 7:
                keyword = draw(st.sampled_from(["path", "size", "GNU.sparse.major", "GNU.sparse.map", "hdrcharset"]))
                content[block:block] = malformed.pax_entry(malformed.pax_record(keyword, draw(st.binary(max_size=30))))
        if draw(st.booleans()) and content[block : block + 512]:  # so that the checksum does not reveal the damage
            content[block : block + 512] = malformed.with_checksum(
                bytes(content[block : block + 512]).ljust(512, b"\0")
            )
    return bytes(content)


@st.composite
def built_tars(draw: st.DrawFn) -> bytes:
    """Headers with valid checksums in random order, most of which do not match their content."""
    content = b""
    for _ in range(draw(st.integers(1, 10))):
        match draw(st.integers(0, 5)):
            case 0 | 1:
                key = draw(st.sampled_from(["k0", "k1", "k1.v2", "../k2"]))
                content += b"".join(malformed.entry(*member) for member in sample_members(key)[1:])
                content += malformed.entry(f"{key}.jpg", draw(st.binary(max_size=600)))
            case 2 | 3:
                name = draw(st.sampled_from(["k0.jpg", "k1.txt", "k2.json", "x", "././@LongLink", "a/", ".", ""]))
                type_ = draw(st.sampled_from([tarfile.REGTYPE, *(bytes([one]) for one in b"\x001234567gxXSLKZ")]))
                data = draw(st.binary(max_size=600))
                info = tarfile.TarInfo(name)
                info.type, info.size = type_, draw(st.sampled_from([len(data), *SIZES]))
                content += info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)
            case 4:
                keyword = draw(st.sampled_from(["path", "size", "GNU.sparse.major", "GNU.sparse.name", "hdrcharset"]))
                value = draw(
                    st.binary(max_size=30) | st.sampled_from([b"k3.jpg", *(str(size).encode() for size in SIZES)])
                )
                content += malformed.pax_entry(
                    malformed.pax_record(keyword, value), draw(st.sampled_from([b"x", b"g"]))
                )
            case 5:
                content += bytes(512 * draw(st.integers(0, 2)))
    return content + bytes(draw(st.sampled_from([0, 512, 1024])))


def check_tar(folder: Path) -> Check:
    path = folder / "a.tar"
    shard = Shard("a", str(path), "f")

    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = list(read_samples(shard, BOUNDS, "stage"))
        assert found == list(read_samples(shard, BOUNDS, "stage"))
        keys = [item.annotation.key if isinstance(item, Sample) else item.key for item in found]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        for index, item in enumerate(found):
            keys[index].encode("utf-8")
            if isinstance(item, Sample):
                assert first[keys[index]] == index  # a repeated key is not a sample
                assert item.image_bytes in content and item.annotation.caption.encode() in content
                assert len(item.image_bytes) <= BOUNDS.max_image_bytes and len(keys[index]) <= BOUNDS.max_key_characters
            else:
                check_letter(item, is_last=index == len(found) - 1)
        if not found:
            assert not has_a_sample(content)

    return check


def check_letter(letter: DeadLetter, is_last: bool) -> None:
    if letter.key or letter.uid:
        assert letter.reason in SAMPLE_REASONS
        assert (letter.uid == "") == (letter.reason == "duplicate_key")
    else:
        assert letter.reason in TAR_REASONS | {"missing_image", "missing_caption"} and is_last
    assert 0 < len(letter.message) <= 500


def has_a_sample(content: bytes) -> bool:
    """Return whether a reader without any checks finds an image at the start of the tar."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            member = tar.next()
            return member is not None and member.isreg() and member.name in ("k0.jpg", "k.jpg")
    except (tarfile.TarError, EOFError, ValueError, OverflowError):
        return False


def test_mutated_tars(tmp_path: Path, record_property: Any) -> None:
    tries(mutated_tars(), 400, check_tar(tmp_path), record_property, "mutated tars")


def test_built_tars(tmp_path: Path, record_property: Any) -> None:
    tries(built_tars(), 400, check_tar(tmp_path), record_property, "tars of valid headers")


def test_random_bytes_as_a_tar(tmp_path: Path, record_property: Any) -> None:
    tries(st.binary(max_size=3_000), 100, check_tar(tmp_path), record_property, "random bytes as tars")


# Metadata ---------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**400, -1, 2**63]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=9), inner, max_size=6),
    max_leaves=20,
)
NAMES = st.sampled_from(["uid", "original_width", "original_height", "face_bboxes", "width"])


def as_file(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def check_metadata(folder: Path) -> Check:
    path = folder / "a.tar"

    def check(content: bytes) -> None:
        path.write_bytes(tar_bytes([("k.jpg", b"x"), ("k.txt", b"c"), ("k.json", content)]))
        (item,) = read_samples(Shard("a", str(path), "f"), BOUNDS, "stage")
        if isinstance(item, DeadLetter):
            assert item.reason in ("undecodable_json", "json_too_deep", "metadata_too_large")
            return
        int(item.annotation.uid, 16)
        assert len(item.annotation.uid) == 32
        width, height = original_size_px(item.metadata, (100, 50)) or (100, 50)
        assert 0 < width < 2**31 and 0 < height < 2**31
        boxes = boxes_from_metadata(item.metadata.get("face_bboxes"))
        assert boxes is None or 0.0 <= union_area(boxes) <= 1.0

    return check


def test_metadata(tmp_path: Path, record_property: Any) -> None:
    files = st.one_of(
        st.binary(max_size=200),
        VALUES.map(as_file),
        st.dictionaries(NAMES, VALUES, min_size=1).map(as_file),
        st.text(alphabet='[]{}",:\\u0 1eE-+.ntf', max_size=300).map(str.encode),
    )
    tries(files, 200, check_metadata(tmp_path), record_property, "metadata")


# Captions ---------------------------------------------------------------------------------------------------------

_ODD = "\0\t\n\r\x1b\x7f\x85\xa0\xad\u200b\u200d\u200f\u202e\u2028\u2066\u3000\ufeff\ufffe\U000e0001\ud800\udfff"
CAPTIONS = st.one_of(
    st.text(max_size=200),
    st.text(alphabet=st.characters(exclude_categories=()), max_size=200),  # with surrogates
    st.text(alphabet=st.sampled_from(_ODD + "aé中א"), max_size=200),
    st.tuples(st.text(min_size=1, max_size=4), st.integers(1, 4_000)).map(lambda pair: pair[0] * pair[1]),
    st.lists(
        st.sampled_from(["dog", "Dr.", "can't", "gimme", "''", "``", "--", "...", "$5", "a@b", "(", "\u201c"])
    ).map(" ".join),
)


@pytest.fixture(scope="module")
def check_caption() -> Check:
    detector, (tagger, _) = language.load_detector(), pos_pattern.load_tagger("bundled")

    def check(caption: str) -> None:
        caption = caption[:16_384]
        words, characters = caption_length(caption)
        assert 0 <= words <= characters == len(plain_text(caption))
        assert len(caption_key(caption)) == 32
        name, probability = language.detect(detector, caption)
        assert name.isascii() and 0.0 <= probability <= 1.01 and math.isfinite(probability)
        tags = pos_pattern.tag_caption(tagger, caption, 64)
        assert set(tags.split()) <= PENN_TAGS and len(tags.split()) <= 64
        pos_pattern.keeps(tags)
        shown = printable(caption)
        assert shown.isprintable() and (shown == caption) == caption.isprintable()

    return check


def test_captions(check_caption: Check, record_property: Any) -> None:
    tries(CAPTIONS, 300, check_caption, record_property, "captions")


# Images -----------------------------------------------------------------------------------------------------------

FILES: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("GIF", {}),
    ("BMP", {}), ("AVIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_deflate"}),
    ("TIFF", {"compression": "jpeg"}),
]  # fmt: skip
IMAGES = [encode(picture(40, 30, seed), format_, **options) for seed, (format_, options) in enumerate(FILES)]
IMAGES += [encode(picture(40, 30).convert(mode), "PNG") for mode in ("P", "LA", "1")]


@st.composite
def mutated_images(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from(IMAGES)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.integers(0, 4)):
            case 0:
                content[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                content[at : at + 4] = struct.pack(">I", draw(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1])))
            case 2:
                del content[at:]
            case 3:
                other = draw(st.sampled_from(IMAGES))
                start = draw(st.integers(0, len(other) - 1))
                content[at:at] = other[start : start + draw(st.integers(1, 400))]
            case 4:
                del content[at : at + draw(st.integers(1, 30))]
    if draw(st.booleans()):
        _fix_png_checksums(content)
    return bytes(content)


def _fix_png_checksums(content: bytearray) -> None:
    """Give every chunk of a PNG a valid checksum, so that the checksum does not reveal the damage."""
    at = 8
    while content[:4] == b"\x89PNG" and at + 12 <= len(content):
        end = at + 8 + struct.unpack_from(">I", content, at)[0]
        if end + 4 > len(content):
            return
        struct.pack_into(">I", content, end, zlib.crc32(content[at + 4 : end]))
        at = end + 4


def check_image(content: bytes) -> None:
    for draft in (None, 16):
        try:
            pixels, (width, height) = decode(content, 100_000, draft)
        except UndecodableImage:  # the one declared error
            continue
        assert 0 < width * height <= 100_000
        assert pixels.shape[2:] == (3,) and pixels.dtype.name == "uint8" and pixels.size > 0


def test_images(record_property: Any) -> None:
    tries(mutated_images(), 300, check_image, record_property, "mutated images")
