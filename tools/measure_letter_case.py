"""Count how many captions `language` and `pos_pattern` keep, and how many verdicts change with letter case.

    python -m tools.measure_letter_case pipeline/demo/pool POOL captions.txt

A source is a pool or a text file with a caption a line. Each caption is judged as it is, in lower case, in upper case
and in title case. "Without plain text" shows lid.176 and the tagger on the text with its case, as a comparison; the
word lists have no case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.sources.pool import list_shards
from pipeline.sources.webdataset import read_samples
from transforms.core.plain_text import plain_text
from transforms.core.recipe import PoolSettings
from transforms.core.records import Sample
from transforms.single_modality import language, pos_pattern

VARIANTS: dict[str, Callable[[str], str]] = {
    "as it is": str, "lower case": str.lower, "upper case": str.upper, "title case": str.title,
}  # fmt: skip
MAX_WORDS = pos_pattern.PosPatternSettings().max_words


def captions_of(source: str) -> list[str]:
    """Return the captions of a text file, or of a pool."""
    if Path(source).is_file() and not source.endswith(".tar"):
        return Path(source).read_text("utf-8").splitlines()
    bounds = PoolSettings()
    samples = (one for shard in list_shards(source) for one in read_samples(shard, bounds, "measure"))
    return [one.annotation.caption for one in samples if isinstance(one, Sample)]


class Judge:
    """The verdicts of the two rules on a caption, with the bundled models."""

    def __init__(self) -> None:
        self._detector, (self._tagger, _) = language.load_detector(), pos_pattern.load_tagger("bundled")

    def verdicts(self, text: str) -> tuple[bool, bool]:
        """Return whether `language` and `pos_pattern` keep a text."""
        tags = pos_pattern.tag_caption(self._tagger, text, MAX_WORDS)
        return language.keeps(*language.detect(self._detector, text), ["en"]), pos_pattern.keeps(tags)

    def verdicts_with_case(self, text: str) -> tuple[bool, bool]:
        """Return what the two rules would say if their models, lid.176 and the tagger, saw the letter case."""
        words = self._tagger.tag(pos_pattern.words_of(text, MAX_WORDS))
        found = language._probabilities(self._detector.model, " ".join(text.split()))
        is_english = found != self._detector.blank and max(found, key=lambda label: found[label]) == "en"
        return is_english, pos_pattern.keeps(" ".join(tag for _, tag in words))


def row(name: str, found: Iterable[tuple[bool, bool]], original: list[tuple[bool, bool]]) -> str:
    """Return a line of the table: shares kept by each rule, and verdicts that differ from those on the original."""
    verdicts = list(found)
    kept = [sum(one[rule] for one in verdicts) / len(verdicts) for rule in (0, 1)]
    changed = [sum(a[rule] != b[rule] for a, b in zip(verdicts, original, strict=True)) for rule in (0, 1)]
    return f"| {name} | {kept[0]:.4f} | {changed[0]} | {kept[1]:.4f} | {changed[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    judge = Judge()
    for source in parser.parse_args().sources:
        captions = captions_of(source)
        print(f"\n{source}: {len(captions)} captions, {len({plain_text(caption) for caption in captions})} different\n")
        print("| text | kept by language | changed | kept by pos_pattern | changed |\n|---|---|---|---|---|")
        for title, judged in (("", judge.verdicts), (", without plain text", judge.verdicts_with_case)):
            original = [judged(caption) for caption in captions]
            for name, variant in VARIANTS.items():
                print(row(name + title, (judged(variant(caption)) for caption in captions), original))


if __name__ == "__main__":
    main()
