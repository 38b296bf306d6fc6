"""Decodes images with tensorflow-io, in a separate environment (constraints-tfio.txt).

`tfio_decoder.py` starts this file as `python -I tfio_child.py` and controls it over standard input and output. The file
imports nothing from pairsift, because that environment does not contain it. It imports TensorFlow only in `main`, so
that the parent process can import the message formats:

    request   REQUEST: kind, pages, max_pixels, size in bytes; then the file
    answer    any number of PICTURE (height, width; then RGB bytes) and FAULT (size in bytes; then UTF-8 text), then END

The process sends READY once, after loading TensorFlow.
"""

from __future__ import annotations

import functools
import os
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

REQUEST = struct.Struct(">8sIQQ")
ANSWER = struct.Struct(">cII")
READY, PICTURE, FAULT, END = b"R", b"P", b"F", b"."

DICOM, TIFF, EXR, JPEG_2000 = b"DICOM", b"TIFF", b"EXR", b"JPEG2000"

# An image of 64 megapixels takes 2 GB as three float32 channels, including intermediate results.
_MAX_ADDRESS_SPACE_BYTES = 8 * 2**30

_CODESTREAM = b"\xff\x4f\xff\x51"  # start of codestream, then its size segment (ISO 15444-1, A.5.1)
_SRGB, _GREY, _SYCC = 16, 17, 18  # a JP2's enumerated colour spaces (ISO 15444-1, I.5.3.3)


def main() -> None:
    """Answer requests until the parent closes standard input."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps output of libraries out of the answers
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import tensorflow  # noqa: F401
    import tensorflow_io

    resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE_BYTES, _MAX_ADDRESS_SPACE_BYTES))
    _send(answers, READY)
    while header := requests.read(REQUEST.size):
        kind, pages, max_pixels, size_bytes = REQUEST.unpack(header)
        content = requests.read(size_bytes)
        _answer(answers, _DECODERS[kind.rstrip(b"\0")](tensorflow_io, content, pages), max_pixels)


def _answer(answers: BinaryIO, pictures: Iterator[Callable[[], np.ndarray]], max_pixels: int) -> None:
    try:
        for decoded in pictures:
            try:
                pixels = _rgb(decoded())
                height, width = pixels.shape[:2]
                if height * width > max_pixels:
                    raise ValueError(f"{width}x{height} px; the recipe allows {max_pixels}")
            except Exception as error:  # affects one page; the others may be valid
                _send_fault(answers, error)
            else:
                _send(answers, PICTURE, height, width, pixels.tobytes())
    except Exception as error:  # affects the file; the parent adds its name
        _send_fault(answers, error)
    _send(answers, END)


def _send(answers: BinaryIO, tag: bytes, first: int = 0, second: int = 0, content: bytes = b"") -> None:
    answers.write(ANSWER.pack(tag, first, second) + content)
    answers.flush()


def _send_fault(answers: BinaryIO, error: Exception) -> None:
    without_prefix = str(error).removeprefix("{{function_node ").partition("}} ")[2]  # drops TensorFlow's prefix
    text = " ".join((without_prefix or str(error)).split())[:500].encode("utf-8", "replace")
    _send(answers, FAULT, len(text), 0, text)


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 (h, w), (h, w, 1), (h, w, 3) or with an alpha channel, which is dropped, to uint8 (h, w, 3)."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    colours = pixels[:, :, :1] if pixels.shape[2] < 3 else pixels[:, :, :3]
    return np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))


def _dicom(tfio: Any, content: bytes, pages: int) -> Iterator[Callable[[], np.ndarray]]:
    """Decode every frame.

    Frames of more than 8 bits are scaled from their own darkest to their own brightest value (our choice). Scanners use
    a small part of the range, so a frame scaled by the full range would be black.
    """
    frames = tfio.image.decode_dicom_image(
        content, color_dim=True, on_error="strict", scale="auto", dtype="uint16"
    ).numpy()
    bits = int(tfio.image.decode_dicom_data(content, tfio.image.dicom_tags.BitsStored).numpy() or 8)
    for frame in frames:
        yield functools.partial(_stretched if bits > 8 else _high_bytes, frame)


def _high_bytes(frame: np.ndarray) -> np.ndarray:
    return (frame >> 8).astype(np.uint8)


def _stretched(frame: np.ndarray) -> np.ndarray:
    low, high = int(frame.min()), int(frame.max())
    return ((frame.astype(np.uint32) - low) * 255 // max(1, high - low)).astype(np.uint8)


def _tiff(tfio: Any, content: bytes, pages: int) -> Iterator[Callable[[], np.ndarray]]:
    """Decode every page to RGBA with libtiff."""
    for page in range(pages):
        yield functools.partial(_tiff_page, tfio, content, page)


def _tiff_page(tfio: Any, content: bytes, page: int) -> np.ndarray:
    return tfio.experimental.image.decode_tiff(content, page).numpy()


def _exr(tfio: Any, content: bytes, pages: int) -> Iterator[Callable[[], np.ndarray]]:
    """Decode R, G and B of the first part, or Y: linear light, clipped to [0, 1] and converted to sRGB (our choice)."""

    def decoded() -> np.ndarray:
        _, types, names = (column.numpy()[0] for column in tfio.experimental.image.decode_exr_info(content))
        type_of = {name.decode("utf-8", "replace"): int(type_) for name, type_ in zip(names, types, strict=True)}
        wanted = "RGB" if {*"RGB"} <= type_of.keys() else "Y"
        if wanted[0] not in type_of:
            raise ValueError(f"the channels are {', '.join(sorted(type_of))}; supported: R, G and B, or Y")
        # TensorFlow aborts if the type is not that of the channel.
        planes = [tfio.experimental.image.decode_exr(content, 0, name, type_of[name]).numpy() for name in wanted]
        return _srgb(np.stack(planes, axis=-1).astype(np.float32))

    yield decoded


def _srgb(linear: np.ndarray) -> np.ndarray:
    """Convert linear light to bytes with sRGB's transfer function (IEC 61966-2-1)."""
    light = np.clip(np.nan_to_num(linear, posinf=1.0, neginf=0.0), 0.0, 1.0)
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * shown).astype(np.uint8)


def _jpeg_2000(tfio: Any, content: bytes, pages: int) -> Iterator[Callable[[], np.ndarray]]:
    """Decode a JP2 file, or a bare codestream, which is first wrapped in a JP2 file."""

    def decoded() -> np.ndarray:
        at = content.find(_CODESTREAM)
        width, height, left, top = struct.unpack_from(">4I", content, at + 8)
        (components,) = struct.unpack_from(">H", content, at + 40)
        depths = {content[at + 42 + 3 * component] + 1 for component in range(components)}
        if len(depths) != 1 or not 8 <= (bits := depths.pop()) <= 16:
            raise ValueError("unsupported components; supported: unsigned, 8 to 16 bits, all of one depth")
        colours = content.find(b"colr\x01", 0, at)
        if colours >= 0 and struct.unpack_from(">I", content, colours + 7) == (_SYCC,):
            raise ValueError("the colour space is sYCC, which is not supported")
        file = content if at else _jp2(content, width - left, height - top, components, bits)
        # TensorFlow aborts if the type is not that of the components.
        pixels = tfio.experimental.image.decode_jp2(file, dtype="uint8" if bits == 8 else "uint16").numpy()
        return (pixels >> (bits - 8)).astype(np.uint8)

    yield decoded


def _jp2(codestream: bytes, width: int, height: int, components: int, bits: int) -> bytes:
    """Wrap a codestream in a minimal JP2 file (ISO 15444-1, annex I)."""

    def box(type_: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), type_) + content

    size = box(b"ihdr", struct.pack(">IIHBBBB", height, width, components, bits - 1, 7, 0, 0))
    colours = box(b"colr", struct.pack(">BBBI", 1, 0, 0, _SRGB if components >= 3 else _GREY))
    return (
        box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ") + box(b"jp2h", size + colours)
        + box(b"jp2c", codestream)
    )  # fmt: skip


_DECODERS = {DICOM: _dicom, TIFF: _tiff, EXR: _exr, JPEG_2000: _jpeg_2000}


if __name__ == "__main__":
    main()
