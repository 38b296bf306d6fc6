"""The common nouns of visible things in WordNet, for which the tagger needs no context.

In text without letter case a perceptron takes many nouns in titles for names ("Crab Nebula", "Caesar Salad"). A word
that is hardly anything but a noun is one in a title, too.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# WordNet's lexicographer files: animal, artifact, body, communication, event, food, location, object, person,
# phenomenon, plant, possession, shape, substance. Not group: "Republic of Chad", "Kansas State".
VISIBLE = frozenset("05 06 08 10 11 13 15 17 18 19 20 21 25 27".split())
PERSON = "18"
LEAST_LETTERS = 3
LEAST_NOUN_SHARE = 0.5  # of its occurrences in the texts that WordNet's authors tagged; chosen on labelled captions
LEAST_TITLE_COUNT = 5  # occurrences of a title such as "president" there; "victor" and "dame" are rather names
_PARTS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}  # the digits in cntlist.rev


@dataclass(frozen=True)
class Synset:
    """One line of data.noun: its place, its lexicographer file, its words, and whether it is a name (an instance)."""

    offset: str
    file: str
    words: tuple[str, ...]
    name: bool


def common_nouns(folder: Path) -> dict[str, str]:
    """Each common noun of a visible thing, and its Penn tag: NN, or NNS for its plural.

    Words that are also names ("rose", "chile") are left out: in captions of names they are no nouns. So are words that
    are as often a verb, an adjective or an adverb.
    """
    synsets = {synset.offset: synset for synset in _synsets(folder)}
    words = {word for synset in synsets.values() if not synset.name for word in synset.words}
    elsewhere = {part: _lemmas(folder, part) for part in ("verb", "adj", "adv")}
    counts = _counts(folder)
    first_file = {word: synsets[offset].file for word, offset in _first_senses(folder)}
    first_names, last_names = _names(synsets.values())
    titles = {word for word in first_names if first_file.get(word) == PERSON}  # President Carter
    titles = {word for word in titles if counts[word]["noun"] >= LEAST_TITLE_COUNT}
    names = (first_names - titles) | last_names | _single_names(synsets.values())

    def mostly_noun(word: str) -> bool:
        if not any(word in lemmas for lemmas in elsewhere.values()):
            return True
        found = counts[word]
        if not found:  # too rare for a count
            return word not in elsewhere["verb"]
        return found["noun"] / found.total() >= LEAST_NOUN_SHARE

    nouns = {
        word
        for word in words - names
        if word.isalpha() and word.islower() and len(word) >= LEAST_LETTERS
        if first_file[word] in VISIBLE and mostly_noun(word)
    }
    irregular = _irregular_plurals(folder)
    plurals = {irregular.get(word) or _plural(word) for word in nouns} - nouns - names
    plurals = {word for word in plurals if not any(word in lemmas for lemmas in elsewhere.values())}
    return dict.fromkeys(sorted(nouns), "NN") | dict.fromkeys(sorted(plurals), "NNS")


def _lines(folder: Path, name: str) -> Iterator[list[str]]:
    for line in (folder / name).read_text("latin-1").splitlines():
        if line[:1] != " ":  # the licence
            yield line.partition(" | ")[0].split()


def _synsets(folder: Path) -> Iterator[Synset]:
    for fields in _lines(folder, "data.noun"):
        end = 4 + 2 * int(fields[3], 16)
        yield Synset(fields[0], fields[1], tuple(fields[4:end:2]), "@i" in fields[end:])


def _names(synsets: Iterable[Synset]) -> tuple[set[str], set[str]]:
    """The first and the last words of persons' names."""
    names = [
        re.split("[_-]", name)
        for synset in synsets
        if synset.name and synset.file == PERSON
        for name in synset.words
        if name[:1].isupper()
    ]
    return {parts[0].lower() for parts in names}, {parts[-1].lower() for parts in names if parts[-1][:1].isupper()}


def _single_names(synsets: Iterable[Synset]) -> set[str]:
    """The names of one word, of whatever they are."""
    return {name.lower() for synset in synsets if synset.name for name in synset.words if name[:1].isupper()}


def _first_senses(folder: Path) -> Iterator[tuple[str, str]]:
    for fields in _lines(folder, "index.noun"):
        yield fields[0], fields[-int(fields[2])]


def _lemmas(folder: Path, part: str) -> set[str]:
    return {fields[0] for fields in _lines(folder, f"index.{part}")}


def _counts(folder: Path) -> defaultdict[str, Counter[str]]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for line in (folder / "cntlist.rev").read_text().splitlines():
        sense, _, count = line.split()
        word, _, place = sense.partition("%")
        counts[word][_PARTS[place[0]]] += int(count)
    return counts


def _irregular_plurals(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in (folder / "noun.exc").read_text().splitlines():
        plural, singular = line.split()[:2]
        found.setdefault(singular, plural)
    return found


def _plural(word: str) -> str:
    if word[-1] == "y" and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")
