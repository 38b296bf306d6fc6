"""Bounds the memory that concurrent work takes together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class MemoryBudget:
    """A number of bytes that threads share. A request that exceeds all of it waits until it can have all."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = self._free_bytes = size_bytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def held(self, size_bytes: int) -> Iterator[None]:
        """Wait until `size_bytes` are free, and hold them while the context is open."""
        wanted = min(size_bytes, self._size_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._free_bytes >= wanted)
            self._free_bytes -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._free_bytes += wanted
                self._changed.notify_all()
