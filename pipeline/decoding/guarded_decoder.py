"""Decodes images in a child process, so that an image that crashes or hangs the decoder affects no other image."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.decoding.child_process import CannotStart, ChildProcess, TimeLimit
from pipeline.decoding.decoder_child import ANSWER, CRASHED, FAULT, MAX_TEXT_BYTES, PICTURE, READY, REQUEST
from pipeline.decoding.images import UndecodableImage

TIMEOUT = "decoder_timeout"
# Isolated (-I), because a `types.py` in the working folder would shadow the standard one. The package's parent folder
# is added explicitly, so that this also works when the package is not installed.
_MAIN = "import sys; sys.path.insert(0, sys.argv[1]); from pipeline.decoding.decoder_child import main; main()"
COMMAND: Sequence[str] = (sys.executable, "-I", "-c", _MAIN, str(Path(__file__).parents[2]))
_START_LIMIT_S = 120.0


class NoDecoder(RuntimeError):
    """The child process cannot be started. The image is not at fault."""


class GuardedDecoder:
    """Runs `images.decode` in a child process, with `limit_s` seconds per file and 8 GiB of memory.

    Calls from several threads are serialized. The process starts with the first file, and again after it has crashed or
    been killed. Leaving the context ends it.
    """

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
        """Return exactly what `images.decode` returns.

        Raises UndecodableImage, with the additional reasons `crashed_decoder` and `decoder_timeout`, and NoDecoder.
        """
        with self._lock:
            process = self._started()
            limit = TimeLimit(process, self._limit_s)
            try:
                with limit:
                    process.write(REQUEST.pack(max_pixels, draft_side_px or 0, len(content)) + content)
                    return _answer(process, max_pixels)
            except (OSError, EOFError) as error:
                self._stop()
                if limit.exceeded:
                    raise UndecodableImage(TIMEOUT, f"decoding took more than {self._limit_s:g} s") from error
                raise UndecodableImage(CRASHED, f"the decoder crashed ({error})") from error

    def _started(self) -> ChildProcess:
        if self._process is not None and self._process.is_running():
            return self._process
        self._stop()
        try:
            self._process = ChildProcess.started(COMMAND, ANSWER.pack(READY, 0, 0, 0, 0), _START_LIMIT_S)
        except CannotStart as error:
            raise NoDecoder(f"{COMMAND[0]}: the decoder process {error}") from error
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
    raise EOFError(f"unexpected answer {tag!r}")
