"""How typical the words of a text are for each language, from wordfreq's frequency lists.

Ours: a unigram model. fastText's lid.176 reads a text's character n-grams, of which a short caption has few. Frequent
words tell more: "man", "in" and "white" are all frequent in English only. Names are in no list and tell nothing.

wordfreq (Apache-2.0; its lists are CC BY-SA 4.0) comes with the lists. Nothing is ever downloaded. Its languages in the
Latin script are used, because for other scripts lid.176 needs no help.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transforms.core.plain_text import plain_text
from transforms.storage import files

LABELS = {
    "ca": ("ca",), "cs": ("cs",), "da": ("da",), "de": ("de",), "en": ("en",), "es": ("es",), "fi": ("fi",),
    "fil": ("tl",), "fr": ("fr",), "hu": ("hu",), "id": ("id",), "is": ("is",), "it": ("it",), "lt": ("lt",),
    "lv": ("lv",), "ms": ("ms",), "nb": ("no", "nn"), "nl": ("nl",), "pl": ("pl",), "pt": ("pt",), "ro": ("ro",),
    "sh": ("hr", "sr", "bs", "sh"), "sk": ("sk",), "sl": ("sl",), "sv": ("sv",), "tr": ("tr",), "vi": ("vi",),
}  # fmt: skip
"""The labels of lid.176 that each of wordfreq's lists stands for."""

LEAST_FREQUENT = 500
"""Words rarer than 10^(-500 / 100) are left out: 8,000 to 10,000 words a language remain."""
LEAST_FREQUENT_ENGLISH = 670
"""English captions have names and terms of all other languages, so the English list goes on to rarer words."""
UNLISTED = 650
"""A word that a list lacks has the frequency 10^(-650 / 100) there, and so has a rarer word."""

_WORD = re.compile(r"[^\W\d_]+")
_WITHOUT_MARKS = str.maketrans({"đ": "d", "ø": "o", "ł": "l", "ı": "i", "æ": "ae", "œ": "oe", "ð": "d", "þ": "th"})


@dataclass(frozen=True)
class WordLists:
    """`gains[rows[word]]` has the gain of a word for each list, in the order of `LABELS`, dtype uint16: its frequency
    over that of an unlisted word, in hundredths of a decimal logarithm; 0 for an unlisted word."""

    rows: dict[str, int]
    gains: NDArray[np.uint16]

    def evidence(self, text: str) -> tuple[dict[str, float], int]:
        """The summed gains of a plain text's words (decimal logarithms) by label, and its number of words."""
        words = _WORD.findall(text)
        rows = [row for word in words if (row := self.rows.get(word)) is not None]
        sums = zip(LABELS.values(), self.gains[rows].sum(0, dtype=np.int64).tolist(), strict=True)
        return {label: gain / 100 for labels, gain in sums for label in labels}, len(words)


@functools.cache
def load() -> WordLists:
    """All lists. A word counts with and without its diacritics, which captions often lack."""
    rows: dict[str, int] = {}
    cells = [
        (rows.setdefault(form, len(rows)), column, gain)
        for column, language in enumerate(LABELS)
        for form, gain in _listed(language)
    ]
    places = np.array(cells)
    gains = np.zeros((len(rows), len(LABELS)), np.uint16)
    np.maximum.at(gains, (places[:, 0], places[:, 1]), places[:, 2].astype(np.uint16))
    return WordLists(rows, gains)


def _listed(language: str) -> Iterator[tuple[str, int]]:
    from wordfreq import read_cBpack

    end = LEAST_FREQUENT_ENGLISH if language == "en" else LEAST_FREQUENT
    for rarity, words in enumerate(read_cBpack(_path(language))[: end + 1]):
        for word in words:
            for form in _forms(word):
                yield form, max(UNLISTED - rarity, 0)


def _forms(word: str) -> set[str]:
    """A word of a list as it is in a plain text, with and without its diacritics."""
    if word.isascii():  # most are, and the lists have no capitals
        return {word}
    plain = plain_text(word)
    return {plain, without_marks(plain)}


def _path(language: str) -> str:
    from wordfreq import available_languages

    return str(available_languages("large" if language == "en" else "small")[language])


def without_marks(text: str) -> str:
    """A case-folded text without diacritics, as on keyboards that lack them."""
    parts = unicodedata.normalize("NFD", text.translate(_WITHOUT_MARKS))
    return "".join(part for part in parts if not unicodedata.combining(part))


def fingerprint() -> str:
    """sha256 (hex) of the lists that are used, and of what is taken of them."""
    found = hashlib.sha256(repr((LABELS, LEAST_FREQUENT, LEAST_FREQUENT_ENGLISH, UNLISTED)).encode())
    for language in LABELS:
        found.update(files.sha256(_path(language)).encode())
    return found.hexdigest()
