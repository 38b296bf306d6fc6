"""Part-of-speech patterns: does a caption name anything that a picture could show?

Source: arXiv 2309.15954 drops captions by part-of-speech patterns and does not print them. Ours:
Penn Treebank tags from NLTK's averaged perceptron over the caption's first words, and a caption
stays where

    (any_of is empty  or  some tag lies in any_of)   and   not (all tags lie in only_of)

By default `any_of` is the common nouns and `only_of` is proper nouns, numbers and symbols, so
"a dog" stays while "Maria Rossi 2004" goes. The second half says something new only where a recipe
widens `any_of`, for instance to NNP: "Maria Rossi 2004" then meets the first half and goes by the
second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import apache_beam as beam
from nltk.tag.perceptron import PerceptronTagger
from nltk.tokenize import NLTKWordTokenizer

from transforms.annotate import AnnotateByModel
from transforms.core import recipe
from transforms.core.recipe import COMMON_NOUNS, NAMES_NUMBERS_SYMBOLS
from transforms.core.records import Sample

BUNDLED = Path(__file__).parent / "pos_tagger"
SOURCES = ("auto", "nltk", "bundled")

_tokenizer = NLTKWordTokenizer()


def words_of(caption: str, max_words: int) -> list[str]:
    """At most `max_words` Penn Treebank tokens of a caption.

    The tagger's training tool cuts its texts by this same function. The caption is cut at white
    space first, so that a hostile one costs no more than a long one.
    """
    start = " ".join(caption.split()[:max_words])
    return _tokenizer.tokenize(start)[:max_words]


def load_tagger(source: str = "auto") -> tuple[PerceptronTagger, str]:
    """The tagger, and which one it is: "nltk" or "bundled". Nothing is ever downloaded.

    "nltk" is NLTK's own `averaged_perceptron_tagger_eng` from the machine's NLTK data folders;
    "bundled" comes with this package (docs/pos-tagger.md); "auto" prefers the first. Where several
    workers share a job, resolve "auto" once and hand every worker the answer: their data folders
    may differ, and with them the verdicts.

    Raises LookupError for "nltk" where the machine has none, ValueError for another word.
    """
    if source not in SOURCES:
        raise ValueError(f"tagger is {source!r}; allowed: {', '.join(SOURCES)}")
    if source != "bundled":
        try:
            return PerceptronTagger(lang="eng"), "nltk"
        except LookupError:
            if source == "nltk":
                raise
    names = PerceptronTagger(load=False).param_files("eng")
    # Parsed here, because NLTK opens files in its own data folders only.
    params = [json.loads((BUNDLED / name).read_text("utf-8")) for name in names]
    return PerceptronTagger.decode_json_obj(params), "bundled"


def fingerprint(tagger: PerceptronTagger) -> str:
    """sha256 (hex) of all that a tagger's answers depend on: weights, fixed words, tags."""
    weights, tagdict, classes = tagger.encode_json_obj()
    text = json.dumps([weights, tagdict, sorted(classes)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tag_caption(tagger: PerceptronTagger, caption: str, max_words: int) -> str:
    """The Penn tags of a caption's first `max_words` tokens, joined by spaces; "" for no token."""
    return " ".join(tag for _, tag in tagger.tag(words_of(caption, max_words)))


def keeps(
    tags: str,
    *,
    any_of: Collection[str] = COMMON_NOUNS,
    only_of: Collection[str] = NAMES_NUMBERS_SYMBOLS,
) -> bool:
    """Whether a caption with these tags (`tag_caption`'s) stays; see the module's formula.

    A caption without any token goes, whatever the settings.
    """
    present = set(tags.split())
    if any_of and present.isdisjoint(any_of):
        return False
    return not present <= set(only_of)


class PosPattern(beam.PTransform):
    """Adds `pos_tags`."""

    def __init__(self, settings: recipe.PosPattern) -> None:
        super().__init__()
        self._settings = settings

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        return batches | "Tag caption" >> beam.ParDo(_TagCaption(self._settings))


class _TagCaption(AnnotateByModel):
    stage, reason = recipe.SINGLE_MODALITY, "pos_pattern_failed"

    def __init__(self, settings: recipe.PosPattern) -> None:
        self._settings = settings

    def load(self) -> None:
        self._tagger, _ = load_tagger(self._settings.tagger)

    def columns(self, sample: Sample) -> dict[str, Any]:
        caption = sample.annotation.caption
        return {"pos_tags": tag_caption(self._tagger, caption, self._settings.max_words)}
