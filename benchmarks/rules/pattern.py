"""How many captions that name a visible thing `pos_pattern` drops, and how many others, with its defaults and the
bundled tagger.

517 captions are labelled by hand: sets/pattern_captions.tsv, and sets/pattern_openstax.tsv for captions of the OpenStax
pool. Every true caption of Flickr8k names a visible thing.
"""

from __future__ import annotations

from benchmarks.rules import captions
from benchmarks.rules.figures import Figure, Sources
from transforms.single_modality import pos_pattern

NAME = "pos_pattern"
LOST, DROPPED = "captions that name a visible thing dropped", "other captions dropped"
LABEL = "names_a_visible_thing"
GOAL = "<= 0.02"
SOURCES = {"own": "own, as on web pages", "openclipart": "openclipart titles"}
OPENSTAX = "openstax_pool"


def measure(sources: Sources) -> list[Figure]:
    """The figures on the held-out half of the labelled captions, and on Flickr8k's dev split."""
    settings = pos_pattern.PosPatternSettings(tagger="bundled")
    tagger, _ = pos_pattern.load_tagger(settings.tagger)

    def dropped(texts: list[str]) -> int:
        tags = [pos_pattern.tag_caption(tagger, text, settings.max_words) for text in texts]
        return sum(not pos_pattern.keeps(t, any_of=settings.any_of, only_of=settings.only_of) for t in tags)

    def figures(name: str, label_of: dict[str, str]) -> list[Figure]:
        found = []
        for label, question, goal in (("yes", LOST, GOAL), ("no", DROPPED, "")):
            texts = captions.held_out(text for text, own in label_of.items() if own == label)
            found.append(Figure(NAME, name, question, dropped(texts), len(texts), goal))
        return found

    sets = {
        name: {row["caption"]: row[LABEL] for row in captions.table("pattern_captions.tsv") if row["source"] == source}
        for source, name in SOURCES.items()
    }
    if (sources.data / OPENSTAX).is_dir():
        sets["OpenStax"] = captions.by_hash(captions.pool(sources.data / OPENSTAX), "pattern_openstax.tsv", LABEL)
        sets["all labelled"] = {text: label for labels in sets.values() for text, label in labels.items()}
    found = [figure for name, label_of in sets.items() for figure in figures(name, label_of)]
    if "OpenStax" not in sets:
        found.append(Figure(NAME, "OpenStax", LOST, goal=GOAL, missing=OPENSTAX))
    if (sources.data / "proof" / "flickr8k_rows.tsv").exists():
        texts = captions.flickr8k(sources.data, ["dev"])
        found.append(Figure(NAME, "Flickr8k dev", LOST, dropped(texts), len(texts), GOAL))
    else:
        found.append(Figure(NAME, "Flickr8k dev", LOST, goal=GOAL, missing="flickr8k_rows.tsv"))
    return found
