"""A stand-in for the child process of tensorflow-io: the words of a "file" are commands that it follows."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from pathlib import Path

ANSWER = struct.Struct(">cII")  # as in tfio_child, which this program cannot import

START = """#!/bin/sh
echo start >> {log}
exec {python} {program}
"""


def install(folder: Path) -> tuple[str, Path]:
    """Create an executable that stands in for the environment's Python, and a log with one line per start."""
    program, log = folder / "python-of-tfio", folder / "starts.txt"
    program.write_text(START.format(log=log, python=sys.executable, program=__file__))
    program.chmod(0o755)
    return str(program), log


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer

    def send(tag: bytes, first: int = 0, second: int = 0, content: bytes = b"") -> None:
        answers.write(ANSWER.pack(tag, first, second) + content)
        answers.flush()

    send(b"R")
    while header := requests.read(28):
        _, pages, _, size_bytes = struct.unpack(">8sIQQ", header)
        words = requests.read(size_bytes)[132:].decode().split()
        for word in words:
            if word == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif word == "hang":
                time.sleep(60)
            elif word == "slow":
                time.sleep(1)
            elif word == "refuse":
                send(b"F", 7, 0, b"no good")
            elif word == "huge":
                send(b"P", 2**20, 2**20)
            elif word == "pages":
                for page in range(pages):
                    send(b"P", 2, 3, bytes([page] * 18))
            else:
                send(b"P", 2, 3, bytes([int(word)] * 18))
        send(b".")


if __name__ == "__main__":
    main()
