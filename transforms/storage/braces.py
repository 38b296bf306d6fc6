"""Brace expansion as in shells and webdataset: `{00000..00099}.tar` names a hundred files, `{a,b}` two."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

MAX_NAMES = 1_000_000
"""More names than this are refused; a folder or a `*` names any number."""

_MAX_DEPTH = 16
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?|([a-zA-Z])\.\.([a-zA-Z])(?:\.\.-?(\d{1,18}))?")


class TooManyNames(ValueError):
    """Braces that stand for more than MAX_NAMES names, or that are nested too deeply."""


def expanded(pattern: str) -> list[str]:
    """Return the names that `pattern` stands for, in order; `[pattern]` if it has no braces to expand.

    As in shells, a brace without a comma or range is a character like any other, and `{01..10}` pads with zeros.
    Raises TooManyNames.
    """
    names = list(itertools.islice(_names(pattern, 0), MAX_NAMES + 1))
    if len(names) > MAX_NAMES:
        raise TooManyNames(f"{pattern}: stands for more than {MAX_NAMES:,} names; give a folder, or a pattern with *")
    return names


def _names(pattern: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise TooManyNames(f"{pattern}: braces are nested more than {_MAX_DEPTH} deep")
    found = _first_brace(pattern)
    if found is None:
        yield pattern
        return
    start, end, choices = found
    for choice in choices:
        for middle in _names(choice, depth + 1):
            # The rest is expanded anew for each name, so that nothing grows with the number of names.
            for rest in _names(pattern[end:], depth):
                yield pattern[:start] + middle + rest


def _first_brace(pattern: str) -> tuple[int, int, Iterator[str] | list[str]] | None:
    """Return start and end of the first brace that stands for several names, and what it stands for."""
    for start, cuts in sorted(_braces(pattern)):
        parts = [pattern[begun + 1 : end] for begun, end in itertools.pairwise([start, *cuts])]
        if len(parts) > 1:
            return start, cuts[-1] + 1, parts
        bounds = _RANGE.fullmatch(parts[0])
        if bounds:
            return start, cuts[-1] + 1, _in_range(bounds)
    return None


def _braces(pattern: str) -> Iterator[tuple[int, list[int]]]:
    """Yield where each brace that ends starts, and where its own commas and its end are."""
    opened: list[tuple[int, list[int]]] = []
    for found in re.finditer("[{},]", pattern):
        if found[0] == "{":
            opened.append((found.start(), []))
        elif opened:
            opened[-1][1].append(found.start())
            if found[0] == "}":
                yield opened.pop()


def _in_range(bounds: re.Match[str]) -> Iterator[str]:
    first, last, step, first_letter, last_letter, letter_step = bounds.groups()
    if first_letter:
        numbers = _steps(ord(first_letter), ord(last_letter), letter_step)
        return (chr(number) for number in numbers)
    is_padded = any(len(text.lstrip("-")) > 1 and text.lstrip("-")[0] == "0" for text in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    return (f"{number:0{width}d}" for number in _steps(int(first), int(last), step))


def _steps(first: int, last: int, step: str | None) -> range:
    size = int(step or 1) or 1
    return range(first, last + 1, size) if first <= last else range(first, last - 1, -size)
