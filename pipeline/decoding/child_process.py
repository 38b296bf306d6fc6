"""Another process that answers over its standard input and output, and that may crash or hang."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO

_MAX_LINE_BYTES = 2000


class CannotStart(RuntimeError):
    """There is no such program, or it is another one."""


class ChildProcess:
    """The other end. Reading and writing block; `Limit` ends them by ending the process. Raises OSError where it cannot
    be started."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `kill`)
        try:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        except OSError:
            self._errors.close()
            raise

    @classmethod
    def started(cls, command: Sequence[str], ready: bytes, limit_s: float) -> ChildProcess:
        """A process that has said `ready`. Raises CannotStart, with the reason."""
        try:
            process = cls(command)
        except OSError as error:
            raise CannotStart(f"cannot be started ({error.strerror})") from error
        try:
            with Limit(process, limit_s):
                if process.read(len(ready)) != ready:
                    raise EOFError("unknown answer")
        except EOFError as error:
            process.kill()
            raise CannotStart(f"does not start as it should ({error})") from error
        return process

    def is_there(self) -> bool:
        """Whether the process has not ended."""
        return self._popen.poll() is None

    def write(self, content: bytes) -> None:
        """Raises BrokenPipeError where the process is gone."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(content)
        self._popen.stdin.flush()

    def read(self, size_bytes: int) -> bytes:
        """So many bytes. Raises EOFError, with the last line that the process wrote, where it is gone."""
        assert self._popen.stdout is not None
        content = self._popen.stdout.read(size_bytes)
        if len(content) < size_bytes:
            raise EOFError(self._last_line() or f"exit status {self._popen.wait()}")
        return content

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self._popen.kill()
        self._popen.wait()
        for stream in (self._popen.stdin, self._popen.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # what was not written yet
                stream.close()

    def expire(self) -> None:
        """End the process while another thread waits for it."""
        self._popen.kill()

    def _last_line(self) -> str:
        self._errors.seek(0, 2)
        self._errors.seek(max(0, self._errors.tell() - _MAX_LINE_BYTES))
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Limit:
    """Ends the process once the time spent within adds up to `limit_s`."""

    def __init__(self, process: ChildProcess, limit_s: float) -> None:
        self._process, self._left_s, self.passed = process, limit_s, False

    def __enter__(self) -> None:
        self._since_s = time.monotonic()
        self._timer = threading.Timer(max(0.0, self._left_s), self._pass)
        self._timer.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()
        self._timer.join()
        self._left_s -= time.monotonic() - self._since_s

    def _pass(self) -> None:
        self.passed = True
        self._process.expire()
