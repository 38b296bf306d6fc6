"""The images of a downstream task: files under a folder, and what lies in tars.

A file is an image where its content or its extension says so; whatever else lies beside (labels, captions, notes) is
passed over. Few formats, bounded sizes, and an image that cannot be read is told and not skipped in silence.
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

_PILLOW_FORMATS = (*FORMATS, "BMP", "GIF", "PPM", "TIFF")
_EXTENSIONS = frozenset(
    "jpg jpeg png webp bmp gif pbm pgm pnm ppm tif tiff dcm dicom exr j2c j2k jp2 jpc jpf jpx avif heic hdr jxl".split()
)

# The first bytes of the formats that names often do not tell.
_PILLOW_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EXR_START = b"\x76\x2f\x31\x01"
_JPEG_2000_STARTS = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_DICOM_AT_128 = b"DICM"
_HEAD_BYTES = 132


class NoImages(ValueError):
    """A path under which nothing was found."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture: the name to call it by, RGB uint8 pixels (height, width, 3), and its identity: the hash of its file
    and, where that holds several, its number."""

    name: str
    identity: str
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, and why. As text it is ASCII, whatever the name and the message hold."""

    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}".encode("unicode_escape").decode("ascii")


def list_images(path: str) -> list[files.FileStatus]:
    """The files under the folder `path`, hidden ones left out, or the tar `path`; sorted by path. Raises NoImages."""
    folder = path.rstrip("/") or path
    found = files.matching(files.join(files.literal(folder), "**"))
    if not found and path.endswith(".tar"):
        found = files.matching(files.literal(path))
    shown = [file for file in found if not os.path.basename(file.path).startswith(".")]
    if not shown:
        raise NoImages(f"{path}: no files there; name a folder of images or of webdataset tars, or a .tar")
    return sorted(shown, key=lambda file: file.path)


def read_images(
    listed: list[files.FileStatus], bounds: PoolSettings, decoder: TfioDecoder
) -> Iterator[Picture | Unreadable]:
    """Every picture of the files, in their order; one in memory at a time.

    Several pictures come of a file that holds several (pages of a TIFF, frames of a DICOM; of a GIF the first). What
    Pillow cannot read goes to `decoder`; JPEG 2000 too, which some builds of Pillow read and others do not. Raises
    NoTfio where there is no environment for such a file: left out, the centroids would silently be those of other
    images.
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
                        yield Unreadable(name, "is a link or a device, not a file")
                    continue
                content = _image_content(name, member.size_bytes, member.read, bounds)
                if content is not None:
                    yield from _pictures(name, content, bounds, decoder)
        except BrokenTar as error:
            yield Unreadable(path, f"the tar is broken {error}")


def _image_content(
    name: str, size_bytes: int, read: Callable[[int], bytes], bounds: PoolSettings
) -> bytes | Unreadable | None:
    """The file's bytes; None where it is no image."""
    too_large = size_bytes > bounds.max_image_bytes
    content = read(_HEAD_BYTES if too_large else size_bytes)
    if not _is_named_as_an_image(name) and not _looks_like_an_image(content):
        return None
    if too_large:
        return Unreadable(name, f"{size_bytes} bytes; the recipe's pool.max_image_bytes is {bounds.max_image_bytes}")
    return content


def _is_named_as_an_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower().removeprefix(".") in _EXTENSIONS


def _looks_like_an_image(head: bytes) -> bool:
    webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    return webp or head.startswith((*_PILLOW_STARTS, *_TIFF_STARTS)) or _tfio_kind(head) is not None


def _tfio_kind(head: bytes) -> bytes | None:
    """Which of tensorflow-io's formats this is; a TIFF may be one."""
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
    """How many pages a TIFF has. Raises UndecodableImage where its chain of pages is broken."""
    try:
        with Image.open(io.BytesIO(content), formats=("TIFF",)) as image:
            pages = getattr(image, "n_frames", 1)
            if pages == 1 and image.mode in ("I", "F"):
                raise UndecodableImage("undecodable_image", "samples of 32 bits, whose range nothing tells")
            return pages
    except UndecodableImage:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises anything at all on damaged files
        raise UndecodableImage("undecodable_image", f"{type(error).__name__}: {error}") from error
