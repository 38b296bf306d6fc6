"""Which decoder a shard gets. Threads of this process are the fast one (`images.decode`), but a library that crashes or
hangs on one hostile picture takes the process with it, and would do so again in every rerun.

A mark lies there while a shard is in hand. Whoever finds one follows somebody who did not come to an end: that may have
been a picture's doing, so this time they are decoded in another process, one by one, and the guilty one gets its dead
letter. A decoder that hangs ends the process, and so leaves its mark; the GIL and all locks may be with it.
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
"""As `images.decode`."""

_LOOK_EVERY_S = 0.5


@contextlib.contextmanager
def decoder_of(mark: str, limit_s: float) -> Iterator[Decode]:
    """The decoder for what is in hand while the file `mark` is there. It has `limit_s` seconds for a picture."""
    guarded = files.exists(mark)
    files.write_bytes(mark, b"")
    try:
        with GuardedDecoder(limit_s) if guarded else WatchedDecoder(limit_s, _give_up) as decoder:
            yield decoder.decode
    finally:
        files.delete_if_there(mark)


def _give_up(limit_s: float) -> None:
    logging.critical(
        "a picture has been decoding for more than pool.max_decode_seconds, %g s, and cannot be stopped, so this "
        "process ends; run again: that picture then becomes a dead letter, and nothing else is lost",
        limit_s,
    )
    os._exit(1)  # not `sys.exit`, which would wait for the thread


class WatchedDecoder:
    """`images.decode`, and `give_up(limit_s)` where one call takes longer than that."""

    def __init__(self, limit_s: float, give_up: Callable[[float], None]) -> None:
        self._limit_s, self._give_up = limit_s, give_up
        self._begun_s: dict[int, float] = {}  # by thread
        self._done = threading.Event()

    def __enter__(self) -> WatchedDecoder:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def decode(
        self, content: bytes, max_pixels: int, draft_side_px: int | None = None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """As `images.decode`."""
        thread = threading.get_ident()
        self._begun_s[thread] = time.monotonic()
        try:
            return decode(content, max_pixels, draft_side_px)
        finally:
            del self._begun_s[thread]

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_EVERY_S):
            now_s = time.monotonic()
            if any(now_s - begun_s > self._limit_s for begun_s in list(self._begun_s.values())):
                self._give_up(self._limit_s)
                return
