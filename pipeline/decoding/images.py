"""Decodes the images of a pool. The bytes are untrusted: few formats, bounded sizes, a reason code per failure."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
from PIL import AvifImagePlugin, Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from pipeline.decoding.formats import described, format_of

VERSION = 2
"""Part of the cache keys: tables made with another version are computed again. Raise it when pixels change."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

MAX_KEPT_PIXELS = 2**22  # 12 MiB of RGB; larger images are reduced by whole factors
_STRIP_PIXELS = 2**20

_START_OF_SCAN = b"\xff\xda"
_MAX_SCANS_AT_FULL_SIZE = 16  # a progressive JPEG usually has 10 scans

# What decoding a large image takes, measured on images of 16 and 64 megapixels in each mode, rounded up.
_BYTES_PER_PIXEL = {"JPEG": 5, "PNG": 5, "GIF": 3, "BMP": 5, "TIFF": 6, "WEBP": 18, "AVIF": 14}
_MOST_BYTES_PER_PIXEL = 20
_PROGRESSIVE_BYTES_PER_PIXEL = 6  # coefficients of the full size, also where the draft is small

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_FIRST_ON_ITS_SIDE = 5


def silence_pillow() -> None:
    """Ignore Pillow's warnings about sizes and palettes, because `decode` applies its own size limit.

    The filter applies to the process, because `catch_warnings` is not thread-safe and several threads decode at once.
    """
    warnings.filterwarnings("ignore", module=r"PIL(\..*)?$")


silence_pillow()
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # by default one image uses all cores


class UndecodableImage(ValueError):
    """An image that cannot be decoded; `reason` is the dead letter's code."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


def decode(
    content: bytes,
    max_pixels: int,
    draft_side_px: int | None = None,
    formats: tuple[str, ...] = FORMATS,
    reserve: Callable[[int], object] = lambda size_bytes: None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return RGB uint8 pixels (height, width, 3) and the stored (width, height) in px, both upright.

    The first frame or page is decoded, composed on white where it is transparent, and turned upright as its EXIF
    orientation says. 16-bit grey is scaled, where Pillow would clip it to white.

    With `draft_side_px`, a JPEG may be decoded at a reduced DCT size, which is several times faster. Neither side is
    then reduced below `draft_side_px`. An image of more than `MAX_KEPT_PIXELS` is reduced by averaging blocks of whole
    pixels: to sides of about `draft_side_px`, or without it to `MAX_KEPT_PIXELS`.

    `reserve` is called with the memory in bytes that decoding takes at most, before it is used.
    Raises UndecodableImage.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            _check_bounds(image, content, max_pixels)
            width, height = size = image.size
            if draft_side_px is not None:
                image.draft("RGB", (draft_side_px, draft_side_px))
            elif width * height > MAX_KEPT_PIXELS:
                across, down = _factors(width, height, None)
                image.draft("RGB", (width // across, height // down))
            reserve(_working_bytes(image, size))
            image.load()
            orientation = _orientation(image)
            pixels = _pixels(image, draft_side_px)
    except UndecodableImage:
        raise
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise UndecodableImage("undecodable_image", _refusal(content, formats)) from error
    except Image.DecompressionBombError as error:
        raise UndecodableImage("image_too_large", str(error)) from error
    except MemoryError:  # the image's size was checked, so this machine is out of memory
        raise
    except Exception as error:  # Pillow's decoders may raise any exception on hostile bytes
        raise UndecodableImage("undecodable_image", f"{type(error).__name__}: {error}") from error
    if orientation not in _UPRIGHT:
        return pixels, size
    upright = np.asarray(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))
    return upright, (height, width) if orientation >= _FIRST_ON_ITS_SIDE else size


def _check_bounds(image: Image.Image, content: bytes, max_pixels: int) -> None:
    width, height = image.size
    pixels = width * height
    if pixels == 0:
        raise UndecodableImage("undecodable_image", f"the image is empty: {width}x{height} px")
    if pixels > max_pixels:
        raise UndecodableImage("image_too_large", f"{width}x{height} px; the recipe allows {max_pixels}")
    # A scan of a few bytes processes the complete image, and a file can hold a hundred thousand scans.
    scans = content.count(_START_OF_SCAN) if isinstance(image, JpegImageFile) else 1
    if scans * pixels > _MAX_SCANS_AT_FULL_SIZE * max_pixels:
        raise UndecodableImage("image_too_large", f"{scans} scans of {width}x{height} px")
    if isinstance(image, TiffImageFile):
        across, down = (image.tag_v2.get(tag, 1) for tag in (TILEWIDTH, TILELENGTH))
        if across * down > max_pixels:  # libtiff unpacks a complete tile, however small the image is
            raise UndecodableImage("image_too_large", f"a tile has {across}x{down} px; the recipe allows {max_pixels}")


def _working_bytes(image: Image.Image, stored: tuple[int, int]) -> int:
    """Return an upper bound of the memory that decoding takes; `image` has the size of its draft."""
    size_bytes = _BYTES_PER_PIXEL.get(image.format or "", _MOST_BYTES_PER_PIXEL) * image.width * image.height
    if image.info.get("progressive"):
        size_bytes += _PROGRESSIVE_BYTES_PER_PIXEL * stored[0] * stored[1]
    return size_bytes


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data raises anything; like a viewer, take the image for upright
        return 1


def _pixels(image: Image.Image, draft_side_px: int | None) -> np.ndarray:
    """Return the RGB pixels of a loaded image, reduced where there are more than `MAX_KEPT_PIXELS`."""
    width, height = image.size
    if width * height <= MAX_KEPT_PIXELS:
        return np.asarray(_on_white(image))
    factors = _factors(width, height, draft_side_px)
    # Strip by strip, so that there is no second copy of the full size.
    rows = factors[1] * max(1, _STRIP_PIXELS // (width * factors[1]))
    strips = (image.crop((0, top, width, min(height, top + rows))) for top in range(0, height, rows))
    return np.concatenate([np.asarray(_on_white(strip).reduce(factors)) for strip in strips])


def _factors(width: int, height: int, draft_side_px: int | None) -> tuple[int, int]:
    """Return the whole factors by which the width and the height of a large image are reduced.

    Both are the same, unless the longer side alone is too long.
    """
    short, long = sorted((width, height))
    if draft_side_px is None:
        factor = math.ceil(math.sqrt(width * height / MAX_KEPT_PIXELS))
        while factor < short and math.ceil(short / factor) * math.ceil(long / factor) > MAX_KEPT_PIXELS:
            factor += 1
    else:
        factor = max(1, short // draft_side_px)
    along = max(factor, math.ceil(long / (MAX_KEPT_PIXELS // math.ceil(short / factor))))
    return (along, factor) if width > height else (factor, along)


def _on_white(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB as img2dataset does: what is transparent becomes white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(_high_bytes(image)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UndecodableImage("undecodable_image", "32-bit samples are not supported; their range is unknown")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")


def _high_bytes(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return grey


def _refusal(content: bytes, formats: tuple[str, ...]) -> str:
    """Return why Pillow opened no image: the file is damaged, or of another format."""
    name = format_of(content)
    if name in formats:
        return f"the file is a damaged {name}"
    return f"the file is {described(content)}; supported: {', '.join(formats)}"
