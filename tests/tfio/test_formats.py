"""Tests of decoding real files with tensorflow-io, pixel by pixel. `make test-tfio` builds its environment."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from pipeline.centroids.images import Picture, Unreadable, list_images, read_images
from pipeline.cli import app
from pipeline.decoding.tfio_decoder import TfioDecoder
from tests.helpers import BOUNDS, DEMO_RECIPE, jpeg, picture, tar_bytes
from transforms.distribution_alignment.cids import load_tasks

PYTHON = Path(__file__).parents[2] / ".tfio" / "bin" / "python"
RGB = np.asarray(picture(40, 24, seed=3))
GREY = RGB[:, :, 0]

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="there is no .tfio; `make test-tfio` builds it")


@pytest.fixture(scope="module")
def decoder() -> Iterator[TfioDecoder]:
    with TfioDecoder(str(PYTHON), BOUNDS.max_image_pixels) as decoder:
        yield decoder


def read(folder: Path, decoder: TfioDecoder, *contents: bytes) -> list[np.ndarray | str]:
    """Return the pixels of every picture of the files, or the message of each that cannot be read."""
    for index, content in enumerate(contents):
        (folder / f"{index:03d}").write_bytes(content)
    found = read_images(list_images(str(folder)), BOUNDS, decoder)
    return [one.pixels if isinstance(one, Picture) else one.message for one in found]


def assert_pictures(found: list[np.ndarray | str], *expected: np.ndarray, tolerance: int = 0) -> None:
    assert len(found) == len(expected), found
    for one, pixels in zip(found, expected, strict=True):
        assert isinstance(one, np.ndarray), one
        wanted = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
        assert one.shape == wanted.shape and one.dtype == np.uint8
        assert np.abs(one.astype(int) - wanted).max() <= tolerance


# DICOM ------------------------------------------------------------------------------------------------------------


def element(group: int, number: int, kind: str, value: bytes) -> bytes:
    """Return a data element in explicit little endian (PS3.5, 7.1.2)."""
    value += (b" " if kind in ("CS", "IS") else b"\0") * (len(value) % 2)
    size = struct.pack("<HI", 0, len(value)) if kind in ("OB", "OW") else struct.pack("<H", len(value))
    return struct.pack("<HH2s", group, number, kind.encode()) + size + value


def dicom(pixels: np.ndarray, bits_stored: int, photometric: str = "MONOCHROME2", frames: int = 1) -> bytes:
    """Return a minimal DICOM file of uncompressed pixels: (frames, h, w), (h, w) or, for RGB, (h, w, 3)."""
    samples = 3 if photometric == "RGB" else 1
    height, width = pixels.shape[:2] if samples == 3 else pixels.shape[-2:]

    def short(number: int, value: int) -> bytes:
        return element(0x28, number, "US", struct.pack("<H", value))

    meta = (
        element(2, 1, "OB", b"\0\1")
        + element(2, 2, "UI", b"1.2.840.10008.5.1.4.1.1.7")
        + element(2, 3, "UI", b"1.2.3")
        + element(2, 0x10, "UI", b"1.2.840.10008.1.2.1")
    )
    data = element(8, 0x16, "UI", b"1.2.840.10008.5.1.4.1.1.7") + element(8, 0x18, "UI", b"1.2.3")
    data += short(2, samples) + element(0x28, 4, "CS", photometric.encode())
    data += short(6, 0) if samples == 3 else b""
    data += element(0x28, 8, "IS", str(frames).encode())
    data += short(0x10, height) + short(0x11, width)
    data += short(0x100, 8 * pixels.itemsize) + short(0x101, bits_stored)
    data += short(0x102, bits_stored - 1) + short(0x103, 0)
    data += element(0x7FE0, 0x10, "OW" if pixels.itemsize > 1 else "OB", pixels.tobytes())
    length = element(2, 0, "UL", struct.pack("<I", len(meta)))
    return b"\0" * 128 + b"DICM" + length + meta + data


def test_dicom_of_8_bits(tmp_path: Path, decoder: TfioDecoder) -> None:
    files = dicom(GREY, 8), dicom(RGB, 8, "RGB"), dicom(np.stack([GREY, GREY[::-1]]), 8, frames=2)
    assert_pictures(read(tmp_path, decoder, *files), GREY, RGB, GREY, GREY[::-1])


def test_dicom_with_inverted_grey(tmp_path: Path, decoder: TfioDecoder) -> None:
    assert_pictures(read(tmp_path, decoder, dicom(GREY, 8, "MONOCHROME1")), 255 - GREY, tolerance=1)


@pytest.mark.parametrize(("bits", "offset", "factor"), [(12, 0, 16), (16, 0, 257), (16, 1000, 4)])
def test_dicom_of_more_than_8_bits_is_scaled_to_its_range(
    tmp_path: Path, decoder: TfioDecoder, bits: int, offset: int, factor: int
) -> None:
    low, high = int(GREY.min()), int(GREY.max())
    expected = ((GREY.astype(int) - low) * 255 // (high - low)).astype(np.uint8)
    found = read(tmp_path, decoder, dicom((GREY.astype("<u2") * factor + offset).astype("<u2"), bits))
    assert_pictures(found, expected, tolerance=1)


# TIFF -------------------------------------------------------------------------------------------------------------


def tiff(*pages: Image.Image, **options: str) -> bytes:
    out = io.BytesIO()
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:], **options)
    return out.getvalue()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_every_page_of_a_tiff(tmp_path: Path, decoder: TfioDecoder, compression: str) -> None:
    small = Image.fromarray(RGB).resize((9, 7))
    file = tiff(Image.fromarray(RGB), Image.fromarray(GREY), small, compression=compression)
    assert_pictures(read(tmp_path, decoder, file), RGB, GREY, np.asarray(small))


def test_other_multi_page_tiffs(tmp_path: Path, decoder: TfioDecoder) -> None:
    big, deep = io.BytesIO(), io.BytesIO()
    tifffile.imwrite(big, np.stack([RGB, RGB[::-1]]), bigtiff=True, photometric="rgb")
    tifffile.imwrite(deep, np.stack([RGB, RGB[::-1]]).astype(np.uint16) * 257, photometric="rgb")
    found = read(tmp_path, decoder, big.getvalue(), deep.getvalue())
    assert_pictures(found, RGB, RGB[::-1], RGB, RGB[::-1])


# EXR --------------------------------------------------------------------------------------------------------------


def exr(channels: dict[str, np.ndarray]) -> bytes:
    """Return a single-part, uncompressed scan-line OpenEXR file with float32 or float16 channels (h, w)."""
    height, width = next(iter(channels.values())).shape
    types = {np.dtype(np.float16): 1, np.dtype(np.float32): 2}

    def attribute(name: str, kind: str, value: bytes) -> bytes:
        return name.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<I", len(value)) + value

    names = sorted(channels)
    listed = b"".join(
        name.encode() + b"\0" + struct.pack("<iB3xii", types[channels[name].dtype], 0, 1, 1) for name in names
    )
    window = struct.pack("<4i", 0, 0, width - 1, height - 1)
    header = b"\x76\x2f\x31\x01" + struct.pack("<I", 2)
    header += attribute("channels", "chlist", listed + b"\0") + attribute("compression", "compression", b"\0")
    header += attribute("dataWindow", "box2i", window) + attribute("displayWindow", "box2i", window)
    header += attribute("lineOrder", "lineOrder", b"\0") + attribute("pixelAspectRatio", "float", struct.pack("<f", 1))
    header += attribute("screenWindowCenter", "v2f", struct.pack("<2f", 0, 0))
    header += attribute("screenWindowWidth", "float", struct.pack("<f", 1)) + b"\0"
    lines = [b"".join(channels[name][y].tobytes() for name in names) for y in range(height)]
    lines = [struct.pack("<iI", y, len(line)) + line for y, line in enumerate(lines)]
    start = len(header) + 8 * height
    offsets = [start + sum(len(line) for line in lines[:y]) for y in range(height)]
    return header + struct.pack(f"<{height}Q", *offsets) + b"".join(lines)


def linear(shown: np.ndarray) -> np.ndarray:
    """Return the linear light that sRGB encodes as these bytes."""
    value = shown / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("type_", [np.float16, np.float32])
def test_exr_is_converted_from_linear_light_to_srgb(tmp_path: Path, decoder: TfioDecoder, type_: type) -> None:
    planes: dict[str, np.ndarray] = {name: linear(RGB[:, :, index]).astype(type_) for index, name in enumerate("RGB")}
    alpha = {"A": np.zeros_like(planes["R"])}
    grey: dict[str, np.ndarray] = {"Y": linear(GREY).astype(type_)}
    assert_pictures(read(tmp_path, decoder, exr(planes | alpha), exr(grey)), RGB, GREY, tolerance=1)


def test_exr_with_unsupported_values_and_channels(tmp_path: Path, decoder: TfioDecoder) -> None:
    light = np.array([[-1, 0, 1, 7, np.inf, -np.inf, np.nan]], np.float32)
    shown = np.array([[0, 0, 255, 255, 255, 0, 0]], np.uint8)
    found = read(tmp_path, decoder, exr({"Y": light}), exr({"Z": light}))
    assert_pictures(found[:1], shown)
    assert found[1:] == ["the channels are Z; supported: R, G and B, or Y"]


# JPEG 2000 --------------------------------------------------------------------------------------------------------


def jp2(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG2000", irreversible=False)
    return out.getvalue()


def test_jpeg_2000(tmp_path: Path, decoder: TfioDecoder) -> None:
    rgb, deep = Image.fromarray(RGB), Image.fromarray(GREY.astype(np.uint16) * 257)
    files = [jp2(image) for image in (rgb, rgb.convert("RGBA"), Image.fromarray(GREY), deep)]
    assert_pictures(read(tmp_path, decoder, *files), RGB, RGB, GREY, GREY)


def test_bare_jpeg_2000_codestreams(tmp_path: Path, decoder: TfioDecoder) -> None:
    files = [jp2(Image.fromarray(pixels)) for pixels in (RGB, GREY)]
    assert_pictures(read(tmp_path, decoder, *[file[file.index(b"\xff\x4f\xff\x51") :] for file in files]), RGB, GREY)


def test_unsupported_jpeg_2000(tmp_path: Path, decoder: TfioDecoder) -> None:
    sound = jp2(Image.fromarray(RGB))
    colours = sound.index(b"colr\1") + 7
    sycc = sound[:colours] + struct.pack(">I", 18) + sound[colours + 4 :]
    depth = sound.index(b"\xff\x4f\xff\x51") + 42
    mixed = sound[:depth] + b"\3" + sound[depth + 1 :]
    found = read(tmp_path, decoder, sycc, mixed)
    assert found == ["the colour space is sYCC, which is not supported",
                     "unsupported components; supported: unsigned, 8 to 16 bits, all of one depth"]  # fmt: skip


# Damaged and large files ------------------------------------------------------------------------------------------


def test_damaged_files_affect_no_other(tmp_path: Path, decoder: TfioDecoder) -> None:
    sound = dicom(GREY, 8)
    planes = exr({"Y": linear(GREY).astype(np.float32)})
    damaged = [planes[:40], planes[:600], jp2(Image.fromarray(RGB))[:300], jp2(Image.fromarray(RGB))[:90], sound[:200],
               dicom(GREY.astype("<u4"), 32)]  # fmt: skip
    found = read(tmp_path, decoder, sound, *damaged, sound)
    assert_pictures([found[0], found[-1]], GREY, GREY)
    assert len(found) == len(damaged) + 2
    assert all(isinstance(one, str) for one in found[1:-1]), found


def test_too_large_picture(tmp_path: Path, decoder: TfioDecoder) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(Image.fromarray(GREY), Image.fromarray(GREY).resize((300, 200))))
    with TfioDecoder(str(PYTHON), max_pixels=50_000) as bounded:
        first, second = read_images(list_images(str(tmp_path)), BOUNDS, bounded)
    assert isinstance(first, Picture)
    assert isinstance(second, Unreadable)
    assert second.message == "300x200 px; the recipe allows 50000"


def test_command_computes_centroids_from_all_formats(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "scans" / "b.tif").write_bytes(tiff(Image.fromarray(RGB), Image.fromarray(GREY)))
    (tmp_path / "scans" / "c.tar").write_bytes(tar_bytes([("c.dcm", dicom(GREY, 8)), ("d.jp2", b"no such file")]))
    output = str(tmp_path / "tasks.npz")
    command = ["centroids", f"scans={tmp_path}/scans", "--recipe", str(DEMO_RECIPE), "--output", output]
    result = CliRunner().invoke(app, [*command, "--tfio-python", str(PYTHON)])
    assert result.exit_code == 0, result.output
    assert "scans: 4 images, 1 unreadable, 3 centroids" in result.stdout  # scan and grey page are equal
    assert load_tasks(output)["scans"].shape == (3, 128)
