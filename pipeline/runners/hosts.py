"""Names of this machine."""

from __future__ import annotations

import socket


def is_this_host(address: str) -> bool:
    """Whether the host of HOST:PORT is a name of this machine."""
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn())
