"""Compare ways to tell English captions from others, on the sets of `benchmarks.rules.language`.

    pip install cld3-py==3.1.0 eld==1.0.6 lingua-language-detector==2.1.1 py3langid==0.4.0 pycld2==0.42 \\
        simplemma==2.0.0
    python -m benchmarks.rules.language_models [--data FOLDER]

A column is the mean share over the sets of a kind: English captions dropped, or others kept. Packages that are not
installed are left out.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean

from benchmarks.rules import language as sets
from benchmarks.rules.figures import SHARED_DATA, Figure, Sources
from transforms.core.plain_text import plain_text
from transforms.single_modality import language, word_lists

Keeps = Callable[[str], bool]
KINDS: dict[str, Callable[[Figure], bool]] = {
    "English, whole": lambda f: "English" in f.question and not _is_short(f) and not _has_names(f),
    "English, first 3 to 5 words": lambda f: "English" in f.question and _is_short(f),
    "English, names and titles": lambda f: "English" in f.question and not _is_short(f) and _has_names(f),
    "others, as written": lambda f: "others" in f.question and "no diacritics" not in f.set_name,
    "others, no diacritics": lambda f: "others" in f.question and "diacritics" in f.set_name and not _is_short(f),
    "others, first 3 or 5 words": lambda f: "others" in f.question and _is_short(f),
}
TIMED = "a photograph of three men standing beside an old wooden boat"


def _is_short(figure: Figure) -> bool:
    return "first" in figure.set_name


def _has_names(figure: Figure) -> bool:
    return "names" in figure.set_name or "title" in figure.set_name


def lid(floor: float = 0.0) -> Keeps:
    """lid.176.ftz alone: the first label is `en`, with at least this probability."""
    model = language.load_detector().model

    def keeps(text: str) -> bool:
        answer = model.detect(text, k=1)
        return bool(answer) and answer[0]["lang"] == "en" and answer[0]["score"] >= floor

    return keeps


def cld2() -> Keeps:
    """Chromium's compact language detector 2."""
    import pycld2

    def keeps(text: str) -> bool:
        found = pycld2.detect(text, isPlainText=True, bestEffort=True)[2]
        return str(found[0][1]) == "en"

    return keeps


def cld3() -> Keeps:
    """Chromium's compact language detector 3."""
    import gcld3

    model = gcld3.NNetLanguageIdentifier(0, 1000)
    return lambda text: bool(model.FindLanguage(text).language == "en")


def lingua() -> Keeps:
    """All 75 languages, high accuracy."""
    from lingua import Language, LanguageDetectorBuilder

    model = LanguageDetectorBuilder.from_all_languages().build()
    return lambda text: bool(model.detect_language_of(text) == Language.ENGLISH)


def py3langid() -> Keeps:
    """The model that the package ships."""
    from py3langid import langid

    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    return lambda text: bool(model.classify(text)[0] == "en")


def eld() -> Keeps:
    """The model that the package loads by default."""
    from eld import LanguageDetector

    model = LanguageDetector()
    return lambda text: bool(model.detect(text).language == "en")


def dictionary() -> Keeps:
    """At least half of the letters are in words of simplemma's English dictionary."""
    from simplemma import is_known

    def keeps(text: str) -> bool:
        words = re.findall(r"[^\W\d_]+", text)
        return 2 * sum(len(word) for word in words if is_known(word, lang="en")) >= sum(map(len, words)) > 0

    return keeps


def words_alone() -> Keeps:
    """The word lists without lid.176."""
    lists = word_lists.load()
    return lambda text: language.most_probable({}, *lists.evidence(text))[0] == "en"


def both(*candidates: Callable[[], Keeps]) -> Callable[[], Keeps]:
    """All of them keep the caption."""

    def load() -> Keeps:
        loaded = [candidate() for candidate in candidates]
        return lambda text: all(keeps(text) for keeps in loaded)

    return load


CANDIDATES: dict[str, Callable[[], Keeps]] = {
    "lid.176, first label": lid,
    "lid.176, at least 0.3": lambda: lid(0.3),
    "lid.176, at least 0.4": lambda: lid(0.4),
    "pycld2": cld2,
    "cld3-py": cld3,
    "eld": eld,
    "py3langid": py3langid,
    "lingua, all languages": lingua,
    "dictionary share (simplemma)": dictionary,
    "lid.176 and dictionary share": both(lid, dictionary),
    "lid.176 and pycld2": both(lid, cld2),
    "word lists alone (wordfreq)": words_alone,
    "lid.176 x word lists (chosen)": sets.defaults,
}


def rows(sources: Sources) -> Iterator[list[str]]:
    """A row a candidate: its shares, and microseconds of CPU a caption of 11 words."""
    for name, load in CANDIDATES.items():
        try:
            judge = load()
        except ImportError:
            continue
        judge(TIMED)
        start = time.process_time()
        for _ in range(500):
            judge(TIMED)
        micro_secs = (time.process_time() - start) / 500 * 1e6
        found = [f for f in sets.figures(sources, _guarded(judge)) if f.of]
        shares = [[f.share for f in found if kind(f)] for kind in KINDS.values()]
        yield [name, *(f"{mean(share):.4f}" if share else "" for share in shares), f"{micro_secs:.0f}"]


def _guarded(judge: Keeps) -> Keeps:
    """The plain text, as the rule sees it; a text that a library refuses is not kept."""

    def keeps(caption: str) -> bool:
        try:
            return judge(plain_text(caption))
        except Exception:  # pycld2 and gcld3 each raise their own
            return False

    return keeps


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED_DATA)
    options = parser.parse_args()
    header = ["way", *KINDS, "µs"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows(Sources(options.data)):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
