"""Text of a pool on a terminal: what would steer the terminal, or show other words than are there, is escaped."""

from __future__ import annotations

import logging


def printable(text: str) -> str:
    """`text` in one line, in which control characters, overrides of the writing direction, lone surrogates and
    whatever else Unicode calls not printable stand as Python writes them: `\\x1b`, `\\u202e`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class PrintableFormatter(logging.Formatter):
    """Log lines made printable; a traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).split("\n"))
