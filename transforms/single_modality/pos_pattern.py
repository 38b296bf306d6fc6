"""Part-of-speech patterns: does a caption name anything that an image could show?

Source: arXiv 2309.15954 drops captions by part-of-speech patterns; the summary we have does not give them. Ours: Penn
Treebank tags from NLTK's averaged perceptron over the caption's first words. A caption is kept if

    (any_of is empty  or  some tag is in any_of)   and   not (all tags are in only_of)

By default `any_of` is the common nouns and `only_of` is proper nouns, numbers and symbols. So "a dog" is kept, and
"Maria Rossi 2004" is dropped. The second condition matters only for recipes with a wider `any_of`: with NNP in it,
"Maria Rossi 2004" passes the first condition and fails the second.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field

from transforms.core.catalogue import SINGLE_MODALITY, Rule
from transforms.core.plain_text import plain_text
from transforms.core.settings import Settings
from transforms.single_modality.perceptron import ArrayPerceptron

if TYPE_CHECKING:  # NLTK is imported when the tagger is loaded
    from nltk.tag.perceptron import PerceptronTagger

    from transforms.core.records import Annotation, Sample

PENN_TAGS = frozenset(
    "# $ '' ( ) , . : CC CD DT EX FW IN JJ JJR JJS LS MD NN NNP NNPS NNS PDT POS PRP PRP$ RB RBR "
    "RBS RP SYM TO UH VB VBD VBG VBN VBP VBZ WDT WP WP$ WRB ``".split()
)
COMMON_NOUNS = ("NN", "NNS")
NAMES_NUMBERS_SYMBOLS = (
    "NNP", "NNPS", "CD", "LS", "SYM", "#", "$", "''", "(", ")", ",", ".", ":", "``",
)  # fmt: skip


def _penn_tag(tag: str) -> str:
    if tag not in PENN_TAGS:
        raise ValueError(f"not a Penn tag; allowed: {' '.join(sorted(PENN_TAGS))}")
    return tag


PennTag = Annotated[str, pydantic.AfterValidator(_penn_tag)]


class PosPatternSettings(Settings):
    """Part-of-speech patterns in Penn tags. A caption needs one tag of `any_of`, and is dropped if all its tags are in
    `only_of`. The first `max_words` tokens are tagged. `tagger` is NLTK's own, the bundled one, or `auto`: NLTK's own
    where it is installed."""

    only_decide = frozenset({"any_of", "only_of"})

    any_of: list[PennTag] = Field(list(COMMON_NOUNS), min_length=1)
    only_of: list[PennTag] = Field(list(NAMES_NUMBERS_SYMBOLS))
    max_words: int = Field(64, ge=1, le=1024)
    tagger: Literal["auto", "nltk", "bundled"] = "auto"


BUNDLED = Path(__file__).parent / "pos_tagger"
SOURCES = ("auto", "nltk", "bundled")


@functools.cache
def _tokenizer() -> Any:
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


def words_of(caption: str, max_words: int) -> list[str]:
    """At most `max_words` Penn Treebank tokens of a caption.

    The tagger's training tool uses this function, too. The caption is first cut at white space, so that a hostile one
    costs no more than a long one.
    """
    start = " ".join(caption.split()[:max_words])
    return _tokenizer().tokenize(start)[:max_words]


def load_tagger(source: str = "auto") -> tuple[PerceptronTagger, str]:
    """The tagger, and which one it is: "nltk" or "bundled". Nothing is ever downloaded.

    "nltk" is NLTK's own `averaged_perceptron_tagger_eng` from the machine's NLTK data folders. "bundled" comes with
    this package (docs/pos-tagger.md). "auto" prefers the first. Resolve "auto" once per job: the data folders of
    workers may differ, and with them the verdicts.

    Raises LookupError for "nltk" if the machine has none, ValueError for any other value.
    """
    from nltk.tag.perceptron import PerceptronTagger

    if source not in SOURCES:
        raise ValueError(f"tagger is {source!r}; allowed: {', '.join(SOURCES)}")
    if source != "bundled":
        try:
            return PerceptronTagger(lang="eng"), "nltk"
        except LookupError:
            if source == "nltk":
                raise
    names = PerceptronTagger(load=False).param_files("eng")
    # Parsed here, because NLTK only opens files in its own data folders.
    params = [json.loads((BUNDLED / name).read_text("utf-8")) for name in names]
    return PerceptronTagger.decode_json_obj(params), "bundled"


def fingerprint(tagger: PerceptronTagger) -> str:
    """sha256 (hex) of everything that the tagger's answers depend on: weights, fixed words, tags."""
    weights, tagdict, classes = tagger.encode_json_obj()
    text = json.dumps([weights, tagdict, sorted(classes)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tag_caption(tagger: PerceptronTagger | ArrayPerceptron, caption: str, max_words: int) -> str:
    """The Penn tags of the first `max_words` tokens of a caption's plain text, joined by spaces; "" for no token."""
    return " ".join(tag for _, tag in tagger.tag(words_of(plain_text(caption), max_words)))


def keeps(
    tags: str,
    *,
    any_of: Collection[str] = COMMON_NOUNS,
    only_of: Collection[str] = NAMES_NUMBERS_SYMBOLS,
) -> bool:
    """Whether a caption with these tags (from `tag_caption`) is kept; see the module's formula.

    A caption without any token is dropped, whatever the settings.
    """
    present = set(tags.split())
    if any_of and present.isdisjoint(any_of):
        return False
    return not present <= set(only_of)


class PosPatternAnnotator:
    """Adds `pos_tags`."""

    def __init__(self, settings: PosPatternSettings) -> None:
        self._settings = settings

    def load(self) -> None:
        """Load the tagger."""
        tagger, _ = load_tagger(self._settings.tagger)
        self._tagger = ArrayPerceptron(tagger)

    def columns(self, sample: Sample) -> dict[str, Any]:
        """See the class."""
        caption = sample.annotation.caption
        return {"pos_tags": tag_caption(self._tagger, caption, self._settings.max_words)}


def _keeps(annotation: Annotation, settings: PosPatternSettings) -> bool:
    return keeps(annotation.pos_tags, any_of=settings.any_of, only_of=settings.only_of)


def _identity(settings: PosPatternSettings) -> dict[str, str]:
    tagger, source = load_tagger(settings.tagger)
    return {"source": source, "sha256": fingerprint(tagger)}


POS_PATTERN = Rule(
    name="pos_pattern",
    stage=SINGLE_MODALITY,
    settings=PosPatternSettings,
    summary="the caption has a common noun, and not only names, numbers and symbols",
    source="paper: PoS patterns; ours: the patterns",
    columns={"pos_tags": "string"},
    order=40,
    title="PoS pattern",
    annotator=PosPatternAnnotator,
    identity=_identity,
    loads_model=True,
    keeps=_keeps,
)
