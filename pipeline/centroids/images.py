"""Reads the images of a downstream task, from files under a folder and from tars.

A file is an image if its content or its extension says so. Other files (labels, captions, notes) are skipped. Formats
and sizes are restricted, and an image that cannot be read is reported rather than skipped silently.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from pipeline.decoding import tfio_child
from pipeline.decoding.images import FORMATS, UndecodableImage, decode
from pipeline.decoding.tfio_decoder import TfioDecoder
from pipeline.sources.tars import BrokenTar, tar_members
from transforms.core.recipe import PoolSettings
from transforms.storage import files

_PILLOW_FORMATS = (*FORMATS, "PPM")
_EXTENSIONS = frozenset(
    "jpg jpeg png webp bmp gif pbm pgm pnm ppm tif tiff dcm dicom exr j2c j2k jp2 jpc jpf jpx avif heic hdr jxl".split()
)

# The first bytes of formats whose files often lack the usual extension.
_PILLOW_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EXR_START = b"\x76\x2f\x31\x01"
_JPEG_2000_STARTS = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_DICOM_AT_128 = b"DICM"
_HEAD_BYTES = 132


class NoImages(ValueError):
    """No file was found under a path."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture, with RGB uint8 pixels (height, width, 3).

    `name` is used in messages. `identity` is the hash of the file, with the number of the picture for file formats that
    can hold several.
    """

    name: str
    identity: str
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, and the reason. `str` returns ASCII, with other characters escaped."""

    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}".encode("unicode_escape").decode("ascii")


def list_images(path: str) -> list[files.FileStatus]:
    """Return the files under the folder `path` except hidden ones, or the tar `path`, sorted. Raises NoImages."""
    folder = path.rstrip("/") or path
    found = files.matching(files.join(files.literal(folder), "**"))
    if not found and path.endswith(".tar"):
        found = files.matching(files.literal(path))
    shown = [file for file in found if not os.path.basename(file.path).startswith(".")]
    if not shown:
        raise NoImages(f"{path}: contains no files; give a folder of images or of webdataset tars, or a .tar")
    return sorted(shown, key=lambda file: file.path)


def read_images(
    listed: list[files.FileStatus], bounds: PoolSettings, decoder: TfioDecoder
) -> Iterator[Picture | Unreadable]:
    """Yield the pictures of the files in order, holding one in memory at a time.

    A TIFF yields all its pages, a DICOM file all its frames, and a GIF its first frame. `decoder` decodes the formats
    that Pillow cannot read, and JPEG 2000, which only some builds of Pillow can read. Raises NoTfio if such a file is
    found but tensorflow-io is not installed, because skipping it would silently change the centroids.
    """
    for file in listed:
        if file.path.endswith(".tar"):
            yield from _tar_images(file.path, bounds, decoder)
            continue
        try:
            with files.open_binary(file.path) as stream:
                content = _image_content(file.path, file.size_bytes, stream.read, bounds)
        except OSError as error:
            yield Unreadable(file.path, f"cannot be opened ({error})")
            continue
        if content is not None:
            yield from _pictures(file.path, content, bounds, decoder)


def _tar_images(path: str, bounds: PoolSettings, decoder: TfioDecoder) -> Iterator[Picture | Unreadable]:
    with files.open_binary(path) as stream:
        try:
            for member in tar_members(stream, bounds):
                name = f"{path}/{member.name}"
                if os.path.basename(name).startswith("."):
                    continue
                if not member.is_file:
                    if _is_named_as_an_image(name):
                        yield Unreadable(name, "is not a regular file but a link or a device")
                    continue
                content = _image_content(name, member.size_bytes, member.read, bounds)
                if content is not None:
                    yield from _pictures(name, content, bounds, decoder)
        except BrokenTar as error:
            yield Unreadable(path, f"the tar is damaged {error}")


def _image_content(
    name: str, size_bytes: int, read: Callable[[int], bytes], bounds: PoolSettings
) -> bytes | Unreadable | None:
    """Return the bytes of a file; None if it is not an image."""
    too_large = size_bytes > bounds.max_image_bytes
    content = read(_HEAD_BYTES if too_large else size_bytes)
    if not _is_named_as_an_image(name) and not _looks_like_an_image(content):
        return None
    if too_large:
        return Unreadable(name, f"{size_bytes} bytes; the recipe allows pool.max_image_bytes {bounds.max_image_bytes}")
    return content


def _is_named_as_an_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower().removeprefix(".") in _EXTENSIONS


def _looks_like_an_image(head: bytes) -> bool:
    webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    return webp or head.startswith((*_PILLOW_STARTS, *_TIFF_STARTS)) or _tfio_kind(head) is not None


def _tfio_kind(head: bytes) -> bytes | None:
    """Return which format of tensorflow-io this is, if any; TIFF is handled separately."""
    if head.startswith(_EXR_START):
        return tfio_child.EXR
    if head.startswith(_JPEG_2000_STARTS):
        return tfio_child.JPEG_2000
    return tfio_child.DICOM if head[128:132] == _DICOM_AT_128 else None


def _pictures(
    name: str, content: bytes | Unreadable, bounds: PoolSettings, decoder: TfioDecoder
) -> Iterator[Picture | Unreadable]:
    if isinstance(content, Unreadable):
        yield content
        return
    digest = hashlib.sha256(content).hexdigest()
    try:
        kind, pages = _tfio_kind(content), 1
        if content.startswith(_TIFF_STARTS):
            pages = _tiff_pages(content)
            kind = tfio_child.TIFF if pages > 1 else None
        if kind is None:
            pixels, _ = decode(content, bounds.max_image_pixels, formats=_PILLOW_FORMATS)
            yield Picture(name, digest, pixels)
            return
    except UndecodableImage as error:
        yield Unreadable(name, str(error))
        return
    for number, decoded in enumerate(decoder.pictures(name, kind, pages, content)):
        if isinstance(decoded, UndecodableImage):
            yield Unreadable(f"{name}, picture {number}" if number else name, str(decoded))
        else:
            yield Picture(name, f"{digest}/{number:08d}", decoded)


def _tiff_pages(content: bytes) -> int:
    """Return the number of pages of a TIFF. Raises UndecodableImage if its list of pages is damaged."""
    try:
        with Image.open(io.BytesIO(content), formats=("TIFF",)) as image:
            return getattr(image, "n_frames", 1)
    except MemoryError:
        raise
    except Exception as error:  # Pillow may raise any exception on damaged files
        raise UndecodableImage("undecodable_image", f"{type(error).__name__}: {error}") from error
