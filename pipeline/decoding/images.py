"""Decoding pool images. The bytes are hostile: few formats, bounded sizes, and every failure has a reason."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

FORMATS = ("JPEG", "PNG", "WEBP")

_START_OF_SCAN = b"\xff\xda"
_MAX_SCANS_AT_FULL_SIZE = 16  # a progressive JPEG usually has 10


def silence_pillow() -> None:
    """No hints about sizes and palettes; our own bound decides. For the whole process, because `catch_warnings` around
    each decoding would tangle the filters of threads that decode at the same time."""
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
    """RGB uint8 pixels (height, width, 3) and the stored (width, height) in px.

    With `draft_side_px` the pixels may come smaller, but with both sides at least that long where the image has them:
    JPEG decodes at a reduced DCT size, which is several times faster. Colours convert as open_clip's transform does
    (alpha is dropped, EXIF rotation ignored), but 16-bit grey is scaled, where Pillow would clip it to white.
    Raises UndecodableImage.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            size = image.size
            pixels = size[0] * size[1]
            if pixels == 0:
                raise UndecodableImage("undecodable_image", f"{size[0]}x{size[1]} px")
            if pixels > max_pixels:
                raise UndecodableImage("image_too_large", f"{size[0]}x{size[1]} px; the recipe allows {max_pixels}")
            # A scan of a few bytes goes over the whole picture, and a file has room for a hundred thousand of them.
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
    except UnidentifiedImageError as error:  # its own message names a memory address
        raise UndecodableImage("undecodable_image", f"the bytes are none of {', '.join(formats)}") from error
    except Image.DecompressionBombError as error:
        raise UndecodableImage("image_too_large", str(error)) from error
    except MemoryError:  # this machine's fault, not the picture's: its size was checked
        raise
    except Exception as error:  # Pillow's decoders raise anything at all on hostile bytes
        raise UndecodableImage("undecodable_image", f"{type(error).__name__}: {error}") from error
