"""The perceptual hash of an image."""

from __future__ import annotations

import numpy as np
from PIL import Image

_SIDE = 32
_LOW = 8
_ROWS = np.arange(_LOW)[:, None]
_DCT = np.cos(np.pi * (2 * np.arange(_SIDE)[None, :] + 1) * _ROWS / (2 * _SIDE))


def perceptual_hash(pixels: np.ndarray) -> str:
    """16 hex digits: the 64-bit DCT hash of RGB uint8 pixels (height, width, 3).

    The image is made grey and resized to 32 x 32. Each bit says whether one of its 8 x 8 lowest DCT-II frequencies is
    above their median (our choice; the well-known pHash). Frequencies are rounded before they are compared, so that a
    flat image gets one hash and not the rounding noise of zeros.
    """
    grey = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    low = np.round(_DCT @ np.asarray(grey, dtype=np.float64) @ _DCT.T, 3)
    bits = np.packbits((low > np.median(low)).reshape(-1))
    return bits.tobytes().hex()
