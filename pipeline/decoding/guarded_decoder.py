"""Decoding in another process, which costs a file that crashes or hangs its decoder, and no other."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.decoding.child_process import CannotStart, ChildProcess, Limit
from pipeline.decoding.decoder_child import ANSWER, CRASHED, FAULT, MAX_TEXT_BYTES, PICTURE, READY, REQUEST
from pipeline.decoding.images import UndecodableImage

TIMEOUT = "decoder_timeout"
# Isolated, because a `types.py` in the user's folder is not Python's; and from where this package is, installed or not.
_MAIN = "import sys; sys.path.insert(0, sys.argv[1]); from pipeline.decoding.decoder_child import main; main()"
COMMAND: Sequence[str] = (sys.executable, "-I", "-c", _MAIN, str(Path(__file__).parents[2]))
_START_LIMIT_S = 120.0


class NoDecoder(RuntimeError):
    """The process cannot be started: no picture's fault."""


class GuardedDecoder:
    """`images.decode` in a process that has `limit_s` seconds a file, and 8 GiB. One file at a time, whichever thread
    asks. The process starts with the first file, and again after it was lost. Leaving the context ends it."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._lock = limit_s, threading.Lock()
        self._process: ChildProcess | None = None

    def __enter__(self) -> GuardedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stop()

    def decode(
        self, content: bytes, max_pixels: int, draft_side_px: int | None = None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """As `images.decode`, to the byte; UndecodableImage has two reasons more, `crashed_decoder` and
        `decoder_timeout`. Raises NoDecoder."""
        with self._lock:
            process = self._started()
            limit = Limit(process, self._limit_s)
            try:
                with limit:
                    process.write(REQUEST.pack(max_pixels, draft_side_px or 0, len(content)) + content)
                    return _answer(process, max_pixels)
            except (OSError, EOFError) as error:
                self._stop()
                if limit.passed:
                    raise UndecodableImage(TIMEOUT, f"took more than {self._limit_s:g} s") from error
                raise UndecodableImage(CRASHED, f"the decoder broke off ({error})") from error

    def _started(self) -> ChildProcess:
        if self._process is not None and self._process.is_there():
            return self._process
        self._stop()
        try:
            self._process = ChildProcess.started(COMMAND, ANSWER.pack(READY, 0, 0, 0, 0), _START_LIMIT_S)
        except CannotStart as error:
            raise NoDecoder(f"{COMMAND[0]}: its decoder {error}") from error
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


def _answer(process: ChildProcess, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    tag, *sizes = ANSWER.unpack(process.read(ANSWER.size))
    height, width, stored_width, stored_height = sizes
    if tag == PICTURE and height * width <= max_pixels:
        pixels = np.frombuffer(process.read(height * width * 3), np.uint8).reshape(height, width, 3)
        return pixels, (stored_width, stored_height)
    if tag == FAULT and max(sizes) <= MAX_TEXT_BYTES:
        reason, message = (process.read(size).decode("utf-8", "replace") for size in sizes[:2])
        raise UndecodableImage(reason, message)
    raise EOFError(f"unknown answer {tag!r}")
