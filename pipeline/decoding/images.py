"""Decodes the images of a pool. The bytes are untrusted: few formats, bounded sizes, a reason code per failure."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

FORMATS = ("JPEG", "PNG", "WEBP")

_START_OF_SCAN = b"\xff\xda"
_MAX_SCANS_AT_FULL_SIZE = 16  # a progressive JPEG usually has 10 scans


def silence_pillow() -> None:
    """Ignore Pillow's warnings about sizes and palettes, because `decode` applies its own size limit.

    The filter applies to the process, because `catch_warnings` is not thread-safe and several threads decode at once.
    """
    warnings.filterwarnings("ignore", module=r"PIL(\..*)?$")


silence_pillow()


class UndecodableImage(ValueError):
    """An image that cannot be decoded; `reason` is the dead letter's code."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


def decode(
    content: bytes, max_pixels: int, draft_side_px: int | None = None, formats: tuple[str, ...] = FORMATS
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return RGB uint8 pixels (height, width, 3) and the stored (width, height) in px.

    With `draft_side_px`, a JPEG may be decoded at a reduced DCT size, which is several times faster. Neither side is
    then reduced below `draft_side_px`. Colours are converted as in open_clip's transform (alpha is dropped, EXIF
    rotation is ignored), except that 16-bit grey is scaled, where Pillow would clip it to white.
    Raises UndecodableImage.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            size = image.size
            pixels = size[0] * size[1]
            if pixels == 0:
                raise UndecodableImage("undecodable_image", f"the image is empty: {size[0]}x{size[1]} px")
            if pixels > max_pixels:
                raise UndecodableImage("image_too_large", f"{size[0]}x{size[1]} px; the recipe allows {max_pixels}")
            # A scan of a few bytes processes the complete image, and a file can hold a hundred thousand scans.
            scans = content.count(_START_OF_SCAN) if isinstance(image, JpegImageFile) else 1
            if scans * pixels > _MAX_SCANS_AT_FULL_SIZE * max_pixels:
                raise UndecodableImage("image_too_large", f"{scans} scans of {size[0]}x{size[1]} px")
            if draft_side_px is not None:
                image.draft("RGB", (draft_side_px, draft_side_px))
            if image.mode.startswith("I"):
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2), size
            return np.asarray(image.convert("RGB")), size
    except UndecodableImage:
        raise
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise UndecodableImage("undecodable_image", f"the format is none of {', '.join(formats)}") from error
    except Image.DecompressionBombError as error:
        raise UndecodableImage("image_too_large", str(error)) from error
    except MemoryError:  # the image's size was checked, so this machine is out of memory
        raise
    except Exception as error:  # Pillow's decoders may raise any exception on hostile bytes
        raise UndecodableImage("undecodable_image", f"{type(error).__name__}: {error}") from error
