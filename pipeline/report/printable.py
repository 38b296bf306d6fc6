"""Escapes text from a pool for a terminal, which control characters could otherwise manipulate."""

from __future__ import annotations

import logging


def printable(text: str) -> str:
    """Return `text` on one line with non-printable characters escaped as in Python (`\\x1b`, `\\u202e`).

    These include control characters, overrides of the writing direction and lone surrogates.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class PrintableFormatter(logging.Formatter):
    """Formats log records as printable text. Keeps the line breaks of tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).split("\n"))
