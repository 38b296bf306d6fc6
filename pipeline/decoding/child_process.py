"""A child process that answers requests over its standard input and output, and that may crash or hang."""

from __future__ import annotations

import contextlib
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

_MAX_LINE_BYTES = 2000
_ENDING_S = 5.0  # between closing its output and its end


class CannotStart(RuntimeError):
    """The program does not exist, or does not answer as expected."""


class Stalled(RuntimeError):
    """The process waits for something that does not come: it sleeps and uses no CPU time."""


class ChildProcess:
    """A running child process. Reads and writes block; `TimeLimit` ends them by killing the process.

    Raises OSError if the process cannot be started.
    """

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
        """Start a process and wait up to `limit_s` seconds for it to send `ready`. Raises CannotStart."""
        try:
            process = cls(command)
        except OSError as error:
            raise CannotStart(f"cannot be started ({error.strerror})") from error
        try:
            with TimeLimit(process, limit_s):
                if process.read(len(ready)) != ready:
                    raise EOFError("unexpected answer")
        except EOFError as error:
            process.kill()
            raise CannotStart(f"does not start correctly ({error})") from error
        return process

    def is_running(self) -> bool:
        """Return whether the process is still running."""
        return self._popen.poll() is None

    def exit_status(self) -> int | None:
        """Return the exit status of an ending process, or minus the signal that ends it; None if it does not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._popen.wait(_ENDING_S)
        return None

    def write(self, content: bytes) -> None:
        """Send bytes to the process. Raises BrokenPipeError if it has ended."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(content)
        self._popen.stdin.flush()

    def read(self, size_bytes: int) -> bytes:
        """Read exactly `size_bytes` bytes. If the process ends first, raises EOFError with its last line on stderr."""
        assert self._popen.stdout is not None
        content = self._popen.stdout.read(size_bytes)
        if len(content) < size_bytes:
            raise EOFError(self._last_line() or f"exit status {self._popen.wait()}")
        return content

    def wait_for_output(self, stalled_after_s: float) -> None:
        """Wait until there is output, or the process has ended.

        Raises Stalled where the process has slept for `stalled_after_s` seconds without any CPU time. A process that
        waits for a core does not sleep, so the result does not depend on how busy the machine is.
        """
        assert self._popen.stdout is not None
        output, before = select.poll(), ""
        output.register(self._popen.stdout, select.POLLIN)
        while not output.poll(1000 * stalled_after_s):
            state, cpu_time = _state_and_cpu_time(self._popen.pid)
            if state == "S" and cpu_time == before:
                raise Stalled(f"process {self._popen.pid} sleeps")
            before = cpu_time

    def kill(self) -> None:
        """Kill the process if it is still running, and close its streams."""
        self._popen.kill()
        self._popen.wait()
        for stream in (self._popen.stdin, self._popen.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # unwritten data in the buffer
                stream.close()

    def interrupt(self) -> None:
        """Kill the process while another thread is reading from it or writing to it."""
        self._popen.kill()

    def _last_line(self) -> str:
        self._errors.seek(0, 2)
        self._errors.seek(max(0, self._errors.tell() - _MAX_LINE_BYTES))
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _state_and_cpu_time(pid: int) -> tuple[str, str]:
    """Return the state of a process (`S`: it sleeps) and its CPU time so far (proc(5): state, utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return fields[0], " ".join(fields[11:13])


class TimeLimit:
    """Kills the process once the time spent inside this context, over all entries, exceeds `limit_s` seconds."""

    def __init__(self, process: ChildProcess, limit_s: float) -> None:
        self._process, self._remaining_s, self.exceeded = process, limit_s, False

    def __enter__(self) -> None:
        self._entered_s = time.monotonic()
        self._timer = threading.Timer(max(0.0, self._remaining_s), self._expire)
        self._timer.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()
        self._timer.join()
        self._remaining_s -= time.monotonic() - self._entered_s

    def _expire(self) -> None:
        self.exceeded = True
        self._process.interrupt()
