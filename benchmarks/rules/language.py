"""How many English captions `language` drops, and how many others it keeps, with its defaults.

The captions of sets/language_captions.tsv, and what is in the data folder: Flickr8k, the OpenStax pool, and any file
`captions/LABEL.NAME.txt` with a caption a line, such as `captions/fr.multi30k.txt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.rules import captions
from benchmarks.rules.figures import Figure, Sources
from transforms.single_modality import language, word_lists

NAME = "language"
LEAST_WORDS = 3  # `caption_length` drops shorter captions
ENGLISH_GOAL, OTHERS_GOAL = "<= 0.01", "<= 0.03"

Keeps = Callable[[str], bool]


def measure(sources: Sources) -> list[Figure]:
    """The figures of the defaults, on the held-out half of each set."""
    return figures(sources, defaults())


def defaults() -> Keeps:
    """The rule with its default settings."""
    settings = language.LanguageSettings()
    detector = language.load_detector()
    return lambda caption: language.keeps(
        *language.detect(detector, caption), settings.allowed, settings.min_probability
    )


def figures(sources: Sources, keeps: Keeps) -> list[Figure]:
    """The figures of any rule that keeps English captions."""
    found = [*_committed(keeps), *_english(sources.data, keeps), *_from_files(sources.data / "captions", keeps)]
    return [figure for figure in found if figure.of or figure.missing]  # short captions have no first 5 words


def _committed(keeps: Keeps) -> list[Figure]:
    rows = captions.table("language_captions.tsv")
    found = []
    for source in ("openclipart", "own, names"):
        texts = [row["caption"] for row in rows if row["language"] == "en" and row["source"] == source]
        found.append(_lost(source, texts, keeps))
    others = [row["caption"] for row in rows if row["language"] != "en"]
    found += [_kept("own", others, keeps), _kept("own, no diacritics", map(_bare, others), keeps)]
    variants = [
        caption
        for caption in captions.held_out(row["caption"] for row in rows)
        if len({keeps(variant(caption)) for variant in (str, str.lower, str.upper, str.title)}) > 1
    ]
    total = len(captions.held_out(row["caption"] for row in rows))
    found.append(Figure(NAME, "all committed", "verdict depends on letter case", len(variants), total, "0"))
    return found


def _english(data: Path, keeps: Keeps) -> list[Figure]:
    sets = {
        "Flickr8k": lambda: captions.flickr8k(data, ("train", "dev", "test")),
        "OpenStax pool": lambda: list(captions.pool(data / "openstax_pool")),
    }
    places = {"Flickr8k": data / "proof" / "flickr8k_rows.tsv", "OpenStax pool": data / "openstax_pool"}
    found = []
    for name, read in sets.items():
        if not places[name].exists():
            found.append(Figure(NAME, name, "English captions dropped", goal=ENGLISH_GOAL, missing=places[name].name))
            continue
        texts = read()
        found.append(_lost(name, texts, keeps))
        found += [_lost(f"{name}, first {words} words", captions.cut(texts, words), keeps) for words in (3, 4, 5)]
    return found


def _from_files(folder: Path, keeps: Keeps) -> list[Figure]:
    found = []
    for path in sorted(folder.glob("*.txt")):
        label, _, name = path.stem.partition(".")
        texts = list(dict.fromkeys(path.read_text("utf-8").splitlines()))
        name = f"{name} ({label})"
        if label == "en":
            found += [_lost(name, texts, keeps), _lost(f"{name}, first 4 words", captions.cut(texts, 4), keeps)]
            continue
        bare = [_bare(text) for text in texts]
        found += [_kept(name, texts, keeps), _kept(f"{name}, no diacritics", bare, keeps)]
        found += [
            _kept(f"{name}, no diacritics, first {words} words", captions.cut(bare, words), keeps) for words in (3, 5)
        ]
    return found


def _lost(name: str, texts: Iterable[str], keeps: Keeps) -> Figure:
    chosen = captions.held_out(text for text in texts if len(text.split()) >= LEAST_WORDS)
    count = sum(not keeps(text) for text in chosen)
    return Figure(NAME, name, "English captions dropped", count, len(chosen), ENGLISH_GOAL)


def _kept(name: str, texts: Iterable[str], keeps: Keeps) -> Figure:
    chosen = captions.held_out(texts)
    return Figure(NAME, name, "others kept", sum(map(keeps, chosen)), len(chosen), OTHERS_GOAL)


def _bare(text: str) -> str:
    return word_lists.without_marks(text.casefold())
