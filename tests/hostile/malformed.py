"""A corpus of hostile samples and tars, generated from seeds, with the allowed outcomes of each.

Each kind of sample is a function below. It takes a random generator and a key, and returns the tar members and, by key,
the allowed outcomes in tar order: `JUDGED` (kept, or dropped by a rule) or the reason of a dead letter.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers import encode, jpeg, picture, tar_bytes

JUDGED = "judged"
BLOCK = 512
CANARY = "/tmp/pairsift-canary"  # a file that must never be created
SETTINGS = {
    "max_image_bytes": 300_000,
    "max_image_pixels": 4_000_000,
    "max_json_bytes": 100_000,
    "max_tar_members": 2_000,
}
"""Low limits, so that inputs above them are small."""

Outcomes = dict[str, list[set[str]]]
Make = Callable[[random.Random, str], tuple[bytes, Outcomes]]


@dataclasses.dataclass(frozen=True)
class Malformed:
    """Tar members as bytes, and their allowed outcomes by key."""

    kind: str
    members: bytes
    outcomes: Outcomes


@dataclasses.dataclass(frozen=True)
class MalformedTar:
    """A damaged tar, with the keys of the valid samples before the damage and the reason of its dead letter."""

    kind: str
    content: bytes
    sound_keys: tuple[str, ...]
    reason: str | None


# Tars and members -------------------------------------------------------------------------------------------------


def entry(name: str, content: bytes = b"", format_: Any = tarfile.GNU_FORMAT, **fields: Any) -> bytes:
    """Return a tar header, its content, and padding."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(format_, "utf-8", "surrogateescape") + content + bytes(-len(content) % BLOCK)


def pax_entry(records: bytes, type_: bytes = tarfile.XHDTYPE) -> bytes:
    """Return an extended header."""
    return entry("pax", records, type=type_)


def pax_record(keyword: str, value: bytes) -> bytes:
    """Return one record of an extended header."""
    body = f" {keyword}=".encode() + value + b"\n"
    length = len(body) + 1
    while len(record := str(length).encode() + body) != length:
        length = len(record)
    return record


def with_checksum(header: bytes) -> bytes:
    """Return the header with a valid checksum."""
    checksum = sum(header[:148]) + sum(header[156:BLOCK]) + 8 * 32
    return header[:148] + b"%06o\0 " % checksum + header[156:]


def caption_of(rng: random.Random) -> str:
    words = "a dog red bench old tree house boat green hill near small child with white bird".split()
    return f"a photo of {' '.join(rng.choices(words, k=6))}"


def photo(rng: random.Random, width: int = 240, height: int = 210) -> bytes:
    return jpeg(width, height, seed=rng.randrange(2**32))


def sound_members(rng: random.Random, key: str) -> bytes:
    """Return the members of a complete and valid sample."""
    return (
        entry(f"{key}.jpg", photo(rng))
        + entry(f"{key}.txt", caption_of(rng).encode())
        + entry(f"{key}.json", json.dumps({"width": 240, "height": 210}).encode())
    )


def of_image(make: Callable[[random.Random], bytes], *outcomes: str, extension: str = "jpg") -> Make:
    """Define a kind with an invalid or unusual image."""

    def members(rng: random.Random, key: str) -> tuple[bytes, Outcomes]:
        image, text = entry(f"{key}.{extension}", make(rng)), entry(f"{key}.txt", caption_of(rng).encode())
        return image + text, {key: [set(outcomes)]}

    return members


def of_caption(make: Callable[[random.Random], bytes], *outcomes: str) -> Make:
    """Define a kind with an invalid or unusual caption."""

    def members(rng: random.Random, key: str) -> tuple[bytes, Outcomes]:
        return entry(f"{key}.jpg", photo(rng)) + entry(f"{key}.txt", make(rng)), {key: [set(outcomes)]}

    return members


def of_json(make: Callable[[random.Random], bytes], *outcomes: str) -> Make:
    """Define a kind with invalid or unusual metadata."""

    def members(rng: random.Random, key: str) -> tuple[bytes, Outcomes]:
        files = entry(f"{key}.jpg", photo(rng)) + entry(f"{key}.txt", caption_of(rng).encode())
        return files + entry(f"{key}.json", make(rng)), {key: [set(outcomes)]}

    return members


def of_members(make: Callable[[random.Random, str], bytes], *outcomes: str) -> Make:
    """Define a kind by the members that one key has in the tar."""
    return lambda rng, key: (make(rng, key), {key: [{outcome} for outcome in outcomes]})


def of_name(
    name: Callable[[str], str], shown: Callable[[str], str], outcome: str, format_: Any = tarfile.GNU_FORMAT
) -> Make:
    """Define a kind by its member names; `shown` returns the key in tables and dead letters."""

    def members(rng: random.Random, key: str) -> tuple[bytes, Outcomes]:
        image = entry(f"{name(key)}.jpg", photo(rng), format_)
        return image + entry(f"{name(key)}.txt", caption_of(rng).encode(), format_), {shown(key): [{outcome}]}

    return members


# Images -----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png(width: int, height: int, *more: bytes, rows: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def cut_jpeg(rng: random.Random) -> bytes:
    """Return a JPEG cut inside a marker or inside its data."""
    content = photo(rng)
    markers = [at for at in range(2, len(content) - 1) if content[at] == 0xFF and content[at + 1] not in (0, 0xD9)]
    return content[: rng.choice(markers) + rng.randrange(2)]


def cut_png(rng: random.Random) -> bytes:
    content = encode(picture(60, 60, rng.randrange(99)), "PNG")
    return content[: rng.choice([4, 8, 12, 16, 30, 33, 37, 41, len(content) // 2, len(content) - 20])]


def cut_webp(rng: random.Random) -> bytes:
    content = encode(picture(60, 60, rng.randrange(99)), "WEBP")
    return content[: rng.choice([4, 8, 12, 16, 20, 25, 30, len(content) // 2, len(content) - 5])]


def png_wrong_crc(rng: random.Random) -> bytes:
    content = bytearray(encode(picture(60, 60, rng.randrange(99)), "PNG"))
    content[29 + rng.randrange(4)] ^= 1 + rng.randrange(255)  # of IHDR
    return bytes(content)


def turned_and_transparent(rng: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(300)
    return encode(picture().convert(rng.choice(["RGBA", "LA"])), "PNG", exif=exif)


def other_format(rng: random.Random) -> bytes:
    return encode(picture(), rng.choice(["ICO", "PPM", "TGA", "JPEG2000", "DDS"]))


def png_as_jpg(rng: random.Random) -> bytes:
    return encode(picture(230, 220, rng.randrange(2**32)), rng.choice(["PNG", "WEBP"]))


def animated(rng: random.Random) -> bytes:
    frames = [picture(230, 220, rng.randrange(2**32)) for _ in range(3)]
    return encode(frames[0], rng.choice(["WEBP", "PNG"]), save_all=True, append_images=frames[1:], duration=50)


def no_pixels(rng: random.Random) -> bytes:
    width, height = rng.choice([(0, 0), (0, 9), (9, 0)])
    return png(width, height)


def a_line(rng: random.Random) -> bytes:
    width = 60_000
    row = bytes([0]) + rng.randbytes(3) * width
    return png(width, 1, rows=row) if rng.random() < 0.5 else png(1, width, rows=row[:4] * width)


def png_huge(rng: random.Random) -> bytes:
    return png(*rng.choice([(20_000, 20_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (2_001, 2_000)]))


def jpeg_huge(rng: random.Random) -> bytes:
    content = bytearray(photo(rng))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", *rng.choice([(65_500, 65_500), (65_500, 400), (3_000, 3_000)]))
    return bytes(content)


def webp_huge(rng: random.Random) -> bytes:
    content = bytearray(encode(picture(60, 60, rng.randrange(99)), "WEBP"))
    at = content.index(b"VP8 ") + 14
    content[at : at + 4] = struct.pack("<HH", 16_383, 16_383)
    return bytes(content)


def other_colours(rng: random.Random) -> bytes:
    mode, format_ = rng.choice(
        [("CMYK", "JPEG"), ("L", "JPEG"), ("1", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")]
    )
    return encode(picture(230, 220, rng.randrange(2**32)).convert(mode), format_)


def sixteen_bits(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return png(220, 210, rows=b"".join(b"\0" + rng.randbytes(220 * 6) for _ in range(210)), depth=16)
    grey = np.random.default_rng(rng.randrange(2**32)).integers(0, 2**16, (210, 220)).astype(np.uint16)
    return encode(Image.fromarray(grey), "PNG")


def with_segment(content: bytes, marker: int, data: bytes) -> bytes:
    """Return a JPEG with an additional segment after its start."""
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + content[2:]


def exif_bomb(rng: random.Random) -> bytes:
    """EXIF directories that point to themselves, and entries that claim four gigabytes."""
    entries = b"".join(
        struct.pack(
            "<HHII",
            tag,
            rng.choice([2, 3, 4, 5, 7, 65_535]),
            rng.choice([1, 2**31, 2**32 - 1]),
            rng.choice([8, 0, 2**32 - 1]),
        )
        for tag in (0x0112, 0x011A, 0x0128, 0x8769, 0x8825, 0xA005)
    )
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 6) + entries + struct.pack("<I", 8)
    return with_segment(photo(rng), 0xE1, b"Exif\0\0" + tiff)


def icc_garbage(rng: random.Random) -> bytes:
    return with_segment(photo(rng), 0xE2, b"ICC_PROFILE\0" + rng.randbytes(3_000))


def icc_bomb(rng: random.Random) -> bytes:
    bomb = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(20_000_000)))
    return png(220, 210, bomb, rows=(b"\0" + rng.randbytes(660)) * 210)


def text_bomb(rng: random.Random) -> bytes:
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(20_000_000)))
    return png(220, 210, *[bomb] * rng.randrange(1, 6), rows=(b"\0" + rng.randbytes(660)) * 210)


def many_scans(rng: random.Random) -> bytes:
    """A progressive JPEG whose last scan, a few bytes, is repeated many times."""
    side = 1_900
    content = encode(Image.new("RGB", (side, side), tuple(rng.randbytes(3))), "JPEG", progressive=True, quality=20)
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * 200 + content[-2:]


def flipped_bits(rng: random.Random) -> bytes:
    content = bytearray(rng.choice([photo(rng), encode(picture(90, 90), "PNG"), encode(picture(90, 90), "WEBP")]))
    for _ in range(rng.choice([1, 5, 50])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


# Captions and metadata --------------------------------------------------------------------------------------------


def utf16(rng: random.Random) -> bytes:
    return caption_of(rng).encode("utf-16")


def zalgo(rng: random.Random) -> bytes:
    return "".join(c + "".join(chr(rng.randrange(0x300, 0x370)) for _ in range(40)) for c in caption_of(rng)).encode()


def mixed_scripts(rng: random.Random) -> bytes:
    starts = (0x41, 0x391, 0x430, 0x5D0, 0x627, 0x915, 0xE01, 0x4E00, 0xAC00, 0x1F600, 0x1D400, 0x2028, 0xFFF0, 0xE000)
    return "".join(chr(rng.choice(starts) + rng.randrange(14)) for _ in range(200)).encode()


def deep_json(rng: random.Random) -> bytes:
    depth = rng.choice([65, 900, 5_000, 40_000])
    return (
        (b'{"a":' * depth + b"1" + b"}" * depth)
        if rng.random() < 0.5
        else (b'{"a":' + b"[" * depth + b"]" * depth + b"}")
    )


def odd_values(rng: random.Random) -> bytes:
    """Valid JSON with unexpected values."""
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        1e308,
        float("nan"),
        float("inf"),
        10**300,
        "\ud800",
        "9" * 9_999,
        [],
        [[]],
        {"a": {}},
    ]
    names = ("uid", "width", "height", "original_width", "original_height", "face_bboxes", "sha256", "caption")
    return json.dumps({name: rng.choice(odd) for name in names}).encode()


def odd_boxes(rng: random.Random) -> bytes:
    boxes = rng.choice(
        [[[0, 0, 1, 1]] * 5_000, [[float("nan")] * 4], [[0, 0, 1]], [[-1e9, 0, 1e9, 1]], [["0"] * 4], [10**400]]
    )
    return json.dumps({"face_bboxes": boxes}).encode()


# Members ----------------------------------------------------------------------------------------------------------


def stray(type_: bytes) -> Make:
    """Define a kind in which a member that is not a file replaces one of the sample's files."""

    def make(rng: random.Random, key: str) -> bytes:
        linkname = rng.choice(["/etc/passwd", "../../../../etc/passwd", f"{key}.jpg", key, ""])
        image, text = entry(f"{key}.jpg", photo(rng)), entry(f"{key}.txt", b"a dog on a red bench")
        odd = {name: entry(f"{key}.{name}", type=type_, linkname=linkname) for name in ("jpg", "txt")}
        return odd["jpg"] + text if rng.random() < 0.5 else image + odd["txt"]

    return of_members(make, "unsupported_member")


def interleaved(rng: random.Random, key: str) -> tuple[bytes, Outcomes]:
    members = [
        entry(f"{key}{which}.{name}", photo(rng) if name == "jpg" else b"a dog on a bench")
        for name in ("jpg", "txt")
        for which in "ab"
    ]
    return b"".join(members), {f"{key}{which}": [{JUDGED}] for which in "ab"}


def again(rng: random.Random, key: str) -> tuple[bytes, Outcomes]:
    members = sound_members(rng, key) + entry(f"{key}x.txt", b"between them") + sound_members(rng, key)
    return members, {key: [{JUDGED}, {"duplicate_key"}], f"{key}x": [{"missing_image"}]}


def uid_again(rng: random.Random, key: str) -> tuple[bytes, Outcomes]:
    data = json.dumps({"uid": f"{rng.getrandbits(128):032x}"}).encode()
    members = b"".join(
        sound_members(rng, f"{key}{which}")[: -2 * BLOCK] + entry(f"{key}{which}.json", data) for which in "ab"
    )
    return members, {f"{key}a": [{"repeated_uid"}], f"{key}b": [{"repeated_uid"}]}  # two pairs: neither owns it


def sparse(rng: random.Random, key: str) -> bytes:
    text, data = entry(f"{key}.txt", b"a dog on a red bench"), photo(rng)
    marks = {
        "0.0": pax_record("GNU.sparse.size", b"9")
        + pax_record("GNU.sparse.offset", b"0")
        + pax_record("GNU.sparse.numbytes", b"9"),
        "0.1": pax_record("GNU.sparse.map", b"0,9") + pax_record("GNU.sparse.size", b"9"),
        "1.0": pax_record("GNU.sparse.major", b"1")
        + pax_record("GNU.sparse.minor", b"0")
        + pax_record("GNU.sparse.realsize", b"99"),
    }
    version = rng.choice([*marks, "gnu", "gnu with a long map"])
    if version in marks:
        return pax_entry(marks[version]) + entry(f"{key}.jpg", data) + text
    image = entry(f"{key}.jpg", data, type=tarfile.GNUTYPE_SPARSE)
    if version == "gnu":
        return image + text
    goes_on = with_checksum(image[:482] + b"\1" + image[483:BLOCK])
    maps = (bytes(504) + b"\1" + bytes(7)) * rng.randrange(1, 20) + bytes(BLOCK)
    return goes_on + maps + image[BLOCK:] + text


def raw_name(rng: random.Random, key: str) -> tuple[bytes, Outcomes]:
    odd = rng.choice([b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\x80"])
    name = key + odd.decode("utf-8", "surrogateescape")
    members = entry(f"{name}.jpg", photo(rng)) + entry(f"{name}.txt", caption_of(rng).encode())
    return members, {key + odd.decode("utf-8", "backslashreplace"): [{JUDGED}]}


def pax_name(rng: random.Random, key: str) -> tuple[bytes, Outcomes]:
    """A name with NUL and a line break, which requires an extended header."""
    name = f"{key}\0\n\x1b[2J\u202e"
    members = b"".join(
        pax_entry(pax_record("path", f"{name}.{extension}".encode())) + entry("short", content)
        for extension, content in (("jpg", photo(rng)), ("txt", caption_of(rng).encode()))
    )
    return members, {name: [{JUDGED}]}


def odd_headers(rng: random.Random, key: str) -> bytes:
    """Valid files with unusual times, owners and types."""
    fields: dict[str, Any] = {"mtime": rng.choice([-1, 2**40, 0]), "uid": 2**40, "gid": 2**50, "mode": 0o7777}
    type_ = rng.choice([tarfile.AREGTYPE, tarfile.CONTTYPE])
    head = pax_entry(pax_record("comment", rng.randbytes(40)), tarfile.XGLTYPE)
    return head + entry(f"{key}.jpg", photo(rng), type=type_, **fields) + entry(f"{key}.txt", b"a dog on a red bench")


def _shortened(name: str) -> str:
    """Shorten a key as documented: its beginning and its hash."""
    return f"{name[: 1024 - 32]}-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def _long(key: str) -> str:
    return "folder/" * 700 + key + "x" * 100


KINDS: dict[str, Make] = {
    # the image
    "jpeg cut": of_image(cut_jpeg, "undecodable_image"),
    "png cut": of_image(cut_png, "undecodable_image", extension="png"),
    "webp cut": of_image(cut_webp, "undecodable_image", extension="webp"),
    "png with a wrong CRC": of_image(png_wrong_crc, "undecodable_image", extension="png"),
    "wrong extension": of_image(png_as_jpg, JUDGED),
    "format that is not read": of_image(other_format, "undecodable_image"),
    "heic by its name": of_image(lambda rng: b"\0\0\0\x18ftypheic", "missing_image", extension="heic"),
    "gif": of_image(lambda rng: encode(picture(), "GIF"), JUDGED, extension="gif"),
    "bmp": of_image(lambda rng: encode(picture(), "BMP"), JUDGED, extension="bmp"),
    "tiff": of_image(lambda rng: encode(picture(), "TIFF"), JUDGED, extension="tif"),
    "avif": of_image(lambda rng: encode(picture(), "AVIF"), JUDGED, extension="avif"),
    "gif cut": of_image(lambda rng: encode(picture(), "GIF")[: rng.randrange(20, 900)], "undecodable_image"),
    "bmp cut": of_image(lambda rng: encode(picture(), "BMP")[: rng.randrange(9, 9000)], "undecodable_image"),
    "tiff cut": of_image(lambda rng: encode(picture(), "TIFF")[: rng.randrange(9, 9000)], "undecodable_image"),
    "avif cut": of_image(lambda rng: encode(picture(), "AVIF")[: rng.randrange(9, 900)], "undecodable_image"),
    "turned and transparent": of_image(turned_and_transparent, JUDGED, extension="png"),
    "animated": of_image(animated, JUDGED, extension="webp"),
    "0x0": of_image(no_pixels, "undecodable_image", extension="png"),
    "60,000x1": of_image(a_line, JUDGED, extension="png"),
    "1x1": of_image(lambda rng: jpeg(1, 1, rng.randrange(99)), JUDGED),
    "png of a huge declared size": of_image(png_huge, "image_too_large", extension="png"),
    "jpeg of a huge declared size": of_image(jpeg_huge, "image_too_large"),
    "webp of a huge declared size": of_image(webp_huge, "image_too_large", "undecodable_image", extension="webp"),
    "CMYK, grey, palette": of_image(other_colours, JUDGED, extension="png"),
    "16 bits": of_image(sixteen_bits, JUDGED, extension="png"),
    "EXIF bomb": of_image(exif_bomb, JUDGED),
    "ICC garbage": of_image(icc_garbage, JUDGED),
    "ICC bomb": of_image(icc_bomb, "undecodable_image", extension="png"),
    "compressed text bomb": of_image(text_bomb, JUDGED, "undecodable_image", extension="png"),
    "hundreds of scans": of_image(many_scans, "image_too_large"),
    "flipped bits": of_image(flipped_bits, JUDGED, "undecodable_image", "image_too_large"),
    "garbage behind the image": of_image(lambda rng: photo(rng) + rng.randbytes(999), JUDGED),
    "html as image": of_image(lambda rng: b"<!DOCTYPE html><p>404 " + rng.randbytes(9), "undecodable_image"),
    "random bytes as image": of_image(lambda rng: rng.randbytes(rng.randrange(2_000)), "undecodable_image"),
    "zero-byte image": of_image(lambda rng: b"", "undecodable_image"),
    "image beyond the bound": of_image(lambda rng: photo(rng) + bytes(300_000), "image_too_large"),
    # the caption
    "UTF-16 caption": of_caption(utf16, "undecodable_caption"),
    "Latin-1 caption": of_caption(lambda rng: "ein schönes Häuschen".encode("latin-1"), "undecodable_caption"),
    "lone surrogate": of_caption(
        lambda rng: b"a dog \xed\xa0" + bytes([0x80 + rng.randrange(64)]), "undecodable_caption"
    ),
    "overlong UTF-8": of_caption(lambda rng: b"a dog \xc0\xaf", "undecodable_caption"),
    "NUL": of_caption(lambda rng: caption_of(rng).replace(" ", "\0", 1).encode(), JUDGED),
    "right-to-left override": of_caption(lambda rng: f"\u202e{caption_of(rng)}\u2066 \u200f".encode(), JUDGED),
    "terminal control": of_caption(lambda rng: f"\x1b]0;x\x07\x1b[2J{caption_of(rng)}\x9b31m\r".encode(), JUDGED),
    "markup": of_caption(lambda rng: f"<script>alert(1)</script>={caption_of(rng)}&quot;\"',".encode(), JUDGED),
    "empty caption": of_caption(lambda rng: rng.choice([b"", b" \n\t ", "\u3000".encode(), b"\xef\xbb\xbf"]), JUDGED),
    "caption of one endless word": of_caption(lambda rng: rng.choice([b"a", b".", b"'", b"(", b"$1,"]) * 5_000, JUDGED),
    "caption of nothing but marks": of_caption(zalgo, JUDGED),
    "mixed scripts": of_caption(mixed_scripts, JUDGED),
    "caption beyond the bound": of_caption(lambda rng: b"dog " * rng.randrange(4_097, 20_000), "caption_too_large"),
    # the metadata
    "invalid JSON": of_json(
        lambda rng: rng.choice([b"{", b"", b"{]", b"\xff", b"nul", b'{"a":}', b"{'a': 1}", rng.randbytes(40)]),
        "undecodable_json",
    ),
    "JSON that is no object": of_json(
        lambda rng: rng.choice([b"[]", b"1", b'"x"', b"null", b"NaN"]), "undecodable_json"
    ),
    "deep JSON": of_json(deep_json, "json_too_deep"),
    "a number of 9,999 digits": of_json(lambda rng: b'{"width": ' + b"9" * 9_999 + b"}", "undecodable_json"),
    "JSON of many values": of_json(lambda rng: b'{"a": [' + b"[]," * 30_000 + b"0]}", "json_too_many_values"),
    "UTF-16 JSON": of_json(lambda rng: '{"width": 240}'.encode("utf-16"), JUDGED),
    "odd values in JSON": of_json(odd_values, JUDGED, "repeated_uid"),
    "odd face boxes": of_json(odd_boxes, JUDGED),
    "JSON with a name twice": of_json(lambda rng: b'{"uid": 1, "uid": 2, "uid": "x"}', JUDGED),
    "JSON beyond the bound": of_json(lambda rng: b'{"a": "' + b"x" * 100_000 + b'"}', "metadata_too_large"),
    # the members
    "no image": of_members(
        lambda rng, key: entry(f"{key}.txt", b"a dog") + entry(f"{key}.json", b"{}"), "missing_image"
    ),
    "no caption": of_members(
        lambda rng, key: entry(f"{key}.jpg", photo(rng)) + entry(f"{key}.json", b"{}"), "missing_caption"
    ),
    "nothing but JSON": of_members(lambda rng, key: entry(f"{key}.json", b"{}"), "missing_image"),
    "no JSON": of_members(
        lambda rng, key: entry(f"{key}.jpg", photo(rng)) + entry(f"{key}.txt", caption_of(rng).encode()), JUDGED
    ),
    "two images": of_members(
        lambda rng, key: sound_members(rng, key) + entry(f"{key}.png", photo(rng)), "duplicate_member"
    ),
    "two captions": of_members(
        lambda rng, key: sound_members(rng, key) + entry(f"{key}.TXT", b"x"), "duplicate_member"
    ),
    "zero-byte members": of_members(
        lambda rng, key: b"".join(entry(f"{key}.{e}") for e in ("jpg", "txt", "json")), "undecodable_json"
    ),
    "the same key again": again,
    "the same uid again": uid_again,
    "interleaved samples": interleaved,
    "folder in the place of an image": of_members(
        lambda rng, key: entry(f"{key}.jpg/", type=tarfile.DIRTYPE) + entry(f"{key}.txt", b"a dog"), "missing_image"
    ),
    "symbolic link": stray(tarfile.SYMTYPE),
    "hard link": stray(tarfile.LNKTYPE),
    "character device": stray(tarfile.CHRTYPE),
    "block device": stray(tarfile.BLKTYPE),
    "named pipe": stray(tarfile.FIFOTYPE),
    "unknown type": stray(b"Z"),
    "sparse member": of_members(sparse, "unsupported_member"),
    "dot in the key": lambda rng, key: (sound_members(rng, f"{key}.v2"), {f"{key}.v2": [{JUDGED}]}),
    "further image of a sample": of_members(
        lambda rng, key: sound_members(rng, key) + entry(f"{key}.seg.png", photo(rng)), JUDGED
    ),
    "large letters": of_members(
        lambda rng, key: entry(f"{key}.JPG", photo(rng)) + entry(f"{key}.Txt", b"a dog on a bench"), JUDGED
    ),
    "odd headers": of_members(odd_headers, JUDGED),
    # the names
    "absolute name": of_name(lambda key: f"{CANARY}/{key}", lambda key: f"{CANARY}/{key}", JUDGED),
    "name with ..": of_name(lambda key: f"../../canary/{key}", lambda key: f"../../canary/{key}", JUDGED),
    "name of 5,000 characters, GNU": of_name(_long, lambda key: _shortened(_long(key)), "key_too_long"),
    "name of 5,000 characters, PAX": of_name(
        _long, lambda key: _shortened(_long(key)), "key_too_long", tarfile.PAX_FORMAT
    ),
    "long name, GNU": of_name(lambda key: "ü/" * 200 + key, lambda key: "ü/" * 200 + key, JUDGED),
    "long name, PAX": of_name(lambda key: "ü/" * 200 + key, lambda key: "ü/" * 200 + key, JUDGED, tarfile.PAX_FORMAT),
    "name with control characters": of_name(
        lambda key: f"\x1b[31m\r{key}\u202e", lambda key: f"\x1b[31m\r{key}\u202e", JUDGED
    ),
    "name that is no UTF-8": raw_name,
    "name with NUL": pax_name,
    "Windows name": of_name(lambda key: f"C:\\con\\{key}", lambda key: f"C:\\con\\{key}", JUDGED),
}


def corpus(per_kind: int) -> Iterator[Malformed]:
    """Yield `per_kind` samples of each kind, reproducibly."""
    for number, (kind, make) in enumerate(KINDS.items()):
        for index in range(per_kind):
            members, outcomes = make(random.Random(f"{kind} {index}"), f"m{number:03d}-{index:02d}")
            yield Malformed(kind, members, outcomes)


# Damaged tars -----------------------------------------------------------------------------------------------------


def damaged_tars() -> Iterator[MalformedTar]:
    """Yield tars with every kind of damage after two valid samples."""
    rng = random.Random("tars")
    first, second = sound_members(rng, "first"), sound_members(rng, "second")
    before, after = first + second, sound_members(rng, "after") + bytes(2 * BLOCK)

    def damaged(kind: str, middle: bytes, rest: bytes = after, reason: str | None = "broken_tar") -> MalformedTar:
        return MalformedTar(kind, before + middle + rest, ("first", "second"), reason)

    for at in _offsets(second):
        for kind, cut in (("at a header", at), ("in a header", at + 200), ("in a content", at + BLOCK + 5)):
            yield MalformedTar(f"cut {kind}", first + second[:cut], ("first",), "broken_tar")
    valid = tar_bytes([("k.jpg", photo(rng)), ("k.txt", b"a dog")])
    for kind, compress in (("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)):
        yield MalformedTar(f"{kind}'d", compress(valid), (), "broken_tar")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("k.txt", "a dog")
    no_tars = {"empty": b"", "text": b"no tar" * 999, "zip": archive.getvalue(), "jpeg": photo(rng)}
    for kind, content in {**no_tars, "random bytes": rng.randbytes(9_000)}.items():
        yield MalformedTar(f"{kind} named .tar", content, (), "broken_tar")
    yield MalformedTar("no members", bytes(10_240), (), None)
    yield damaged("no end mark", b"", b"")
    yield damaged("data behind the end mark", bytes(2 * BLOCK))
    yield damaged("garbage between members", rng.randbytes(BLOCK))
    yield damaged("garbage of an odd size between members", rng.randbytes(77))
    header = bytearray(entry("x.bin", b"x"))
    header[150] ^= 1
    yield damaged("wrong header checksum", bytes(header))
    for size in (10**6, 2**40, 2**62):
        yield damaged(f"declared size of {size} bytes", entry("k.bin", size=size), b"x" * 999)
        yield damaged(f"image of a declared size of {size} bytes", entry("k.jpg", size=size), b"x" * 999)
    yield damaged("negative size", entry("k.bin", size=-BLOCK * 4))
    for size_ in (b"-5", b"1e9", b"9" * 30, b""):
        yield damaged(f"extended header with size {size_!r}", pax_entry(pax_record("size", size_)) + entry("k.bin"))
    damaged_records = {"length 0": b"0 path=a\n", "length too long": b"999 path=a\n", "no length": b"path=a\n"}
    for kind, records in {**damaged_records, "no keyword": b"6 abc\n", "digits only": b"1" * 2**20}.items():
        yield damaged(f"extended header: {kind}", pax_entry(records))
    yield damaged("extended headers without end", pax_entry(pax_record("comment", b"c")) * 3_000)
    yield damaged("long names without end", entry("././@LongLink", b"name\0", type=tarfile.GNUTYPE_LONGNAME) * 3_000)
    yield damaged("extended header beyond the bound", entry("pax", type=tarfile.XHDTYPE, size=2**30))
    yield damaged("extended header, then nothing", pax_entry(pax_record("path", b"k.jpg")), bytes(2 * BLOCK))
    sparse_header = with_checksum(entry("k.jpg", type=tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + bytes(29))
    yield damaged("sparse map without end", sparse_header, b"\1" * BLOCK * 9)
    yield damaged("more members than the bound", entry("README") * 2_000, reason="tar_too_large")


def _offsets(members: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(members + bytes(2 * BLOCK))) as tar:
        return [member.offset for member in tar.getmembers()]
