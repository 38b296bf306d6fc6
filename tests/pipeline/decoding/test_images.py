"""Tests of image decoding: RGB pixels from every allowed format, and a reason code for every failure."""

from __future__ import annotations

import io
import random
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.decoding.images import UndecodableImage, decode, silence_pillow
from tests.helpers import encode, jpeg, picture

ENOUGH = 10_000_000


def refused(content: bytes, max_pixels: int = ENOUGH) -> UndecodableImage:
    with pytest.raises(UndecodableImage) as caught:
        decode(content, max_pixels)
    return caught.value


def png(header: bytes, data: bytes, **chunks: bytes) -> bytes:
    """Return a PNG with the given header, uncompressed data and further chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    others = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    data = others + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


def png_claiming(width: int, height: int) -> bytes:
    """Return a PNG whose header claims more pixels than its data has."""
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"")


@pytest.mark.parametrize(("format_", "mode"), [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"),
    ("PNG", "LA"), ("PNG", "1"), ("PNG", "I;16"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("GIF", "L"),
    ("BMP", "RGB"), ("BMP", "P"), ("BMP", "1"), ("BMP", "RGBA"), ("TIFF", "RGB"), ("TIFF", "L"), ("TIFF", "1"),
    ("TIFF", "RGBA"), ("TIFF", "CMYK"), ("TIFF", "I;16"), ("AVIF", "RGB"), ("AVIF", "RGBA"), ("AVIF", "L"),
])  # fmt: skip
@pytest.mark.parametrize("draft", [None, 32])
def test_every_format_and_mode_is_converted_to_rgb(format_: str, mode: str, draft: int | None) -> None:
    image = Image.fromarray(np.full((64, 96), 7, np.uint16)) if mode == "I;16" else picture().convert(mode)
    pixels, size = decode(encode(image, format_), ENOUGH, draft)
    assert size == (96, 64)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)
    assert pixels.shape == (64, 96, 3) or (draft and format_ == "JPEG")


def test_lossless_pixels_are_kept() -> None:
    image = picture()
    for format_, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(decode(encode(image, format_, **options), ENOUGH)[0], np.asarray(image))


def test_16_bit_grey_image_keeps_its_shades() -> None:
    ramp = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    pixels, _ = decode(encode(Image.fromarray(ramp), "PNG"), ENOUGH)
    assert np.abs(pixels[..., 0].astype(int) - (ramp >> 8)).max() <= 1


def drawing(mode: str) -> Image.Image:
    """Return a black and a half transparent square on transparent ground, whose colour is black, too."""
    alpha = np.zeros((64, 96), np.uint8)
    alpha[16:48, 16:48], alpha[16:48, 48:80] = 255, 128
    rgba = Image.fromarray(np.dstack([np.zeros((64, 96, 3), np.uint8), alpha]), "RGBA")
    return rgba.convert(mode)


def on_white() -> np.ndarray:
    grey = np.full((64, 96), 255)
    grey[16:48, 16:48], grey[16:48, 48:80] = 0, 127
    return np.repeat(grey[:, :, None], 3, axis=2)


@pytest.mark.parametrize(("format_", "mode", "options"), [
    ("PNG", "RGBA", {}), ("PNG", "LA", {}), ("WEBP", "RGBA", {"lossless": True}), ("TIFF", "RGBA", {}),
    ("AVIF", "RGBA", {"quality": 100}),
])  # fmt: skip
def test_transparency_is_composed_on_white(format_: str, mode: str, options: dict[str, object]) -> None:
    pixels, _ = decode(encode(drawing(mode), format_, **options), ENOUGH)
    assert np.abs(pixels - on_white()).max() <= (2 if format_ == "AVIF" else 1)


def test_transparent_palette_entries_are_white() -> None:
    indices = np.zeros((64, 96), np.uint8)
    indices[16:48, 16:48], indices[16:48, 48:80] = 1, 2
    image = Image.fromarray(indices, "P")
    image.putpalette([0, 0, 0] * 3)
    png = decode(encode(image, "PNG", transparency=bytes([0, 255, 128])), ENOUGH)[0]
    assert np.abs(png - on_white()).max() <= 1
    gif = decode(encode(image, "GIF", transparency=0), ENOUGH)[0]
    assert np.array_equal(gif == 255, np.repeat((indices == 0)[:, :, None], 3, axis=2))


@pytest.mark.parametrize(("pixels", "key"), [
    (np.array([[0, 9]], np.uint8), 0),
    (np.array([[0, 9 << 8]], np.uint16), 0),
    (np.array([[[0, 0, 0], [9, 9, 9]]], np.uint8), (0, 0, 0)),
])  # fmt: skip
def test_transparent_colour_of_a_png_is_white(pixels: np.ndarray, key: object) -> None:
    content = encode(Image.fromarray(pixels), "PNG", transparency=key)
    assert decode(content, ENOUGH)[0].tolist() == [[[255] * 3, [9] * 3]]


def test_transparent_colour_of_a_one_bit_png_is_white() -> None:
    image = Image.fromarray(np.array([[False, True]])).convert("1")
    assert decode(encode(image, "PNG", transparency=0), ENOUGH)[0].min() == 255
    assert decode(encode(image, "PNG"), ENOUGH)[0].tolist() == [[[0] * 3, [255] * 3]]


def test_transparent_colour_of_a_16_bit_rgb_png_does_no_harm() -> None:
    """Pillow reads such a picture with 8 bits, but keeps the colour with 16."""
    content = png(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), bytes(7) + b"\x09\x09" * 3, tRNS=b"\xff\xff" * 3)
    assert decode(content, ENOUGH)[0].tolist() == [[[0] * 3, [9] * 3]]


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format_: str, orientation: int) -> None:
    image = Image.fromarray(np.full((64, 96, 3), 200, np.uint8))
    image.paste((0, 0, 0), (0, 0, 48, 16))  # dark at the upper left
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, size = decode(encode(image, format_, exif=exif), ENOUGH)
    tagged = image.copy()
    tagged.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(tagged)
    assert size == upright.size
    assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 2


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*" + b"\xff" * 40, b"x"])
def test_damaged_exif_does_no_harm(exif: bytes) -> None:
    assert decode(encode(picture(), "JPEG", exif=exif), ENOUGH)[1] == (96, 64)
    assert decode(encode(picture(), "PNG", exif=exif), ENOUGH)[1] == (96, 64)


@pytest.mark.parametrize("value", [0, 9, 255])
def test_unknown_orientation_is_upright(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert decode(encode(picture(), "JPEG", exif=exif), ENOUGH)[1] == (96, 64)


@pytest.mark.parametrize(("format_", "options"), [("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("GIF", {})])
def test_first_frame_of_an_animation_is_decoded(format_: str, options: dict[str, object]) -> None:
    frames = [picture(seed=seed) for seed in (1, 2, 3)]
    if format_ == "GIF":
        frames = [frame.quantize() for frame in frames]
    content = encode(frames[0], format_, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(decode(content, ENOUGH)[0], np.asarray(frames[0].convert("RGB")))


def test_jpeg_with_a_second_picture_is_a_jpeg() -> None:
    content = encode(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    assert decode(content, ENOUGH)[1] == (96, 64)


@pytest.mark.parametrize(
    ("size", "draft", "at_least", "smaller"),
    [
        ((2000, 1600), 320, 320, True),
        ((2000, 700), 320, 320, True),
        ((2000, 330), 320, 320, False),  # half of 330 px would be too short
        ((300, 200), 320, 200, False),
        ((640, 640), 320, 320, True),
        ((639, 639), 320, 320, False),
    ],
)
def test_draft_size(size: tuple[int, int], draft: int, at_least: int, smaller: bool) -> None:
    content = jpeg(*size)
    pixels, stored = decode(content, 10**8, draft)
    assert stored == size  # the rules use the stored size, not that of the draft
    assert min(pixels.shape[:2]) >= at_least
    assert (pixels.shape[1], pixels.shape[0]) != size if smaller else (pixels.shape[1], pixels.shape[0]) == size
    full = Image.fromarray(decode(content, 10**8)[0]).resize((32, 32), Image.Resampling.BOX)
    small = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BOX)
    assert np.abs(np.asarray(full).astype(int) - np.asarray(small)).mean() < 3


def test_only_jpeg_uses_drafts() -> None:
    for format_ in ("PNG", "WEBP"):
        assert decode(encode(picture(800, 800), format_), ENOUGH, 100)[0].shape == (800, 800, 3)


@pytest.mark.parametrize(("size", "draft", "kept"), [
    ((2048, 2048), 320, (2048, 2048)),  # the largest that is kept as it is
    ((2048, 2049), 320, (342, 342)),
    ((3000, 1500), 320, (750, 375)),
    ((1500, 3001), 320, (375, 751)),
    ((3000, 1500), None, (1500, 750)),
    ((2047, 2051), None, (1024, 1026)),
    ((14000, 400), 320, (7000, 400)),
    ((6_000_000, 1), 320, (3_000_000, 1)),
    ((6_000_000, 1), None, (3_000_000, 1)),
])  # fmt: skip
@pytest.mark.parametrize("format_", ["PNG", "BMP"])
def test_large_images_are_reduced(
    size: tuple[int, int], draft: int | None, kept: tuple[int, int], format_: str
) -> None:
    image = Image.new("L", size, 200)
    pixels, stored = decode(encode(image, format_), 10**8, draft)
    assert stored == size
    assert (pixels.shape[1], pixels.shape[0]) == kept
    assert (pixels == 200).all()


def test_reducing_averages_what_is_seen() -> None:
    """Strip by strip gives the same pixels as all at once, and transparent pixels count as white."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (2100, 2500, 4), np.uint8), "RGBA")
    pixels, _ = decode(encode(rgba, "TIFF"), 10**8, 320)
    white = Image.new("RGBA", rgba.size, "white")
    assert np.array_equal(pixels, np.asarray(Image.alpha_composite(white, rgba).convert("RGB").reduce(6)))


def test_large_jpeg_is_reduced_as_a_draft_first() -> None:
    content = jpeg(2400, 2000)
    pixels, stored = decode(content, 10**8)
    assert (stored, pixels.shape) == ((2400, 2000), (1000, 1200, 3))
    full = Image.open(io.BytesIO(content)).convert("RGB").reduce(2)
    assert np.abs(np.asarray(full).astype(int) - pixels).mean() < 2


def test_memory_is_reserved_before_it_is_used() -> None:
    reserved: list[int] = []
    for content in (jpeg(800, 600), encode(picture(800, 600), "PNG"), encode(picture(800, 600), "WEBP")):
        decode(content, ENOUGH, reserve=reserved.append)
    assert reserved[0] <= reserved[1] < reserved[2]
    assert all(size_bytes > 800 * 600 * 4 for size_bytes in reserved)
    decode(jpeg(1600, 1600), ENOUGH, 320, reserve=reserved.append)
    decode(encode(picture(1600, 1600), "JPEG", progressive=True), ENOUGH, 320, reserve=reserved.append)
    assert reserved[3] < 400 * 400 * 10
    assert reserved[4] > 1600 * 1600 * 6

    def refuse(size_bytes: int) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        decode(jpeg(), ENOUGH, reserve=refuse)


def test_tiles_of_a_tiff_are_bounded() -> None:
    """libtiff unpacks a complete tile, also for an image of a few pixels."""
    assert decode(tiled_tiff(48, 64, 64), ENOUGH)[0].tolist() == [[[7] * 3] * 48] * 48
    error = refused(tiled_tiff(48, 2**14, 2**15))
    assert error.reason == "image_too_large"
    assert "16384x32768" in str(error)


def tiled_tiff(side: int, across: int, down: int) -> bytes:
    data = zlib.compress(b"\7" * (64 * 64))
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: across, 323: down, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_pixel_limit() -> None:
    content = jpeg(96, 64)
    assert decode(content, 96 * 64)[1] == (96, 64)
    error = refused(content, 96 * 64 - 1)
    assert error.reason == "image_too_large"
    assert "96x64" in str(error)
    assert str(96 * 64 - 1) in str(error)
    # The limit applies to the stored size, although the draft would be small enough.
    with pytest.raises(UndecodableImage, match="800x800"):
        decode(jpeg(800, 800), 500_000, 100)


@pytest.mark.parametrize("size", [(0, 0), (0, 9), (9, 0)])
def test_empty_image(size: tuple[int, int]) -> None:
    assert refused(png_claiming(*size)).reason == "undecodable_image"


def test_scans_of_a_jpeg_are_bounded() -> None:
    """Each scan takes a few bytes and processes the complete image: 20 MiB of scans take two hours to decode."""
    content = encode(picture(400, 400), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    pixels = 400 * 400
    assert decode(content, pixels)[1] == (400, 400)
    many = content[:-2] + scan * 20 + content[-2:]
    error = refused(many, pixels)
    assert error.reason == "image_too_large"
    assert "scans of 400x400 px" in str(error)
    assert decode(many, 3 * pixels)[1] == (400, 400)


@pytest.mark.parametrize("size", [(20_000, 20_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb_is_refused_before_decoding(size: tuple[int, int]) -> None:
    error = refused(png_claiming(*size))
    assert error.reason in ("image_too_large", "undecodable_image")
    assert len(str(error)) < 300


@pytest.mark.parametrize(("format_", "name"), [
    ("ICO", "an icon (ICO)"), ("PPM", "Netpbm"), ("PDF", "PDF"), ("JPEG2000", "JPEG 2000"), ("DDS", "DDS"),
    ("TGA", "of an unknown format (it begins with 00 00 02"),
])  # fmt: skip
def test_other_formats_are_refused_by_name(format_: str, name: str) -> None:
    error = refused(encode(picture(), format_))
    assert error.reason == "undecodable_image"
    assert str(error).startswith(f"the file is {name}")
    assert str(error).endswith("supported: JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF")


@pytest.mark.parametrize(("content", "name"), [
    (b"", "empty;"), (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic", "HEIC"), (b"\xff\x0a\xfa", "JPEG XL"),
    (b"<!DOCTYPE html><p>", "HTML"), (b"\n<HTML><body>", "HTML"), (b'<svg width="9">', "SVG"), (b"PK\x03\x04", "a ZIP"),
    (b'<?xml version="1.0"?>\n<!-- Inkscape --><svg>', "SVG"), (b'<?xml version="1.0"?><a/>', "XML"),
    (b'{"error": 404}', "JSON"), (b"404 Not Found", "text"),
    (b"\x01\x02", "of an unknown format (it begins with 01 02)"),
    (b"\0\0\0\x20ftypisom\0\0\2\0", "MP4"), (b"\x1f\x8b\x08", "gzip"),
    (b"\xff\xd8\xff\xe0", "a damaged JPEG"), (b"RIFF\0\0\0\0WEBP", "a damaged WEBP"),
])  # fmt: skip
def test_refusal_names_what_the_bytes_are(content: bytes, name: str) -> None:
    assert str(refused(content)).startswith(f"the file is {name}")


def test_values_of_an_unknown_range_are_refused() -> None:
    for mode in ("F", "I"):
        assert "range is unknown" in str(refused(encode(picture().convert("L").convert(mode), "TIFF")))


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"<html>", b"RIFF\0\0\0\0WEBP"])
def test_bytes_that_are_not_an_image(content: bytes) -> None:
    assert refused(content).reason == "undecodable_image"


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_truncated_files_are_refused_and_not_padded(format_: str) -> None:
    content = encode(picture(200, 200), format_)
    for share in (0.05, 0.3, 0.6, 0.9):
        assert refused(content[: int(len(content) * share)]).reason == "undecodable_image"


def test_damaged_files_raise_no_other_exception() -> None:
    rng = random.Random(0)
    for format_ in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        content = encode(picture(40, 40), format_)
        for _ in range(150):
            damaged = bytearray(content)
            for _ in range(rng.choice([1, 4, 30])):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                pixels, size = decode(bytes(damaged), 100_000)
            except UndecodableImage:
                continue
            assert pixels.shape == (size[1], size[0], 3)


def test_memory_error_is_not_blamed_on_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(b"", 1)


def test_messages_are_reproducible() -> None:
    cases = [b"", b"nothing", encode(picture(), "ICO"), jpeg()[:900], encode(picture(), "PNG")[:900],
             encode(picture(), "WEBP")[:300], png_claiming(60_000, 60_000), png_claiming(10, 10)]  # fmt: skip
    for content in cases:
        messages = {str(refused(content)) for _ in range(3)}
        assert len(messages) == 1
        (message,) = messages
        assert not re.search(r"0x[0-9a-f]{6,}|BytesIO", message)


def test_decoding_emits_no_warnings() -> None:
    palette = picture().convert("P")
    palette.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings(record=True) as given:
        silence_pillow()  # again, because pytest has replaced the filters set on import
        decode(encode(palette, "PNG"), ENOUGH)
        refused(png_claiming(10_000, 10_000), 10**9)
    assert not given


def test_input_bytes_are_not_modified() -> None:
    content = bytearray(jpeg())
    before = bytes(content)
    decode(bytes(content), ENOUGH)
    assert bytes(content) == before
    assert io.BytesIO(before).read() == before
