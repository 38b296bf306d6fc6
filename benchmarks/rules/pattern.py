"""How many captions that name a visible thing `pos_pattern` drops, and how many others, with its defaults and the
bundled tagger.

sets/pattern_captions.tsv has 517 captions labelled by hand. Every true caption of Flickr8k names a visible thing.
"""

from __future__ import annotations

from benchmarks.rules import captions
from benchmarks.rules.figures import Figure, Sources
from transforms.single_modality import pos_pattern

NAME = "pos_pattern"
LOST, DROPPED = "captions that name a visible thing dropped", "other captions dropped"
GOAL = "<= 0.02"
SOURCES = {"own": "own, as on web pages", "openclipart": "openclipart titles", "openstax": "OpenStax"}


def measure(sources: Sources) -> list[Figure]:
    """The figures on the held-out half of the labelled captions, and on Flickr8k's dev split."""
    settings = pos_pattern.PosPatternSettings(tagger="bundled")
    tagger, _ = pos_pattern.load_tagger(settings.tagger)

    def dropped(texts: list[str]) -> int:
        tags = [pos_pattern.tag_caption(tagger, text, settings.max_words) for text in texts]
        return sum(not pos_pattern.keeps(t, any_of=settings.any_of, only_of=settings.only_of) for t in tags)

    rows = captions.table("pattern_captions.tsv")
    found = []
    for label, question, goal in (("yes", LOST, GOAL), ("no", DROPPED, "")):
        of_label = [row for row in rows if row["names_a_visible_thing"] == label]
        sets = {"all labelled": of_label}
        sets |= {name: [row for row in of_label if row["source"] == source] for source, name in SOURCES.items()}
        for name, chosen in sets.items():
            texts = captions.held_out(row["caption"] for row in chosen)
            found.append(Figure(NAME, name, question, dropped(texts), len(texts), goal))
    if (sources.data / "proof" / "flickr8k_rows.tsv").exists():
        texts = captions.flickr8k(sources.data, ["dev"])
        found.append(Figure(NAME, "Flickr8k dev", LOST, dropped(texts), len(texts), GOAL))
    else:
        found.append(Figure(NAME, "Flickr8k dev", LOST, goal=GOAL, missing="flickr8k_rows.tsv"))
    return found
