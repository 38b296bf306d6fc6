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
from PIL import Image

from pipeline.decoding.images import UndecodableImage, decode, silence_pillow
from tests.helpers import encode, jpeg, picture

ENOUGH = 10_000_000


def refused(content: bytes, max_pixels: int = ENOUGH) -> UndecodableImage:
    with pytest.raises(UndecodableImage) as caught:
        decode(content, max_pixels)
    return caught.value


def png_claiming(width: int, height: int) -> bytes:
    """Return a PNG whose header claims more pixels than its data has."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("format_", "mode"), [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"),
    ("PNG", "LA"), ("PNG", "1"), ("PNG", "I;16"), ("WEBP", "RGB"), ("WEBP", "RGBA"),
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


def test_alpha_is_dropped_and_not_blended() -> None:
    rgba = picture().convert("RGBA")
    rgba.putalpha(0)
    assert np.array_equal(decode(encode(rgba, "PNG"), ENOUGH)[0], np.asarray(picture()))


def test_exif_rotation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    pixels, size = decode(encode(picture(), "JPEG", exif=exif), ENOUGH)
    assert size == (96, 64)
    assert pixels.shape == (64, 96, 3)


def test_first_frame_of_an_animation_is_decoded() -> None:
    frames = [picture(seed=seed) for seed in (1, 2, 3)]
    content = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(decode(content, ENOUGH)[0], np.asarray(frames[0]))


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


@pytest.mark.parametrize("format_", ["GIF", "BMP", "TIFF", "ICO", "PPM", "PDF", "JPEG2000", "TGA"])
def test_other_formats_are_refused(format_: str) -> None:
    error = refused(encode(picture(), format_))
    assert error.reason == "undecodable_image"
    assert "JPEG, PNG, WEBP" in str(error)


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"<html>", b"RIFF\0\0\0\0WEBP"])
def test_bytes_that_are_not_an_image(content: bytes) -> None:
    assert refused(content).reason == "undecodable_image"


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_refused_and_not_padded(format_: str) -> None:
    content = encode(picture(200, 200), format_)
    for share in (0.05, 0.3, 0.6, 0.9):
        assert refused(content[: int(len(content) * share)]).reason == "undecodable_image"


def test_damaged_files_raise_no_other_exception() -> None:
    rng = random.Random(0)
    for format_ in ("JPEG", "PNG", "WEBP"):
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
    cases = [b"", b"nothing", encode(picture(), "GIF"), jpeg()[:900], encode(picture(), "PNG")[:900],
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
