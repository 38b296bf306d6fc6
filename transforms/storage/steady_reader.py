"""Reads that retry, for files on a network."""

from __future__ import annotations

import io
from time import sleep
from typing import Any

from transforms.storage import files, trees

_DELAYS_SECONDS = (0.5, 1.0, 2.0, 4.0)


class SteadyReader(io.RawIOBase):
    """Reads the bytes at `path` in order. A read that fails is retried from the same offset, four times within 8 s.

    Raises ReadFailed for every error of the filesystem, so that parsers can tell it from broken content.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path, self._offset = path, 0
        self._file: Any = None

    def read(self, size_bytes: int = -1) -> bytes:
        """The next `size_bytes` bytes (-1: all remaining ones)."""
        try:
            for delay_seconds in _DELAYS_SECONDS:
                try:
                    return self._read(size_bytes)
                except Exception:  # clients of object stores have errors of their own
                    sleep(delay_seconds)
            return self._read(size_bytes)
        except Exception as error:
            raise files.ReadFailed(
                f"{self._path}: cannot be read at byte {self._offset}: {files.reason(error)}; put it back or mend its "
                "access, or take it out of the pool, then run the same command again to resume"
            ) from error

    def _read(self, size_bytes: int) -> bytes:
        try:
            if self._file is None:
                if not files.in_cloud_storage(self._path):
                    trees.check_regular(self._path)
                self._file = files.open_binary(self._path)
                if self._offset:
                    self._file.seek(self._offset)
            content = self._file.read(size_bytes)
        except Exception:
            self._file = None
            raise
        self._offset += len(content)
        return content

    def tell(self) -> int:
        """The offset of the next byte: the number of bytes read, unless `seek` was used."""
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read on from `offset`, counted from the start of the file."""
        assert whence == io.SEEK_SET
        if self._file is not None and offset != self._offset:
            try:
                self._file.seek(offset)
            except Exception:  # `read` opens it again, and reports what fails
                self._file = None
        self._offset = offset
        return offset

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
