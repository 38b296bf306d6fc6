"""What every command tells in one line, without a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the user asked for that cannot be done; nothing was written."""


class Failure(RuntimeError):
    """What failed elsewhere, in one line that says what to do next: a traceback would add nothing."""
