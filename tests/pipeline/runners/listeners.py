"""The TCP ports that a process listens on, from /proc."""

from __future__ import annotations

import os
import re
from pathlib import Path

_LISTEN = "0A"
_LOOPBACK = re.compile(r"0100007F|0{8}0{8}0{8}01000000|0{8}0{8}FFFF00000100007F")


def listeners(pid: int) -> dict[str, bool]:
    """Hexadecimal address:port of each listening socket of a process, and whether it is of loopback."""
    inodes = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(file))
        except OSError:  # closed since
            continue
    found = {}
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _, local, _, state, *_, inode = line.split()[:10]
            if state == _LISTEN and f"socket:[{inode}]" in inodes:
                found[local] = bool(_LOOPBACK.fullmatch(local.rpartition(":")[0]))
    return found


def of_runner_and_worker(number: int) -> tuple[bool, dict[str, bool]]:
    """Whether this is a process of its own, and what it and the process that started it listen on."""
    return "WORKER_ID" in os.environ, {**listeners(os.getppid()), **listeners(os.getpid())}
