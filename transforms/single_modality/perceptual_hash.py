"""What images are compared by: a hash that finds candidates, and a thumbnail that tells them apart. Our choice.

Both are computed from one copy of 32 x 32 px:

    hash        64 bits, one for each of the lowest DCT frequencies of the grey values (after pHash)
    thumbnail   8 x 8 cells of grey and 4 x 4 cells of each chroma, in steps

A copy of a picture that was encoded again, rescaled or cropped by a percent has nearly the same hash. So have many
different flags, icons and maps, because the bits know neither the size of an amplitude nor colours.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 32
HASH_BITS = 64
BANDS = 4
GREY_CELLS, CHROMA_CELLS = 8, 4  # on each side
GREY_STEP, LEAST_GREY_STEP, CHROMA_STEP = 17, 2, 8  # of 255 levels; black and white are in the middle of their steps
THUMBNAIL_BYTES = (GREY_CELLS**2 + 2 * CHROMA_CELLS**2) // 2

_FREQUENCIES = 16
_BASIS = np.cos(np.pi * (2 * np.arange(SIDE)[None, :] + 1) * np.arange(_FREQUENCIES)[:, None] / (2 * SIDE))
_LOWEST = sorted(
    ((u, v) for u in range(_FREQUENCIES) for v in range(_FREQUENCIES) if u + v),
    key=lambda uv: (uv[0] ** 2 + uv[1] ** 2, uv),
)[:HASH_BITS]
_IN_TURNS = tuple(np.array([_LOWEST[band::BANDS] for band in range(BANDS)]).reshape(HASH_BITS, 2).T)
_CONTRAST_SHARE, _LEAST_AMPLITUDE = 5.0, 32.0


def small_copy(pixels: np.ndarray) -> np.ndarray:
    """RGB uint8 (32, 32, 3) of RGB uint8 pixels (height, width, 3)."""
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0))


def perceptual_hash(small: np.ndarray) -> str:
    """16 hex digits: the 64-bit DCT hash of a small copy.

    A bit says whether a frequency's coefficient is above a threshold, which rises with the contrast of the image. With
    a threshold of 0, or with the median, the bits of a symmetric drawing, whose coefficients are 0, would be noise. The
    frequencies go to the four fields of 16 bits in turns, so that each field holds low and high ones.
    """
    grey = np.asarray(Image.fromarray(small).convert("L"), np.float64)
    threshold = max(_LEAST_AMPLITUDE, _CONTRAST_SHARE * float(grey.std()))
    coefficients = np.round(_BASIS @ grey @ _BASIS.T, 3)[_IN_TURNS]
    return np.packbits(coefficients > threshold).tobytes().hex()


def thumbnail(small: np.ndarray) -> bytes:
    """48 bytes, two cells a byte: 64 grey cells, then 16 cells each of Cb and Cr in steps of 8.

    A grey step is 17 levels. In an image of low contrast, such as a drawing of thin lines, it is a third of the
    standard deviation, around the same mean. Chroma beyond 60 of 127 counts as 60: such colours differ in the other
    chroma or in grey.
    """
    luma, *chroma = np.moveaxis(np.asarray(Image.fromarray(small).convert("YCbCr"), np.float64), -1, 0)
    mean, step = luma.mean(), np.clip(luma.std() / 3, LEAST_GREY_STEP, GREY_STEP)
    grey = (_cells(luma, GREY_CELLS) - mean) / step + mean / GREY_STEP
    colour = [(_cells(values, CHROMA_CELLS) - 128) / CHROMA_STEP + 8 for values in chroma]
    steps = np.clip(np.round(np.concatenate([grey, *colour])), 0, 15).astype(np.uint8)
    return (steps[0::2] << 4 | steps[1::2]).tobytes()


def _cells(values: np.ndarray, count: int) -> np.ndarray:
    """The means of `count` x `count` cells, (count * count,)."""
    side = SIDE // count
    return values.reshape(count, side, count, side).mean((1, 3)).reshape(-1)


def steps_of(thumbnails: np.ndarray) -> np.ndarray:
    """The steps of all cells, int8 (n, 96), of thumbnails uint8 (n, 48): those of grey before those of chroma."""
    return np.stack([thumbnails >> 4, thumbnails & 15], axis=2).reshape(-1, 2 * THUMBNAIL_BYTES).astype(np.int8)


def steps_apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The largest difference of a cell between thumbnails, in steps, int8 (n,), of steps (n, 96).

    One step by which all of the picture is brighter or darker does not count.
    """
    difference = one - other
    grey, chroma = difference[:, : GREY_CELLS**2], difference[:, GREY_CELLS**2 :]
    brighter = np.clip(np.round(grey.mean(axis=1)), -1, 1).astype(np.int8)
    return np.maximum(np.abs(grey - brighter[:, None]).max(axis=1), np.abs(chroma).max(axis=1))
