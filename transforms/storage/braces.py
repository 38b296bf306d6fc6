"""Brace expansion as in shells and webdataset: `{00000..00099}.tar` names a hundred files, `{a,b}` two."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator

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
    if _count(pattern, 0) > MAX_NAMES:
        raise TooManyNames(f"{pattern}: stands for more than {MAX_NAMES:,} names; give a folder, or a pattern with *")
    return list(_names(pattern))


def _count(pattern: str, depth: int) -> int:
    """Return how many names a pattern stands for; some number above the limit where they are more."""
    if depth > _MAX_DEPTH:
        raise TooManyNames(f"{pattern}: braces are nested more than {_MAX_DEPTH} deep")
    count = 1
    while count <= MAX_NAMES and (found := _first_brace(pattern)):
        _, end, choices = found
        count *= len(choices) if isinstance(choices, _Range) else sum(_count(choice, depth + 1) for choice in choices)
        pattern = pattern[end:]
    return count


def _names(pattern: str) -> Iterator[str]:
    found = _first_brace(pattern)
    if found is None:
        yield pattern
        return
    start, end, choices = found
    after = list(_names(pattern[end:]))
    for choice in choices:
        for middle in _names(choice):
            for rest in after:
                yield pattern[:start] + middle + rest


@dataclasses.dataclass(frozen=True)
class _Range:
    """The numbers of a range, each written as `text` does."""

    numbers: range
    text: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[str]:
        return map(self.text, self.numbers)


def _first_brace(pattern: str) -> tuple[int, int, _Range | list[str]] | None:
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


def _in_range(bounds: re.Match[str]) -> _Range:
    first, last, step, first_letter, last_letter, letter_step = bounds.groups()
    if first_letter:
        return _Range(_steps(ord(first_letter), ord(last_letter), letter_step), chr)
    is_padded = any(len(text.lstrip("-")) > 1 and text.lstrip("-")[0] == "0" for text in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    return _Range(_steps(int(first), int(last), step), f"{{:0{width}d}}".format)


def _steps(first: int, last: int, step: str | None) -> range:
    size = int(step or 1) or 1
    return range(first, last + 1, size) if first <= last else range(first, last - 1, -size)
