"""Decodes images in a separate process, which `guarded_decoder.py` starts and controls over standard input and output.

    request   REQUEST: max_pixels, draft_side_px (0: none), size in bytes; then the file
    answer    PICTURE (height, width, stored width, stored height; then RGB bytes), or FAULT (sizes in bytes of reason
              and message, 0, 0; then both as UTF-8)

The process sends READY once, after its imports.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
from typing import BinaryIO

from pipeline.decoding.images import UndecodableImage, decode

REQUEST = struct.Struct(">QIQ")
ANSWER = struct.Struct(">cIIII")
READY, PICTURE, FAULT = b"R", b"P", b"F"
CRASHED = "crashed_decoder"
MAX_TEXT_BYTES = 2000

# Several times what the largest image that a recipe can allow needs (178 megapixels, four channels).
_MAX_ADDRESS_SPACE_BYTES = 8 * 2**30


def main() -> None:
    """Answer requests until the parent closes standard input."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps output of libraries out of the answers
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE_BYTES, _MAX_ADDRESS_SPACE_BYTES))
    _send(answers, READY)
    while header := requests.read(REQUEST.size):
        max_pixels, draft_side_px, size_bytes = REQUEST.unpack(header)
        try:
            pixels, (width, height) = decode(requests.read(size_bytes), max_pixels, draft_side_px or None)
        except UndecodableImage as error:
            _send_fault(answers, error.reason, str(error))
        except MemoryError:
            _send_fault(answers, CRASHED, f"decoding takes more than {_MAX_ADDRESS_SPACE_BYTES >> 30} GiB of memory")
        else:
            _send(answers, PICTURE, (*pixels.shape[:2], width, height), pixels.tobytes())


def _send(
    answers: BinaryIO, tag: bytes, sizes: tuple[int, int, int, int] = (0, 0, 0, 0), content: bytes = b""
) -> None:
    answers.write(ANSWER.pack(tag, *sizes) + content)
    answers.flush()


def _send_fault(answers: BinaryIO, reason: str, message: str) -> None:
    texts = reason.encode(), message.encode("utf-8", "replace")[:MAX_TEXT_BYTES]
    _send(answers, FAULT, (len(texts[0]), len(texts[1]), 0, 0), b"".join(texts))
