"""Pseudo-random numbers from identity: the same on every run, in any order, on any worker."""

from __future__ import annotations

import hashlib


def draw(purpose: str, seed: int, uid: str) -> float:
    """u(seed, uid) in [0, 1), a multiple of 2^-53: the first 53 bits of blake2b over purpose, seed and uid.

    A different `purpose` for each decision keeps their draws independent. Our choice.
    """
    digest = hashlib.blake2b(f"{purpose}\0{seed}\0{uid}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53
