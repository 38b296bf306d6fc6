"""Decodes images in a separate process, which `guarded_decoder.py` starts and controls over standard input and output.

    request   REQUEST: max_pixels, draft_side_px (0: none), limit in seconds of CPU time, size in bytes; then the file
    answer    RESERVE (size in bytes, 0, 0, 0), for a large image; decoding goes on when GO comes
              PICTURE (height, width, stored width, stored height; then RGB bytes), or FAULT (sizes in bytes of reason
              and message, 0, 0; then both as UTF-8)

The process sends READY once, after its imports. The kernel ends it with SIGPROF once an image exceeds its CPU time.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from typing import BinaryIO

import numpy as np
from PIL import Image

from pipeline.decoding.images import UndecodableImage, decode

REQUEST = struct.Struct(">QIdQ")
ANSWER = struct.Struct(">cQIII")
READY, RESERVE, PICTURE, FAULT = b"R", b"M", b"P", b"F"
GO = b"G"
CRASHED = "crashed_decoder"
MAX_TEXT_BYTES = 2000
UNRESERVED_BYTES = 32 * 2**20  # an image that takes less is decoded without asking; most do

# Several times what the largest image that a recipe can allow needs (178 megapixels, four channels).
_MAX_ADDRESS_SPACE_BYTES = 8 * 2**30
_MAX_ERRORS_BYTES = 2**20  # what libraries may write on standard error, which is a file


def main() -> None:
    """Answer requests until the parent closes standard input."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps output of libraries out of the answers
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE_BYTES, _MAX_ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_ERRORS_BYTES, _MAX_ERRORS_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    Image.init()  # imports the formats, which is no image's CPU time

    def reserve(size_bytes: int) -> None:
        if size_bytes > UNRESERVED_BYTES:
            _send(answers, RESERVE, (size_bytes, 0, 0, 0))
            if requests.read(len(GO)) != GO:
                raise EOFError("the parent has ended")

    _send(answers, READY)
    while header := requests.read(REQUEST.size):
        max_pixels, draft_side_px, limit_s, size_bytes = REQUEST.unpack(header)
        content = requests.read(size_bytes)
        try:
            signal.setitimer(signal.ITIMER_PROF, limit_s)
            pixels, (width, height) = decode(content, max_pixels, draft_side_px or None, reserve=reserve)
        except UndecodableImage as error:
            _send_fault(answers, error.reason, str(error))
        except MemoryError:
            _send_fault(answers, CRASHED, f"decoding takes more than {_MAX_ADDRESS_SPACE_BYTES >> 30} GiB of memory")
        else:
            _send(answers, PICTURE, (*pixels.shape[:2], width, height), np.ascontiguousarray(pixels).data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _send(
    answers: BinaryIO, tag: bytes, sizes: tuple[int, int, int, int] = (0, 0, 0, 0), content: bytes | memoryview = b""
) -> None:
    answers.write(ANSWER.pack(tag, *sizes))
    answers.write(content)
    answers.flush()


def _send_fault(answers: BinaryIO, reason: str, message: str) -> None:
    texts = reason.encode(), message.encode("utf-8", "replace")[:MAX_TEXT_BYTES]
    _send(answers, FAULT, (len(texts[0]), len(texts[1]), 0, 0), b"".join(texts))
