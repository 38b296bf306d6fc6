"""Chooses the decoder of a shard: fast threads of this process, or a child process after a crash.

Decoding in threads is fast, but an image that crashes or hangs a library ends the process, and would end it again in
every rerun. A marker file therefore exists while a shard is being processed. A worker that finds a marker decodes the
shard's images one by one in a child process, so that the image at fault becomes a dead letter. If decoding hangs, the
process exits and leaves its marker, because the hanging thread cannot be stopped and may hold the GIL or other locks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from pipeline.decoding.guarded_decoder import GuardedDecoder
from pipeline.decoding.images import decode
from transforms.storage import files

Decode = Callable[[bytes, int, int | None], tuple[np.ndarray, tuple[int, int]]]
"""The signature of `images.decode`."""

_CHECK_INTERVAL_S = 0.5


@contextlib.contextmanager
def decoder_for(marker: str, limit_s: float) -> Iterator[Decode]:
    """Provide a decoder with `limit_s` seconds per image. The file `marker` exists while the context is open."""
    guarded = files.exists(marker)
    files.write_bytes(marker, b"")
    try:
        with GuardedDecoder(limit_s) if guarded else WatchedDecoder(limit_s, _give_up) as decoder:
            yield decoder.decode
    finally:
        files.delete_if_there(marker)


def _give_up(limit_s: float) -> None:
    logging.critical(
        "decoding an image took longer than pool.max_decode_seconds (%g s) and cannot be stopped, so this process "
        "exits; run again: the image then becomes a dead letter, and nothing else is lost",
        limit_s,
    )
    os._exit(1)  # `sys.exit` would wait for the thread


class WatchedDecoder:
    """Runs `images.decode`, and calls `give_up(limit_s)` if one call takes longer than `limit_s` seconds."""

    def __init__(self, limit_s: float, give_up: Callable[[float], None]) -> None:
        self._limit_s, self._give_up = limit_s, give_up
        self._started_s: dict[int, float] = {}  # by thread
        self._done = threading.Event()

    def __enter__(self) -> WatchedDecoder:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def decode(
        self, content: bytes, max_pixels: int, draft_side_px: int | None = None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Return what `images.decode` returns."""
        thread = threading.get_ident()
        self._started_s[thread] = time.monotonic()
        try:
            return decode(content, max_pixels, draft_side_px)
        finally:
            del self._started_s[thread]

    def _watch(self) -> None:
        while not self._done.wait(_CHECK_INTERVAL_S):
            now_s = time.monotonic()
            if any(now_s - started_s > self._limit_s for started_s in list(self._started_s.values())):
                self._give_up(self._limit_s)
                return
