"""Decodes images in child processes, so that an image that crashes or hangs the decoder affects no other image.

A child is also as fast as a thread of this process: its decoding never waits for the GIL, and what it sends is small.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pipeline.decoding.child_process import CannotStart, ChildProcess, Stalled
from pipeline.decoding.decoder_child import (
    ANSWER,
    CRASHED,
    FAULT,
    GO,
    MAX_TEXT_BYTES,
    PICTURE,
    READY,
    REQUEST,
    RESERVE,
)
from pipeline.decoding.images import UndecodableImage
from pipeline.decoding.memory import MemoryBudget

TIMEOUT = "decoder_timeout"
# Isolated (-I), because a `types.py` in the working folder would shadow the standard one. The package's parent folder
# is added explicitly, so that this also works when the package is not installed.
_MAIN = "import sys; sys.path.insert(0, sys.argv[1]); from pipeline.decoding.decoder_child import main; main()"
COMMAND: Sequence[str] = (sys.executable, "-I", "-c", _MAIN, str(Path(__file__).parents[2]))
_START_LIMIT_S = 120.0

DECODERS = min(8, len(os.sched_getaffinity(0)))
"""Child processes per process, at most: the cores that it may use, capped because each takes about 35 MB."""

LARGE_IMAGES_BYTES = 768 * 2**20
"""What the large images take that are decoded at the same time: for example three PNGs of 64 megapixels."""

Decode = Callable[[bytes, int, int | None], tuple[np.ndarray, tuple[int, int]]]
"""The signature of `images.decode`."""


class NoDecoder(RuntimeError):
    """The child process cannot be started, or something else ended it. The image is not at fault."""


class GuardedDecoder:
    """Runs `images.decode` in a child process, with `limit_s` seconds of CPU time per file and 8 GiB of memory.

    CPU time does not depend on how busy the machine is. Calls from several threads are serialized. The process starts
    with the first file, and again after it has crashed or been killed. Leaving the context ends it.
    """

    def __init__(self, limit_s: float, large_images: MemoryBudget | None = None) -> None:
        self._limit_s, self._lock = limit_s, threading.Lock()
        self._large_images = large_images or MemoryBudget(LARGE_IMAGES_BYTES)
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
            try:
                process.write(REQUEST.pack(max_pixels, draft_side_px or 0, self._limit_s, len(content)) + content)
                return self._answer(process, max_pixels)
            except Stalled as error:
                self._stop()
                raise UndecodableImage(TIMEOUT, f"the decoder waited for {self._limit_s:g} s for nothing") from error
            except (OSError, EOFError) as error:
                failure = self._failure(process.exit_status(), error)
                self._stop()
                raise failure from error

    def _failure(self, exit_status: int | None, error: Exception) -> Exception:
        if exit_status == -signal.SIGPROF:
            return UndecodableImage(TIMEOUT, f"decoding took more than {self._limit_s:g} s of CPU time")
        if exit_status == -signal.SIGKILL:
            return NoDecoder("a decoder process was killed, for example because the machine has no memory left")
        return UndecodableImage(CRASHED, f"the decoder crashed ({error})")

    def _answer(self, process: ChildProcess, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
        with contextlib.ExitStack() as held:
            tag, *sizes = self._header(process)
            if tag == RESERVE:
                held.enter_context(self._large_images.held(sizes[0]))
                process.write(GO)
                tag, *sizes = self._header(process)
            height, width, stored_width, stored_height = sizes
            if tag == PICTURE and height * width <= max_pixels:
                pixels = np.frombuffer(process.read(height * width * 3), np.uint8).reshape(height, width, 3)
                return pixels, (stored_width, stored_height)
        if tag == FAULT and max(sizes) <= MAX_TEXT_BYTES:
            reason, message = (process.read(size).decode("utf-8", "replace") for size in sizes[:2])
            raise UndecodableImage(reason, message)
        raise EOFError(f"unexpected answer {tag!r}")

    def _header(self, process: ChildProcess) -> tuple[bytes, int, int, int, int]:
        process.wait_for_output(self._limit_s)
        return ANSWER.unpack(process.read(ANSWER.size))

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


class DecoderPool:
    """At most `DECODERS` guarded decoders, which any number of threads share. Each starts when no other is idle."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._slots, self._large_images = threading.Semaphore(DECODERS), MemoryBudget(LARGE_IMAGES_BYTES)
        self._idle: list[GuardedDecoder] = []

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().__exit__()

    def decode(
        self, content: bytes, max_pixels: int, draft_side_px: int | None = None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """See `GuardedDecoder.decode`."""
        with self._slots:
            try:
                decoder = self._idle.pop()
            except IndexError:
                decoder = GuardedDecoder(self._limit_s, self._large_images)
            try:
                return decoder.decode(content, max_pixels, draft_side_px)
            finally:
                self._idle.append(decoder)


@functools.cache
def shared_decoders(limit_s: float) -> DecoderPool:
    """The decoders of this process, for all its shards and stages. They end with the process."""
    return DecoderPool(limit_s)
